"""A plan as text, and its efficiency over numbers of GPUs as a picture. matplotlib is imported for the picture only."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from maskvr_ds.planning.hardware import LINK_SHARE
from maskvr_ds.planning.memory import Memory
from maskvr_ds.planning.plan import SCALES, PhasePlan, Plan

_LABEL = 14
# A smaller share of padding is rounding: the last row of a corpus.
_NO_PADDING = 0.005


def text(plan: Plan, *, source: str, measured: Sequence[str], corpora: str = "") -> str:
    """The plan for a terminal. source: the configuration; measured: files that it was calibrated with; corpora: where
    the sizes of rows and vocabulary are from."""
    cluster = plan.cluster
    link = "" if cluster.link is None else f", {cluster.link * 8 / 1e9:,.0f} Gbit/s per node"
    total = sum(plan.parameters.values())
    groups = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in plan.parameters.items())
    factors = asdict(plan.calibration)
    basis = (
        f"{', '.join(measured)}: " + ", ".join(f"{name} × {value:.2f}" for name, value in factors.items())
        if measured
        else "none: expect errors of a third in time and 15% in memory; calibrate with --measured"
    )
    lines = [
        _line("run", f"{source}, {plan.deepspeed} (ZeRO stage {plan.stage})"),
        _line("cluster", f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}{link}"),
        *([_line("corpora", corpora)] if corpora else []),
        _line("parameters", f"{total / 1e6:.1f} million ({groups})"),
        _line("calibration", basis),
    ]
    for phase in plan.phases:
        lines += ["", *_phase(plan, phase)]
    lines += ["", _line("total", f"{_duration(plan.days)}, {plan.kilowatt_hours:,.1f} kWh of the GPUs alone")]
    return "\n".join(lines)


def _line(label: str, value: str) -> str:
    return f"{label:{_LABEL}}{value}"


def _duration(days: float) -> str:
    for unit, of_a_day, least in (("days", 1, 2.0), ("hours", 24, 1.0), ("minutes", 1440, 1.0)):
        if days * of_a_day >= least:
            return f"{days * of_a_day:,.1f} {unit}"
    return f"{days * 86400:,.1f} seconds"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}"


def _parts(found: Memory) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in asdict(found).items())


def _phase(plan: Plan, phase: PhasePlan) -> list[str]:
    step, milliseconds = phase.step, {name: 1e3 * value for name, value in asdict(phase.step).items()}
    parts = ", ".join(f"{name.replace('_', ' + ')} {value:,.1f}" for name, value in milliseconds.items())
    name = f"phase {phase.name}: " if phase.name else ""
    wire = ", ".join(f"{what} {_gb(size)}" for what, size in phase.wire.items() if size >= 1e6) or "none"
    return [
        f"{name}{phase.steps:,} steps of {phase.global_size:,} sequences of {phase.sequence_length} tokens, "
        f"{_predictions(phase)} predictions each",
        _line("micro-batch", f"{phase.micro} × accumulation {phase.accumulation}, the largest that fits"),
        _line("", _configured(phase, plan.usable_memory)),
        _line("memory", f"{_gb(phase.memory.total)} of {_gb(plan.usable_memory)} GB: {_parts(phase.memory)}"),
        *([_line("rows", rows)] if (rows := _rows(phase)) else []),
        _line("step", f"{1e3 * step.total:,.1f} ms: {parts}"),
        _line("on the wire", f"GB per GPU and step: {wire}"),
        _line(
            "speed",
            f"{phase.tokens_per_second:,.0f} tokens/s, {phase.model_tflops:,.0f} TFLOP/s per GPU "
            f"({phase.of_peak:.0%} of its data sheet)",
        ),
        _line("time", _duration(phase.days)),
        "",
        *_stages(plan, phase),
        "",
        *_scales(phase),
    ]


def _predictions(phase: PhasePlan) -> str:
    most, last = phase.predictions, phase.last_predictions
    return f"{most}" if most == last else f"up to {most}, at the end {last}"


def _rows(phase: PhasePlan) -> str:
    """Padding, and attention within documents; empty for full rows with attention over rows."""
    found = []
    if phase.padding is None:
        found.append("taken to be full: sizes of the command line, not of the corpus")
    elif phase.padding >= _NO_PADDING:
        real = phase.tokens_per_second * (1 - phase.padding)
        found.append(
            f"{phase.padding:.0%} of the positions are padding, which costs what tokens cost; "
            f"{real:,.0f} tokens/s without it"
        )
    if phase.attention == "documents":
        found.append(f"attention within documents, {_pairs(phase)}")
    return "; ".join(found)


def _pairs(phase: PhasePlan) -> str:
    if phase.pairs_share is None:
        return "whose lengths only the corpus knows: counted over complete rows, which takes longer"
    share = f"{phase.pairs_share:.1%} of the pairs of positions"
    if phase.computed_share == 1:
        return f"{share}, in fp32 computed over complete rows"
    return f"{share}, by Flash Attention"


def _configured(phase: PhasePlan, usable: float) -> str:
    found = f"configured: batch.micro_size {phase.configured_micro}, {_gb(phase.configured_memory.total)} GB"
    if phase.configured_memory.total > usable:
        return f"{found}: does not fit"
    if phase.configured_seconds is None:
        return f"{found}: the GPUs cannot share the global batch"
    return f"{found}, {1e3 * phase.configured_seconds:,.1f} ms per step"


def _stages(plan: Plan, phase: PhasePlan) -> list[str]:
    head = (
        f"{'GB per GPU':14}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'buffers':>9}{'sum':>8}"
    )
    lines = [f"{head}  largest micro-batch"]
    for stage, again, found, micro in phase.stages:
        cells = zip(asdict(found).values(), (10, 11, 11, 13, 9), strict=True)
        row = "".join(f"{_gb(size):>{width}}" for size, width in cells)
        label = f"ZeRO {stage}{' + ckpt' if again else ''}"
        lines.append(f"{label:14}{row}{_gb(found.total):>8}  {micro or 'does not fit'}")
    return lines


def _scales(phase: PhasePlan) -> list[str]:
    lines = [f"{'GPUs':>6}{'micro-batch':>13}{'accumulation':>14}{'ms per step':>13}{'tokens/s':>14}{'efficiency':>12}"]
    for gpus, scale in zip(SCALES, phase.scales, strict=True):
        if scale is None:
            lines.append(f"{gpus:>6}{'–':>13}")
            continue
        lines.append(
            f"{gpus:>6}{scale.micro:>13}{scale.accumulation:>14}{1e3 * scale.step_seconds:>13,.1f}"
            f"{scale.tokens_per_second:>14,.0f}{scale.efficiency:>12.0%}"
        )
    lines.append("    efficiency: tokens/s per GPU, relative to one GPU alone")
    if None in phase.scales:
        lines.append("    –: the GPUs cannot share the global batch, the model does not fit, or --link is not given")
    return lines


def plot(plan: Plan, output: Path) -> None:
    """Efficiency over the number of GPUs, a line per phase, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120)
    for phase in plan.phases:
        points = [scale for scale in phase.scales if scale]
        label = f"{phase.name or 'run'}: L = {phase.sequence_length}, {phase.global_size:,} sequences"
        axes.plot([p.gpus for p in points], [100 * p.efficiency for p in points], "o-", linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SCALES, [str(gpus) for gpus in SCALES])
    axes.set_ylim(0, 105)
    axes.set_xlabel(f"GPUs ({plan.cluster.gpu.name}, {plan.cluster.gpus_per_node} per node)")
    axes.set_ylabel("efficiency relative to one GPU [%]")
    if plan.cluster.link is not None:
        axes.set_title(f"{plan.cluster.link * 8 / 1e9:,.0f} Gbit/s per node, {LINK_SHARE:.0%} of it used", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)
