"""Plot of a run: loss curves, LAMB's trust ratios, masks chosen by auto, metrics of the mask proposal network."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from maskvr_ds.telemetry.metrics_file import (
    AUTO_EVENT,
    HELD_OUT_EVENT,
    PROPOSAL_FIGURES,
    TRUST_RATIO_FIGURES,
    read_events,
    read_lines,
)


def plot_loss(metrics: Path, output: Path) -> None:
    """Plot training and held-out loss over steps as a PNG, with panels for trust ratios, the choices of
    masking.strategy auto and MAPNet's metrics if logged.

    The unigram entropy of the held-out corpus is drawn with the held-out losses: a model that uses no context does not
    get below it behind [MASK].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_lines(metrics)
    steps = [x["step"] for x in lines]
    with_ratios = any(TRUST_RATIO_FIGURES[0] in x for x in lines)
    with_proposal = any(PROPOSAL_FIGURES[0] in x for x in lines)
    events = read_events(metrics)
    # Measurements of earlier versions have no rate.
    choices = [x for x in events if x["event"] == AUTO_EVENT and "rate" in x]
    rows = 1 + with_ratios + bool(choices) + with_proposal
    figure, panels = plt.subplots(rows, figsize=(7, 2 + 2.2 * rows), dpi=120, sharex=True, squeeze=False)
    axes = panels[0, 0]
    axes.plot(steps, _column(lines, "loss"), linewidth=0.8, alpha=0.7, label="training")
    at_start = [x for x in events if x["event"] == HELD_OUT_EVENT]
    held_out = [x for x in (*at_start, *lines) if "held_out_loss" in x]
    if held_out:
        at = [x["step"] for x in held_out]
        axes.plot(at, _column(held_out, "held_out_loss"), marker="o", markersize=3, label="held-out")
        behind_mask = _column(held_out, "held_out_loss_mask")
        if not all(map(math.isnan, behind_mask)):
            axes.plot(at, behind_mask, linewidth=0.9, label="held-out, behind [MASK]")
        # Changes where a phase has another held-out corpus.
        entropy = _column(held_out, "held_out_unigram_entropy")
        if not all(map(math.isnan, entropy)):
            axes.plot(at, entropy, color="grey", linestyle="--", linewidth=0.8, label="held-out unigram entropy")
    for before, after in pairwise(lines):
        if after.get("phase") != before.get("phase"):
            axes.axvline(before["step"], color="grey", linestyle=":", linewidth=1)
            top = axes.get_xaxis_transform()  # y in axes coordinates
            axes.text(before["step"], 0.98, f" {after['phase']}", transform=top, va="top", fontsize=9, color="grey")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the start of the curves
    axes.set_ylabel("loss per masked token (nats)")
    if with_ratios:
        axes = panels[1, 0]
        lowest, median, highest = (_column(lines, key) for key in TRUST_RATIO_FIGURES)
        axes.fill_between(steps, lowest, highest, alpha=0.25, linewidth=0, label="minimum to maximum over tensors")
        axes.plot(steps, median, linewidth=0.8, label="median over tensors")
        axes.set_yscale("log")
        # Room for the legend.
        axes.margins(y=0.12)
        axes.set_ylabel("LAMB's trust ratio:\nnorm of weights ÷ of update")
    if choices:
        _plot_choices(panels[1 + with_ratios, 0], choices, steps[-1] if steps else choices[-1]["step"])
    if with_proposal:
        axes = panels[-1, 0]
        for key in PROPOSAL_FIGURES:
            axes.plot(steps, _column(lines, key), linewidth=0.8, alpha=0.8, label=key.replace("_", " "))
        axes.set_ylabel("masks by MAPNet,\nuniform masks = 1")
    axes.set_xlabel("optimizer step")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        # Above the curves, which fill the lower panels.
        axes.legend(loc="upper right", ncols=3, fontsize=9, framealpha=0.9)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)


def _plot_choices(axes: Any, choices: list[dict[str, Any]], last_step: int) -> None:
    """Rate after every measurement, masks where they change, and the best other plan's progress per second relative to
    that of the plan in use."""
    at = [x["step"] for x in choices]
    rates = [x["rate"] for x in choices]
    axes.step([*at, max(last_step, at[-1])], [*rates, rates[-1]], where="post", linewidth=1.2, label="rate")
    for before, event in zip((None, *choices), choices, strict=False):
        plan = _kind(event)
        if before is None or plan != _kind(before):
            name = plan[0] if plan[1] == 1 else f"{plan[0]}, {plan[1]} segments"
            name += f", [MASK] from layer {plan[2]}" if plan[2] else ""
            axes.annotate(name, (event["step"], event["rate"]), xytext=(3, 4), textcoords="offset points", fontsize=8)
    axes.set_ylim(0, 1.4 * max(rates))
    axes.set_ylabel("share of tokens\npredicted (auto)")
    compared = [(x["step"], best) for x in choices if (best := _best_other(x)) is not None]
    other = axes.twinx()
    if compared:
        values, lows, highs = map(list, zip(*(best for _, best in compared), strict=True))
        below = [0.0 if low is None else max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
        above = [0.0 if high is None else max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
        steps = [step for step, _ in compared]
        options = {"fmt": ".", "color": "C1", "linewidth": 0.8, "markersize": 5}
        bars = other.errorbar(steps, values, yerr=[below, above], **options)
        axes.plot([], [], ".", color=bars[0].get_color(), label="best other plan, progress per second")
    other.axhline(1, color="grey", linestyle=":", linewidth=0.8)
    other.set_ylim(0, 2)  # outliers among estimates on few rows would hide the others
    other.set_ylabel("relative to\nthe plan in use")


def _kind(event: dict[str, Any]) -> tuple[str, int, int]:
    """Strategy, segments of a row per batch, layer at which [MASK] enters."""
    return event["strategy"], event["segments"], event.get("late_layer", 0)


def _best_other(event: dict[str, Any]) -> list[Any] | None:
    """[estimate, low, high] of progress per second of the best plan other than the one in use; None if unknown."""
    others = [x["per_second"] for x in event.get("candidates", ()) if x["progress"] != [1.0, 1.0, 1.0]]
    known = [x for x in others if x[0] is not None]
    return max(known, key=lambda x: x[0]) if known else None


def _column(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Values of `key` in all lines; NaN if null or missing."""
    return [math.nan if x.get(key) is None else x[key] for x in lines]
