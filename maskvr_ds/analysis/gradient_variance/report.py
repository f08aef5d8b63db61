"""Table and plot of the results of `maskvr variance`, both from the content of variance.json alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONT_SIZE = 10
# Rows below which bootstrap intervals are much too narrow: with gradients that differ in scale, 95% intervals contain
# the truth in 65 to 88% of samples of 5 rows, 78 to 95% of 16, 90 to 97% of 32.
_FEW_ROWS = 32
_HEAD = ("strategy", "J", "data", "mask", "mask/data", "mask ÷ uniform", "total ÷ uniform at equal compute")


def _interval(value: list[float | None]) -> str:
    return f"{_number(value[0])} [{_number(value[1])}, {_number(value[2])}]"


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def table(report: dict[str, Any]) -> str:
    """Results for the full gradient, one line per strategy."""
    lines = [_HEAD]
    for name, result in report["strategies"].items():
        overall = result["layers"]["whole"]
        cells = [_interval(overall[key]) for key in ("data", "mask", "mask_over_data", "mask_ratio", "total_ratio")]
        lines.append((name, str(result.get("segments", 1)), *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += ["", *_progress_table(report)] if _with_progress(report) else []
    results = report["strategies"].values()
    passes = sum(result.get("passes", 0) + result.get("oracle_passes", 0) for result in results)
    passes += report.get("hamming_rounds", 0) * report["sequences"] * 8
    for floor, share in report["mapnet_of_oracle_head"].items():
        text.append(f"mapnet at floor {floor}: {_interval(share)} of oracle_head's reduction of the total variance")
    text.append(
        f"step {report['step']}, {report['sequences']} rows × {report['masks']} draws, {report['confidence']:.0%} "
        f"confidence intervals over rows; {passes:,} forward and backward passes of one row, peak memory "
        f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB per rank"
    )
    if report["sequences"] < _FEW_ROWS:
        text.append(
            f"with fewer than {_FEW_ROWS} rows, intervals of variances are too narrow; set --sequences to at least that"
        )
    return "\n".join(text)


def _with_progress(report: dict[str, Any]) -> dict[str, Any]:
    return {name: result for name, result in report["strategies"].items() if "progress" in result}


def _progress_table(report: dict[str, Any]) -> list[str]:
    """Progress of a step towards uniform masks at the held-out rate, one line per strategy."""
    unit = report["cost_unit"]
    lines = [
        ("strategy", "rate", "progress of a step", "÷ uniform", f"{unit} ÷ uniform", f"progress per {unit} ÷ uniform")
    ]
    for name, result in _with_progress(report).items():
        found = result["progress"]
        # Without an interval the value is noise, too, and may be above 1.
        cells = (found[key] for key in ("value", "ratio", "per_cost"))
        value, ratio, per_cost = ("–" if None in cell else _interval(cell) for cell in cells)
        lines.append((name, f"{result['rate']:g}", value, ratio, _number(result["cost"]), per_cost))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append(f"batches of {report['global_size']:,} sequences; goal: uniform masks at the held-out rate")
    if any(None in result["progress"][key] for result in _with_progress(report).values() for key in ("value", "ratio")):
        text.append("–: too few rows to tell the gradient from its noise; measure more --sequences")
    return text


def best_of(report: dict[str, Any]) -> str | None:
    """The strategy with the most progress per cost; None if it is not known of any."""
    values = {name: result["progress"]["per_cost"][0] for name, result in _with_progress(report).items()}
    known = {name: value for name, value in values.items() if value is not None}
    return max(known, key=lambda name: known[name]) if known else None


def wrapped_label(name: str) -> str:
    """A strategy's name with one setting per line, for labels in plots."""
    return name.replace(":", ":\n").replace(",", ",\n")


def plot(report: dict[str, Any], output: Path) -> None:
    """Write `draw(report)` as a PNG."""
    draw(report).savefig(output)


def draw(report: dict[str, Any]) -> "Figure":
    """Variance by strategy and by layer and, if measured, correlation of gradients by Hamming distance of the masks."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(report["strategies"])
    rows = sum(max(2, 1 + len(wrapped_label(name).splitlines())) for name in names)
    progress = _with_progress(report).values()
    several_rates = len({result["rate"] for result in progress if None not in result["progress"]["per_cost"]}) > 1
    heights = [1.6 + 0.2 * rows, max(4.0, 1.0 + 0.21 * rows)] + [3.6] * (("hamming" in report) + several_rates)
    with rc_context({"font.size": _FONT_SIZE, "legend.fontsize": _FONT_SIZE}):
        figure = Figure(figsize=(11, sum(heights)), dpi=120, layout="constrained")
        panels = figure.subplots(len(heights), height_ratios=heights)
        _draw_totals(panels[0], report)
        _draw_layers(panels[1], report)
        if "hamming" in report:
            _draw_correlations(panels[2], report["hamming"])
        if several_rates:
            _draw_progress(panels[-1], report)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def _draw_totals(axes: Any, report: dict[str, Any]) -> None:
    strategies = report["strategies"]
    overall = [result["layers"]["whole"] for result in strategies.values()]
    unit = overall[0]["total"][0]
    # Per J rows, as one forward pass of J segments: J · V_d + V_m(J).
    data = [s.get("segments", 1) * w["data"][0] / unit for s, w in zip(strategies.values(), overall, strict=True)]
    mask = [w["mask"][0] / unit for w in overall]
    places = range(len(overall))
    axes.barh(places, data, label="from the choice of rows")
    axes.barh(places, mask, left=data, label="from the choice of masks")
    for place, w in zip(places, overall, strict=True):
        label = f"{report['confidence']:.0%} confidence interval of the total" if place == 0 else None
        axes.plot(w["total_ratio"][1:], [place, place], color="black", linewidth=1.6, label=label)
    axes.axvline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(places, [wrapped_label(name) for name in strategies])
    axes.invert_yaxis()
    axes.set_ylabel("masking strategy")
    axes.set_xlabel(f"variance of the gradient at equal compute, uniform masks = 1 (step {report['step']:,})")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _draw_layers(axes: Any, report: dict[str, Any]) -> None:
    names = list(report["strategies"])
    for name in names[1:]:
        layers = {k: v for k, v in report["strategies"][name]["layers"].items() if k != "whole"}
        if layers:
            ratios = [v["total_ratio"][0] for v in layers.values()]
            axes.plot(range(len(ratios)), ratios, marker="o", markersize=4, label=wrapped_label(name))
    first = {k: v["mask_over_data"][0] for k, v in report["strategies"][names[0]]["layers"].items() if k != "whole"}
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(first)), [f"{k}\n{_number(v)}" for k, v in first.items()])
    axes.set_xlabel("part of the model; below it variance from masks ÷ variance from rows, uniform masks")
    axes.set_ylabel("variance of the gradient,\nuniform masks = 1")
    if len(names) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def _draw_progress(axes: Any, report: dict[str, Any]) -> None:
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    for name, result in _with_progress(report).items():
        value = result["progress"]["per_cost"]
        if None not in value:
            strategy, _, settings = name.partition(":")
            kept = ",".join(s for s in settings.split(",") if s and not s.startswith("rate="))
            curves.setdefault(f"{strategy}:{kept}" if kept else strategy, []).append((result["rate"], value))
    for name, points in curves.items():
        points.sort()
        rates, (middle, low, high) = [rate for rate, _ in points], zip(*(value for _, value in points), strict=True)
        axes.plot(rates, middle, marker="o", markersize=4, label=wrapped_label(name))
        axes.fill_between(rates, low, high, alpha=0.2, linewidth=0)
    if (best := best_of(report)) is not None:
        result = report["strategies"][best]
        place = (result["rate"], result["progress"]["per_cost"][0])
        axes.plot(*place, marker="*", markersize=14, color="black", linestyle="none", label="best")
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel(f"masking rate (batches of {report['global_size']:,} sequences)")
    axes.set_ylabel(f"progress per {report['cost_unit']},\nuniform masks of the run = 1")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def _draw_correlations(axes: Any, hamming: list[dict[str, Any]]) -> None:
    distance = [x["distance"] for x in hamming]
    middle, low, high = zip(*(x["correlation"] for x in hamming), strict=True)
    axes.plot(distance, middle, marker="o", markersize=4, label="mean")
    axes.fill_between(distance, low, high, alpha=0.25, linewidth=0, label="confidence interval")
    axes.axhline(0, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel("tokens in which two masks of a row differ (Hamming distance)")
    axes.set_ylabel("correlation of\ntheir gradients")
    axes.legend()
