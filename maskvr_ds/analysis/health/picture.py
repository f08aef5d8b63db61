"""Picture of a run's records with the steps of its findings marked. matplotlib is imported when it draws; no torch."""

from collections.abc import Sequence
from pathlib import Path

from maskvr_ds.analysis.health.checks import Finding
from maskvr_ds.analysis.health.records import Records, column, step_numbers
from maskvr_ds.telemetry.metrics_file import TRUST_RATIO_FIGURES

# Key of metrics.jsonl, title of the axis, whether its axis is logarithmic, checks that are marked in it.
_PANELS = (
    (
        "loss",
        "loss per masked\ntoken (nats)",
        False,
        ("loss is finite", "loss at the start", "loss spikes", "loss level"),
    ),
    ("grad_norm", "gradient norm\nbefore clipping", True, ("gradient norm trend", "gradient norm spikes")),
    ("lr", "learning rate", False, ("relative step size", "updates held back")),
    (TRUST_RATIO_FIGURES[1], "median trust ratio", True, ("trust ratios at a bound",)),
    ("loss_scale", "fp16 loss scale", True, ("fp16 loss scale",)),
    ("tokens_per_second", "tokens per second", False, ("throughput dips",)),
)
_MARKED = 20


def draw(records: Records, findings: Sequence[Finding], output: Path) -> None:
    """Write a PNG with one panel per recorded series; steps of findings as red lines, at most 20 per check."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = step_numbers(records.lines)
    panels = [panel for panel in _PANELS if any(line.get(panel[0]) is not None for line in records.lines)]
    figure, grid = plt.subplots(
        len(panels), figsize=(8, 1 + 1.8 * len(panels)), dpi=120, sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (key, title, logarithmic, checks) in zip(grid[:, 0], panels, strict=True):
        axes.plot(steps, column(records.lines, key), linewidth=0.8)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        for finding in findings:
            if finding.check not in checks or finding.status != "finding":
                continue
            for number, step in enumerate(finding.steps[:_MARKED]):
                label = finding.check if number == 0 else None
                axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6, label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right")
    grid[-1, 0].set_xlabel("optimizer step")
    figure.suptitle(str(records.folder))
    figure.savefig(output)
    plt.close(figure)
