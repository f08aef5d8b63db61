"""Plot of a run: its panels and what is drawn in them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.plots import plot_loss


def test_plot_has_panels_for_trust_ratios_and_the_proposal(tmp_path: Path) -> None:
    ratios = {"trust_ratio_min": 0.1, "trust_ratio_median": None, "trust_ratio_max": 2.0}
    proposal = {"variance_ratio": 0.97, "effective_sample_size": 0.9, "proposal_entropy": None}
    heights = []
    for extra in ({}, ratios, proposal, {**ratios, **proposal}):
        lines = [{"step": s, "loss": None if s == 3 else 5.0, **(extra if s > 1 else {})} for s in range(1, 9)]
        (tmp_path / METRICS).write_text("".join(json.dumps(x) + "\n" for x in lines))
        plot_loss(tmp_path / METRICS, tmp_path / "loss.png")
        heights.append(struct.unpack(">I", (tmp_path / "loss.png").read_bytes()[20:24])[0])
    assert heights[0] < heights[1] == heights[2] < heights[3]


def test_plot_has_the_loss_before_training_and_the_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    plot = Axes.plot

    def recorded(axes: Axes, x: Any, y: Any, *args: Any, **options: Any) -> Any:
        drawn[options["label"]] = [list(x), list(y)]
        return plot(axes, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", recorded)
    figures = {"held_out_loss": 6.0, "held_out_unigram_entropy": 5.0}
    lines: list[dict[str, Any]] = [{"event": "held_out", "step": 0, **figures}]
    lines += [{"step": s, "loss": 5 - s / 10, **(figures if s == 2 else {})} for s in (1, 2)]
    (tmp_path / METRICS).write_text("".join(json.dumps(x) + "\n" for x in lines))
    plot_loss(tmp_path / METRICS, tmp_path / "loss.png")
    assert drawn["held-out"] == [[0, 2], [6.0, 6.0]]
    assert drawn["held-out unigram entropy"] == [[0, 2], [5.0, 5.0]]


def test_plot_has_the_choices_of_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate after each measurement, the strategy where it changes, and the best other plan with its interval."""
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    step, errorbar, annotate = Axes.step, Axes.errorbar, Axes.annotate

    def record(name: str, original: Any) -> Any:
        def call(axes: Axes, *args: Any, **options: Any) -> Any:
            drawn.setdefault(name, []).append((args, options))
            return original(axes, *args, **options)

        return call

    for name, original in (("step", step), ("errorbar", errorbar), ("annotate", annotate)):
        monkeypatch.setattr(Axes, name, record(name, original))
    now, better, unknown = [1.0, 1.0, 1.0], [1.5, 1.2, 2.0], [None, None, None]
    candidates = [{"progress": x, "per_second": x} for x in (now, [0.5, 0.4, 0.6], better, unknown)]
    event = {"event": "auto", "segments": 1, "strategy": "uniform", "candidates": candidates}
    lines: list[dict[str, Any]] = [{"step": s, "loss": 5 - s / 10} for s in range(1, 9)]
    lines += [{"event": "auto", "step": 1, "strategy": "fully_explored", "segments": 1}]  # of an earlier version
    lines += [{**event, "step": 2, "rate": 0.45}, {**event, "step": 4, "rate": 0.3, "candidates": []}]
    lines += [{**event, "step": 6, "rate": 0.3, "segments": 3, "candidates": [{"progress": now, "per_second": now}]}]
    (tmp_path / METRICS).write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    plot_loss(tmp_path / METRICS, tmp_path / "loss.png")
    ((at, rates), _) = drawn["step"][0]
    assert (at, rates) == ([2, 4, 6, 8], [0.45, 0.3, 0.3, 0.3])
    assert [args[0] for args, _ in drawn["annotate"]] == ["uniform", "uniform, 3 segments"]
    ((where, values), options) = drawn["errorbar"][0]
    assert (where, values) == ([2], [1.5])
    assert np.ravel(options["yerr"]) == pytest.approx([0.3, 0.5])


def test_plot_is_a_png_of_some_size(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": 5 - s / 10, **({"held_out_loss": 5.0} if s % 5 == 0 else {})} for s in range(1, 20)]
    (tmp_path / METRICS).write_text("".join(json.dumps(x) + "\n" for x in lines))
    plot_loss(tmp_path / METRICS, tmp_path / "loss.png")
    data = (tmp_path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 400
    assert height > 300
