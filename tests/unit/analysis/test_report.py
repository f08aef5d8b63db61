"""Plots can be read: sizes of letters, titles of axes, labels that do not overlap, nothing cut off."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from maskvr_ds.analysis.gradient_variance.report import draw, plot
from maskvr_ds.benchmarks import compare
from maskvr_ds.telemetry.plots import plot_loss

RESULTS = Path(__file__).parents[3] / "docs/results"


def check_legible(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_shared_x_axes().get_siblings(axes)[-1] is not axes
        assert axes.get_ylabel()
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
            assert not [1 for one, other in pairwise(boxes) if one.overlaps(other)], axes.get_xlabel()
    width, height = canvas.get_width_height()
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            assert text.get_fontsize() >= 9, text.get_text()
            box = text.get_window_extent()
            # Ticks beyond the limits of an axis have labels that are not drawn.
            if text in [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]:
                continue
            assert -1 <= box.x0 <= box.x1 <= width + 1, text.get_text()
            assert -1 <= box.y0 <= box.y1 <= height + 1, text.get_text()


@pytest.mark.parametrize("name", ["variance/step_1500", "variance/step_1500_floor", "mapnet/step_2000"])
def test_variance(name: str, tmp_path: Path) -> None:
    report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    figure = draw(report)
    check_legible(figure)
    assert len(figure.axes) == 2 + ("hamming" in report)
    words = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
    assert "V_" not in words, "no symbols"
    plot(report, tmp_path / "variance.png")
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_comparison(saved: list[Figure], tmp_path: Path) -> None:
    compare.plot(json.loads((RESULTS / "four_settings/small_32.json").read_text(encoding="utf-8")), tmp_path / "c.png")
    check_legible(saved[0])


def test_loss(saved: list[Figure], tmp_path: Path) -> None:
    lines = [
        {"step": s, "loss": 5.0, "held_out_loss": 5.0, "trust_ratio_min": 0.1, "trust_ratio_median": 1.0}
        | {"trust_ratio_max": 2.0, "variance_ratio": 0.9, "effective_sample_size": 0.9, "proposal_entropy": 0.9}
        for s in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    check_legible(saved[0])
