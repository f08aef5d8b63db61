"""Plots can be read: sizes of letters, titles of axes, labels that do not overlap, nothing cut off."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from maskvr_ds.analysis.gradient_variance.report import best_of, draw, plot, table
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


def test_few_rows_are_named() -> None:
    report = json.loads((RESULTS / "variance/step_1500.json").read_text(encoding="utf-8"))
    report |= {"mapnet_of_oracle_head": {}}
    few = "with fewer than 32 rows, intervals of variances are too narrow"
    assert [few in table(report | {"sequences": rows}) for rows in (3, 31, 32, 64)] == [True, True, False, False]


def test_unknown_progress_is_explained_and_not_drawn() -> None:
    report = json.loads((RESULTS / "variance/step_1500.json").read_text(encoding="utf-8"))
    report |= {"mapnet_of_oracle_head": {}, "cost_unit": "FLOPs", "global_size": 32}
    known, unknown = [0.5, 0.4, 0.6], [None, None, None]
    names = list(report["strategies"])[:2]
    for name, rate, per_cost in zip(names, (0.15, 0.3), (known, unknown), strict=True):
        progress = {"value": known, "ratio": per_cost, "per_cost": per_cost}
        report["strategies"][name] |= {"rate": rate, "cost": 1.0, "progress": progress}
    assert "–: too few rows to tell the gradient from its noise; measure more --sequences" in table(report)
    assert not [axes for axes in draw(report).axes if "progress" in axes.get_ylabel()], "one rate is no curve"
    report["strategies"][names[1]]["progress"] = {"value": known, "ratio": known, "per_cost": known}
    assert "too few rows to tell" not in table(report)
    assert [axes for axes in draw(report).axes if "progress" in axes.get_ylabel()]


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


def progress_report() -> dict[str, Any]:
    """A report with uniform masks and spans at three rates."""
    figure = {"data": [1.0, 0.9, 1.1], "mask": [2.0, 1.8, 2.2], "total": [3.0, 2.9, 3.1], "mask_ratio": [1.0, 0.9, 1.1]}
    figure |= {"mask_over_data": [2.0, 1.9, 2.1], "total_ratio": [1.0, 0.9, 1.1]}
    strategies: dict[str, Any] = {}
    for strategy in ("uniform", "span:max_length=5"):
        for rate, value in ((0.15, 1.0), (0.3, 1.4), (0.45, 1.2)):
            per_cost = [value, value - 0.1, value + 0.1]
            strategies[f"{strategy}{',' if ':' in strategy else ':'}rate={rate:g}"] = {
                "layers": {"whole": figure, "head": figure},
                "rate": rate,
                "cost": 1.0,
                "passes": 4,
                "progress": {"value": [0.1, None, None], "ratio": per_cost, "per_cost": per_cost},
            }
    strategies["span:max_length=5,rate=0.45"]["progress"]["per_cost"] = [1.7, 1.5, 1.9]
    report = {"strategies": strategies, "global_size": 4096, "cost_unit": "FLOPs", "confidence": 0.95, "step": 3}
    return {**report, "sequences": 8, "masks": 4, "mapnet_of_oracle_head": {}, "peak_memory_bytes": 2**20}


def test_progress_by_rate_marks_the_best() -> None:
    report = progress_report()
    assert best_of(report) == "span:max_length=5,rate=0.45"
    figure = draw(report)
    check_legible(figure)
    axes = figure.axes[-1]
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert lines["best"].tolist() == [[0.45, 1.7]]
    assert lines["uniform"].tolist() == [[0.15, 1.0], [0.3, 1.4], [0.45, 1.2]]
    assert "batches of 4,096 sequences" in axes.get_xlabel()
    (line,) = [line for line in table(report).splitlines() if line.startswith("uniform:rate=0.3") and "1.4" in line]
    assert line.split()[1] == "0.3"
    for result in report["strategies"].values():
        result["progress"]["per_cost"] = [None, None, None]
    assert best_of(report) is None
