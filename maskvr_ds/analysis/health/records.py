"""Findings over a run's records: metrics.jsonl, trust_ratios.jsonl, config.yaml, launches.jsonl. Loads no torch.

Losses, gradient norms and speeds are judged within each phase: another corpus, length or learning rate is no spike.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from maskvr_ds.analysis.health.checks import CHECKS, Finding, Status
from maskvr_ds.analysis.health.series import Floats, growth, levels, noise, runs, trailing
from maskvr_ds.config import ConfigError, RunConfig, load_config
from maskvr_ds.run_folder.launches import read_launches
from maskvr_ds.run_folder.layout import CONFIG, METRICS, TRUST_RATIOS
from maskvr_ds.telemetry.metrics_file import TRUST_RATIO_FIGURES, read_events, read_lines

Line = dict[str, Any]
# Relative difference at which a trust ratio, stored in fp32, counts as being at a bound.
_AT_BOUND = 1e-5
_SHOWN = 3


@dataclass(frozen=True)
class Records:
    """What a run has written. lines: of steps. ratios: of trust_ratios.jsonl. config: None if it cannot be read.
    launches: see run_folder/launches.py."""

    folder: Path
    lines: list[Line]
    events: list[Line]
    ratios: list[Line]
    config: RunConfig | None
    launches: list[Line]

    def phases(self) -> Iterator[list[Line]]:
        """Lines of each phase, in order."""
        for _, lines in groupby(self.lines, key=lambda line: line.get("phase")):
            yield list(lines)

    @property
    def vocabulary(self) -> int | None:
        """Tokens of the corpus' vocabulary; None if no launch says."""
        counts = [corpus.get("vocab_size") for launch in self.launches for corpus in launch["corpora"]]
        return counts[-1] if counts else None


def read_records(folder: Path) -> Records:
    """Raises ValueError if the folder is no run, or has no step in its metrics."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a run folder")
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder}: contains no {METRICS}; expected a run folder")
    lines = read_lines(folder / METRICS)
    if not lines:
        raise ValueError(f"{folder / METRICS}: has no step yet; judge the run after its first steps")
    try:
        config = load_config(folder / CONFIG) if (folder / CONFIG).is_file() else None
    except (ConfigError, OSError):
        config = None
    return Records(
        folder=folder,
        lines=lines,
        events=read_events(folder / METRICS),
        ratios=read_lines(folder / TRUST_RATIOS),
        config=config,
        launches=read_launches(folder),
    )


def judge(records: Records) -> list[Finding]:
    """One answer per check of a run's records, in the order of CHECKS."""
    return [check(records) for check in _CHECKS]


def column(lines: list[Line], key: str) -> Floats:
    """Values of `key`, float64 [n]; NaN if null or missing."""
    return np.array([math.nan if (value := line.get(key)) is None else float(value) for line in lines])


def step_numbers(lines: list[Line]) -> np.ndarray:
    return np.array([line["step"] for line in lines], dtype=np.int64)


def _limits(name: str) -> dict[str, float]:
    return dict(CHECKS[name].thresholds)


def _listed(steps: list[int]) -> str:
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    return ", ".join(f"{step:,}" for step in steps[:_SHOWN]) + more


def _finite(records: Records) -> Finding:
    name = "loss is finite"
    bad = [line["step"] for line in records.lines if line.get("loss") is None]
    if bad:
        return Finding(name, "finding", f"not finite at step {_listed(bad)}", tuple(bad), {"count": len(bad)})
    return Finding(name, "ok", f"{len(records.lines):,} steps")


def _start(records: Records) -> Finding:
    name = "loss at the start"
    limits = _limits(name)
    first = [line for line in records.lines if line["step"] <= limits["first_steps"]]
    losses = column(first, "loss")
    if not len(losses) or not np.isfinite(losses[0]):
        return Finding(name, "not judged", "the first steps are not recorded")
    if (vocabulary := records.vocabulary) is None:
        return Finding(name, "not judged", "the size of the vocabulary is not recorded (launches.jsonl)")
    uniform = math.log(vocabulary)
    values = {"loss": float(losses[0]), "ln_vocabulary": uniform}
    text = f"{losses[0]:.2f} nats at step {first[0]['step']}, ln V is {uniform:.2f}"
    if losses[0] - uniform > limits["above_ln_vocabulary"]:
        return Finding(name, "finding", text, (first[0]["step"],), values)
    return Finding(name, "ok", text, values=values)


def _step_size(records: Records) -> Finding:
    name = "relative step size"
    if (config := records.config) is None:
        return Finding(name, "not judged", f"no {CONFIG} that can be read")
    rates = column(records.lines, "lr")
    if np.isnan(rates).all():
        return Finding(name, "not judged", "no learning rates are recorded")
    at, model = int(np.nanargmax(rates)), config.model
    scale = (
        1.0
        if config.optimizer.name == "lamb"
        else float(model.merged.get("initializer_range", model.initializer_range))
    )
    size = float(rates[at] / scale)
    step = records.lines[at]["step"]
    text = f"at most {size:.2g} of the weights per step (lr {rates[at]:.3g} at step {step:,}, {config.optimizer.name})"
    status: Status = "finding" if size > _limits(name)["maximum"] else "ok"
    return Finding(name, status, text, (step,) if status == "finding" else (), {"relative_step": size})


def _spikes(records: Records) -> Finding:
    name = "loss spikes"
    limits = _limits(name)
    found: list[dict[str, Any]] = []
    judged = 0
    for lines in records.phases():
        losses, steps = column(lines, "loss"), step_numbers(lines)
        medians, _ = trailing(losses, int(limits["fewest"]), int(limits["fewest"]))
        deviations = trailing(losses, int(limits["window"]), int(limits["fewest"]))[1]
        excess = losses - medians
        high = excess > np.maximum(limits["deviations"] * deviations, limits["relative"] * np.abs(medians))
        judged += int(np.isfinite(medians).sum())
        for first, last in runs(high, gap=5):
            peak = first + int(np.nanargmax(losses[first : last + 1]))
            after = losses[last + 1 : last + 1 + int(limits["window"])]
            found.append(
                {
                    "peak_step": int(steps[peak]),
                    "first_step": int(steps[first]),
                    "last_step": int(steps[last]),
                    "loss": float(losses[peak]),
                    "median": float(medians[peak]),
                    "recovered": bool(len(after) and np.nanmin(after) <= medians[first] + 3 * deviations[first]),
                }
            )
    if not judged:
        return Finding(name, "not judged", f"fewer than {limits['fewest']:g} steps")
    if not found:
        return Finding(name, "ok", f"none in {judged:,} steps")
    shown = "; ".join(
        f"step {spike['first_step']:,}: {spike['loss']:.3f} after {spike['median']:.3f}"
        + ("" if spike["recovered"] else ", not recovered")
        for spike in found[:_SHOWN]
    )
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return Finding(name, "finding", shown + more, tuple(s["first_step"] for s in found), {"spikes": found})


def _level(records: Records) -> Finding:
    name = "loss level"
    limits = _limits(name)
    lines = list(records.phases())[-1]
    lines = [line for line in lines if line.get("loss") is not None]
    losses, steps = column(lines, "loss"), step_numbers(lines)
    window = max(int(limits["window"]), int(limits["window_share"] * len(losses)))
    if len(losses) < 2 * window:
        return Finding(name, "not judged", f"fewer than {2 * window} steps in the last phase")
    medians = levels(losses, window)
    lowest = int(np.argmin(medians))
    rise, best = float(medians[-1] - medians[lowest]), float(medians[lowest])
    error = 1.25 * noise(losses) / math.sqrt(window)  # of a median of normal values
    at = int(steps[lowest + window - 1])
    values = {"last": float(medians[-1]), "lowest": best, "lowest_step": at}
    text = f"{medians[-1]:.3f} nats at the end, {best:.3f} at step {at:,}"
    if rise > max(limits["relative"] * best, limits["standard_errors"] * error):
        return Finding(name, "finding", text, (at,), values)
    return Finding(name, "ok", text, values=values)


def _context(records: Records) -> Finding:
    name = "context is used"
    limits = _limits(name)
    held_out = [x for x in records.lines if None not in map(x.get, ("held_out_loss", "held_out_unigram_entropy"))]
    if not held_out:
        return Finding(name, "not judged", "no held-out loss with an entropy is recorded")
    last = held_out[-1]
    # Over all predictions a model may gain by copying the tokens that are left as they are. Earlier versions lack it.
    behind_mask = last.get("held_out_loss_mask")
    loss, where = (last["held_out_loss"], "") if behind_mask is None else (behind_mask, " behind [MASK]")
    step, entropy = last["step"], last["held_out_unigram_entropy"]
    gain = entropy - loss
    text = (
        f"held-out {loss:.3f} nats{where} at step {step:,}, unigram entropy {entropy:.3f}; should be at least "
        f"{limits['below_entropy']:g} below it"
    )
    if step < limits["fewest_steps"]:
        return Finding(name, "not judged", f"{text}; fewer than {limits['fewest_steps']:g} steps")
    status: Status = "finding" if gain < limits["below_entropy"] else "ok"
    return Finding(name, status, text, (step,) if status == "finding" else (), {"below_entropy": gain})


def _trend(records: Records) -> Finding:
    name = "gradient norm trend"
    limits = _limits(name)
    lines = [line for line in list(records.phases())[-1] if line.get("grad_norm") is not None]
    norms = column(lines, "grad_norm")
    if len(norms) < limits["fewest_steps"]:
        return Finding(name, "not judged", f"fewer than {limits['fewest_steps']:g} finite norms in the last phase")
    half = norms[len(norms) // 2 :]
    decades = growth(half)
    last, most = float(np.median(half[-len(half) // 5 :])), float(np.max(levels(norms, 20)))
    values = {"decades": None if math.isnan(decades) else decades, "last": last, "highest_level": most}
    steps = (lines[len(norms) // 2]["step"], lines[-1]["step"])
    if decades > limits["decades"]:
        text = f"grows {10**decades:,.3g}-fold from step {steps[0]:,} to {steps[1]:,}"
        return Finding(name, "finding", text, steps, values)
    if last <= limits["vanished"] * most:
        return Finding(name, "finding", f"vanishes: {last:.3g} at the end, {most:.3g} before", steps, values)
    text = f"× {10**decades:.2g} over the second half, {last:.3g} at the end" if values["decades"] is not None else "0"
    return Finding(name, "ok", text, values=values)


def _norm_spikes(records: Records) -> Finding:
    name = "gradient norm spikes"
    limits = _limits(name)
    found, judged = [], 0
    for lines in records.phases():
        norms, steps = column(lines, "grad_norm"), step_numbers(lines)
        medians, _ = trailing(norms, int(limits["window"]), int(limits["fewest"]))
        judged += int(np.isfinite(medians).sum())
        found += steps[norms > limits["factor"] * medians].tolist()
    if not judged:
        return Finding(name, "not judged", f"fewer than {limits['fewest']:g} finite norms")
    if found:
        text = f"more than {limits['factor']:g} × the median at step {_listed(found)}"
        return Finding(name, "finding", text, tuple(found), {"count": len(found)})
    return Finding(name, "ok", f"none in {judged:,} steps")


def _bounds(records: Records) -> Finding:
    name = "trust ratios at a bound"
    if (config := records.config) is None:
        return Finding(name, "not judged", f"no {CONFIG} that can be read")
    if config.optimizer.name != "lamb":
        return Finding(name, "not judged", f"{config.optimizer.name} has no trust ratios")
    variant = config.optimizer.lamb_variant()
    bounds = [bound for bound in (variant.min_ratio, variant.max_ratio) if bound not in (0.0, math.inf)]
    if not bounds:
        return Finding(name, "ok", f"variant {config.optimizer.variant} has no bounds")
    second_half = records.lines[len(records.lines) // 2]["step"]
    counts: dict[str, list[bool]] = {}
    for line in records.ratios:
        if line["step"] < second_half or not isinstance(line.get("trust_ratios"), dict):
            continue
        for tensor, ratio in line["trust_ratios"].items():
            if ratio is not None and ratio != 1:  # 1: not adapted
                at = any(abs(ratio - bound) <= _AT_BOUND * bound for bound in bounds)
                counts.setdefault(tensor, []).append(at)
    if not counts:
        return _extremes_at_bounds(records, bounds)
    share = float(np.mean([flag for flags in counts.values() for flag in flags]))
    stuck = sorted(tensor for tensor, flags in counts.items() if np.mean(flags) > 0.5)
    text = f"{share:.0%} of ratios at {' or '.join(f'{b:g}' for b in bounds)} since step {second_half:,}"
    if share > _limits(name)["share"]:
        text += f" ({', '.join(stuck[:_SHOWN])}{' …' if len(stuck) > _SHOWN else ''})" if stuck else ""
        return Finding(name, "finding", text, (second_half,), {"share": share, "tensors": stuck})
    return Finding(name, "ok", text, values={"share": share})


def _extremes_at_bounds(records: Records, bounds: list[float]) -> Finding:
    """From the extremes in metrics.jsonl, if no ratios by tensor are stored."""
    name = "trust ratios at a bound"
    lines = [line for line in records.lines[len(records.lines) // 2 :] if line.get(TRUST_RATIO_FIGURES[1]) is not None]
    if not lines:
        return Finding(name, "not judged", "no trust ratios are recorded")
    medians = column(lines, TRUST_RATIO_FIGURES[1])
    at = np.any([np.abs(medians - bound) <= _AT_BOUND * bound for bound in bounds], axis=0)
    text = f"the median over tensors is at a bound in {at.mean():.0%} of the steps; single tensors are not recorded"
    status: Status = "finding" if at.mean() > _limits(name)["share"] else "ok"
    steps = tuple(step_numbers(lines)[at].tolist())
    return Finding(name, status, text, steps if status == "finding" else (), {"share_of_steps": float(at.mean())})


def _held_back(records: Records) -> Finding:
    name = "updates held back"
    limits = _limits(name)
    skipped = [line["step"] for line in records.lines if line.get("update_left_out")]
    rollbacks = [event for event in records.events if event["event"] == "rollback"]
    ended = [event for event in records.events if event["event"] == "diverged"]
    share = len(skipped) / len(records.lines)
    values = {"share": share, "rollbacks": len(rollbacks), "diverged": bool(ended)}
    text = f"{len(skipped):,} of {len(records.lines):,} updates skipped"
    if rollbacks:
        times = f"{len(rollbacks)} rollback{'s' if len(rollbacks) > 1 else ''}"
        text += f", {times} (from step {_listed([event['step'] for event in rollbacks])})"
    if ended:
        text += f", ended by divergence at step {ended[-1]['step']:,}"
    if skipped:
        text += f"; step {_listed(skipped)}"
    if share > limits["share"] or len(rollbacks) > limits["rollbacks"] or ended:
        steps = sorted({*skipped, *(event["step"] for event in (*rollbacks, *ended))})
        return Finding(name, "finding", text, tuple(steps), values)
    return Finding(name, "ok", text, tuple(skipped), values)


def _loss_scale(records: Records) -> Finding:
    name = "fp16 loss scale"
    limits = _limits(name)
    lines = [line for line in records.lines if line.get("loss_scale") is not None]
    if not lines:
        return Finding(name, "not judged", "the run is not in fp16")
    counts, scales, steps = column(lines, "skipped_updates"), column(lines, "loss_scale"), step_numbers(lines)
    # A resume may start the count again.
    overflows = np.flatnonzero(np.diff(counts, prepend=0.0) > 0)
    late = [int(steps[i]) for i in overflows if steps[i] > limits["first_steps"]]
    judged = int((steps > limits["first_steps"]).sum())
    share = len(late) / judged if judged else 0.0
    lowest = float(scales.min())
    values = {"share": share, "overflows": len(overflows), "lowest_scale": lowest}
    text = f"{len(late)} overflows in {judged:,} steps after the first {limits['first_steps']:g}, scale ≥ {lowest:g}"
    if share > limits["share"] or lowest <= limits["minimum"]:
        at = late or [int(steps[int(scales.argmin())])]
        return Finding(name, "finding", f"{text}; step {_listed(at)}", tuple(at), values)
    return Finding(name, "ok", text, values=values)


def _throughput(records: Records) -> Finding:
    name = "throughput dips"
    limits = _limits(name)
    found: list[dict[str, Any]] = []
    judged = 0
    for lines in records.phases():
        rates, seconds = column(lines, "tokens_per_second")[1:], column(lines, "step_seconds")[1:]
        steps = step_numbers(lines)[1:]
        if len(rates) < limits["fewest_steps"] or np.isnan(rates).all():
            continue
        judged += len(rates)
        low = rates < limits["share_of_median"] * np.nanmedian(rates)
        for first, last in runs(low):
            lasted = float(np.nansum(seconds[first : last + 1]))
            if last - first + 1 >= limits["fewest_steps"] and lasted >= limits["seconds"]:
                dip = {"first_step": int(steps[first]), "last_step": int(steps[last]), "seconds": lasted}
                found.append(
                    {**dip, "share_of_median": float(np.median(rates[first : last + 1]) / np.nanmedian(rates))}
                )
    if not judged:
        return Finding(name, "not judged", "too few steps with a speed")
    if found:
        text = "; ".join(
            f"steps {dip['first_step']:,}–{dip['last_step']:,}: {dip['share_of_median']:.0%} of the median for "
            f"{dip['seconds']:.0f} s"
            for dip in found[:_SHOWN]
        )
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return Finding(name, "finding", text + more, tuple(dip["first_step"] for dip in found), {"dips": found})
    return Finding(name, "ok", f"none in {judged:,} steps")


_CHECKS = (
    *(_finite, _start, _step_size, _spikes, _level, _context, _trend, _norm_spikes),
    *(_bounds, _held_back, _loss_scale, _throughput),
)
