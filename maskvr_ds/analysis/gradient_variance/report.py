"""Table and plot of the results of `maskvr variance`, both from the content of variance.json alone."""

from pathlib import Path
from typing import Any

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
    return "\n".join(text)


def wrapped_label(name: str) -> str:
    """A strategy's name with one setting per line, for labels in plots."""
    return name.replace(":", ":\n").replace(",", ",\n")


def plot(report: dict[str, Any], output: Path) -> None:
    """Plot data and mask variance by strategy, ratios by layer and, if measured, correlation by Hamming distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    strategies = report["strategies"]
    names = list(strategies)
    panels = 2 + ("hamming" in report)
    height = 1.6 + 0.32 * len(names)
    figure, all_axes = plt.subplots(
        panels, figsize=(8, height + 3.4 * (panels - 1)), dpi=120, height_ratios=[height] + [3.4] * (panels - 1)
    )
    axes = all_axes[0]
    overall = [strategies[name]["layers"]["whole"] for name in names]
    unit = overall[0]["total"][0]
    data = [s.get("segments", 1) * w["data"][0] / unit for s, w in zip(strategies.values(), overall, strict=True)]
    mask = [w["mask"][0] / unit for w in overall]
    places = range(len(names))
    axes.barh(places, data, label="data variance, J · V_d")
    axes.barh(places, mask, left=data, label="mask variance, V_m(J)")
    for place, w in zip(places, overall, strict=True):
        axes.plot(w["total_ratio"][1:], [place, place], color="black", linewidth=1.2)
    axes.axvline(1, color="grey", linestyle="--", linewidth=0.8)
    axes.set_yticks(places, [wrapped_label(name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"total gradient variance relative to uniform masks at equal compute, step {report['step']}")
    axes.legend(fontsize=8)
    axes = all_axes[1]
    for name in names[1:]:
        layers = {k: v for k, v in strategies[name]["layers"].items() if k != "whole"}
        if layers:
            axes.plot(
                list(layers),
                [v["total_ratio"][0] for v in layers.values()],
                marker="o",
                markersize=3,
                label=wrapped_label(name),
            )
    first = {k: v["mask_over_data"][0] for k, v in strategies[names[0]]["layers"].items() if k != "whole"}
    axes.axhline(1, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(first)), [f"{k}\n{_number(v)}" for k, v in first.items()], fontsize=7)
    axes.set_xlabel("layer (below: ratio of mask to data variance, uniform masks)")
    axes.set_ylabel("total variance\nrelative to uniform")
    if len(names) > 1:
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1))
    if "hamming" in report:
        axes = all_axes[2]
        distance = [x["distance"] for x in report["hamming"]]
        middle, low, high = zip(*(x["correlation"] for x in report["hamming"]), strict=True)
        axes.plot(distance, middle, marker="o", markersize=3)
        axes.fill_between(distance, low, high, alpha=0.25, linewidth=0)
        axes.axhline(0, color="grey", linestyle="--", linewidth=0.8)
        axes.set_xlabel("Hamming distance between two masks of a row")
        axes.set_ylabel("correlation of\ntheir gradients")
    for axes in all_axes:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)
