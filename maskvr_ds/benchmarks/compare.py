"""`maskvr compare`: trains strategies × seeds with `maskvr train`, and compares steps and seconds to a target loss.

Runs of one seed start from the same weights and read the same rows in the same order (with J segments of a row in one
batch: J times fewer rows), and all are evaluated on the same held-out rows under the same uniform masks. The target of
a seed is the baseline's last held-out loss with that seed, unless one is given. Steps to the target are interpolated
between evaluations; seconds, from metrics.jsonl, are those of training steps and of the measurements of `auto`, without
evaluation and checkpointing.

    OUTPUT/runs/STRATEGY/seed-0/     run folders
    OUTPUT/compare.json, compare.png updated after every run
    OUTPUT/downstream/               of --downstream (compare_downstream.py)

A run with its last checkpoint is not repeated; an interrupted one is resumed. No collectives.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import write_json
from maskvr_ds.analysis.gradient_variance.report import wrapped_label
from maskvr_ds.benchmarks import compare_downstream
from maskvr_ds.config import ConfigError, RunConfig, load_config
from maskvr_ds.config.strategy_spec import ORACLES, StrategySpec, parse_strategies
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import CONFIG, METRICS
from maskvr_ds.telemetry.metrics_file import AUTO_COSTS_EVENT, AUTO_EVENT, read_events, read_lines
from maskvr_ds.training.length import with_steps
from maskvr_ds.training.references import open_corpora

RESULT, PLOT = "compare.json", "compare.png"
_SPREAD = ("final", "difference", "fewer_steps", "less_time")


@dataclass(frozen=True)
class Job:
    """A run. assignments: all values of `maskvr train --config … --set`."""

    spec: StrategySpec
    seed: int
    assignments: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def is_done(self) -> bool:
        """Whether the run has its last checkpoint."""
        saved = complete_checkpoints(self.folder)
        return bool(saved) and saved[-1].name == f"step-{self.config.training.known_steps:08d}"


def plan(arguments: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed.

    Raises ConfigError if a run's config or corpus is invalid, or if its folder has a run with different settings.
    """
    specs = parse_strategies(arguments.strategies)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, arguments.seeds))}: a seed is listed twice")
    if oracles := [spec.text for spec in specs if spec.strategy in ORACLES]:
        raise ConfigError(f"{', '.join(oracles)}: oracles cannot be used in training; use `maskvr variance`")
    if len({spec.folder for spec in specs}) < len(specs):
        raise ConfigError(f"--strategies {' '.join(arguments.strategies)}: two names differ only in punctuation")
    jobs = []
    for seed in arguments.seeds:
        for spec in specs:
            folder = Path(arguments.output) / "runs" / spec.folder / f"seed-{seed}"
            own = (*arguments.assignments, *spec.assignments, f"seed={seed}", f"output_dir={json.dumps(str(folder))}")
            config = with_steps(load_config(arguments.config, own))
            if config.evaluation.every_steps == 0:
                raise ConfigError("evaluation.every_steps is 0, but a comparison needs held-out losses; set it above 0")
            if seed == arguments.seeds[0]:
                open_corpora(config)
            check_same(folder / CONFIG, config)
            jobs.append(Job(spec, seed, own, config))
    return jobs


def check_same(path: Path, config: RunConfig) -> None:
    """Raise ConfigError if the config at `path` exists and has different settings, naming the first three."""
    if not path.is_file():
        return
    existing, requested = (_flat(c.model_dump(mode="json")) for c in (load_config(path), config))
    differing = [
        key for key in sorted({*existing, *requested} - {"output_dir"}) if existing.get(key) != requested.get(key)
    ]
    if differing:
        shown = ", ".join(f"{key} {existing.get(key)!r} -> {requested.get(key)!r}" for key in differing[:3])
        raise ConfigError(f"{path.parent}: has a run with different settings ({shown}); use another --output")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def train(job: Job, arguments: argparse.Namespace) -> bool:
    """Start or resume a run; → whether it completed."""
    words = [sys.executable, "-m", "maskvr_ds.cli", "train", "--config", arguments.config, "--resume", "auto"]
    for assignment in job.assignments:
        words += ["--set", assignment]
    if arguments.num_gpus is not None:
        words += ["--num-gpus", str(arguments.num_gpus)]
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.folder.with_suffix(".log").open("ab") as log:
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    return status == 0 and job.is_done()


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(step, training seconds up to it, held-out loss) of every evaluation."""
    seconds, points = 0.0, []
    measuring: Counter[int] = Counter()
    for event in read_events(folder / METRICS):
        if event["event"] in (AUTO_EVENT, AUTO_COSTS_EVENT):
            measuring[event["step"]] += event["seconds"]
    for line in read_lines(folder / METRICS):
        # The time of a measurement after a step counts from the next step on.
        seconds += line["step_seconds"] + measuring[line["step"] - 1]
        if line.get("held_out_loss") is not None:
            points.append((line["step"], seconds, line["held_out_loss"]))
    return points


def reached(points: Sequence[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """Step and seconds at which the loss first falls to `target`, interpolated linearly between two evaluations.

    Not interpolated if the first evaluation is at the target already; None if the loss never reaches it.
    """
    before: tuple[int, float, float] | None = None
    for point in points:
        if point[2] <= target:
            if before is None:
                return float(point[0]), point[1]
            share = (before[2] - target) / (before[2] - point[2])
            return tuple(a + share * (b - a) for a, b in zip(before[:2], point[:2], strict=True))  # type: ignore[return-value]
        before = point
    return None


def compare(jobs: Sequence[Job], target: float | None) -> dict[str, Any]:
    """Results of the completed runs. The first strategy is the baseline.

    strategies: name → runs (one mapping per seed) and, over the seeds for which the baseline is completed too, mean,
    minimum and maximum of the `final` held-out loss, its `difference` from the baseline's, `fewer_steps` and
    `less_time`: the baseline's steps (seconds) divided by the strategy's, to the target, or to the lowest loss that
    both reached if one of them missed the target (so that such runs have a value too, below 1). `reached`: the number
    of the `seeds` that reached the target.
    """
    baseline = jobs[0].spec.text
    curves = {(job.spec.text, job.seed): curve(job.folder) for job in jobs if job.is_done()}
    strategies: dict[str, Any] = {}
    for name in dict.fromkeys(job.spec.text for job in jobs):
        runs: list[dict[str, Any]] = []
        for seed in dict.fromkeys(job.seed for job in jobs):
            points, reference = curves.get((name, seed)), curves.get((baseline, seed))
            if points is None or reference is None:
                continue
            aim = reference[-1][2] if target is None else target
            steps, seconds = reached(points, aim) or (None, None)
            common = max(aim, *(min(loss for _, _, loss in one) for one in (points, reference)))
            mine, theirs = reached(points, common), reached(reference, common)
            assert mine is not None
            assert theirs is not None, "both reached the common loss"
            ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
            runs.append(
                {
                    "seed": seed,
                    "target": aim,
                    "final": points[-1][2],
                    "difference": points[-1][2] - reference[-1][2],
                    "steps_to_target": steps,
                    "seconds_to_target": seconds,
                    "fewer_steps": ratios[0],
                    "less_time": ratios[1],
                    "curve": points,
                }
            )
        spread = {key: _spread([run[key] for run in runs]) for key in _SPREAD}
        hits = sum(run["steps_to_target"] is not None for run in runs)
        strategies[name] = {"reached": hits, "seeds": len(runs), **spread, "runs": runs}
    return {"baseline": baseline, "strategies": strategies}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [v for v in values if v is not None]
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)} if known else None


def table(result: dict[str, Any]) -> str:
    """One line per strategy: mean and, in brackets, minimum and maximum over seeds; scores after fine-tuning below."""
    lines = [("strategy", "held-out loss", "− baseline", "reached", "fewer steps ×", "less time ×")]
    for name, strategy in result["strategies"].items():
        cells = [_cell(strategy[key], digits) for key, digits in (("final", 3), ("difference", 3))]
        speed = [_cell(strategy[key], 2) for key in ("fewer_steps", "less_time")]
        lines.append((name, *cells, f"{strategy['reached']}/{strategy['seeds']}", *speed))
    baseline = result["baseline"]
    text = (
        f"{_aligned(lines)}\n[minimum, maximum] over seeds. fewer steps ×, less time ×: what {baseline} needs to reach "
        f"the target loss ÷ what the strategy needs; above 1 is better"
    )
    if result.get("downstream"):
        text += "\n\n" + _aligned(compare_downstream.lines(result["downstream"]))
    return text


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(spread: dict[str, float] | None, digits: int) -> str:
    if spread is None:
        return "–"
    mean, low, high = (f"{spread[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return f"{mean} [{low}, {high}]"


def _losses(run: dict[str, Any]) -> list[tuple[int, float]]:
    return [(step, loss) for step, _, loss in run["curve"]]


def plot(result: dict[str, Any], output: Path) -> None:
    """Plot held-out loss (mean and range over seeds), its difference from the baseline, speed-ups, and scores after
    fine-tuning as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name, strategy in result["strategies"].items() if strategy["runs"]]
    downstream = result.get("downstream") or {}
    rows = 1 + math.ceil(len(downstream) / 3)
    height = rows * max(5.0, 1.5 + 0.6 * len(names))
    figure, panels = plt.subplots(rows, 3, figsize=(17, height), dpi=120, squeeze=False)
    left, middle, right = panels[0]
    others = [panel for row in panels[1:] for panel in row]
    compare_downstream.draw(others, downstream, names, [wrapped_label(name) for name in names])
    for panel in others[len(downstream) :]:
        panel.set_axis_off()
    baseline = {run["seed"]: dict(_losses(run)) for run in result["strategies"][result["baseline"]]["runs"]}
    for place, name in enumerate(names):
        runs = result["strategies"][name]["runs"]
        steps = [point[0] for point in runs[0]["curve"]]
        losses = list(zip(*([point[2] for point in run["curve"]] for run in runs), strict=False))
        (line,) = left.plot(
            steps[: len(losses)], [statistics.fmean(x) for x in losses], linewidth=1.2, label=wrapped_label(name)
        )
        left.fill_between(
            steps[: len(losses)], list(map(min, losses)), list(map(max, losses)), alpha=0.15, color=line.get_color()
        )
        for run in runs:
            apart = [(s, x - baseline[run["seed"]][s]) for s, x in _losses(run) if s in baseline[run["seed"]]]
            middle.plot(*zip(*apart, strict=True), linewidth=0.8, color=line.get_color())
        for key, marker, up in (("fewer_steps", "o", -0.1), ("less_time", "x", 0.1)):
            values = [run[key] if run[key] is not None else math.nan for run in runs]
            label = {"fewer_steps": "steps", "less_time": "time"}[key] if place == 0 else None
            right.plot(values, [place + up] * len(values), marker, color=line.get_color(), markersize=5, label=label)
    left.set_title("held-out loss: mean and range over seeds", fontsize=10)
    left.set_xlabel("optimizer step")
    left.set_ylabel("held-out loss per masked token (nats)")
    right.axvline(1, color="grey", linestyle="--", linewidth=0.8)
    right.set_yticks(range(len(names)), [wrapped_label(name) for name in names], fontsize=9)
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_title("speed-up to the target loss, by seed", fontsize=10)
    right.set_xlabel(f"steps or time that {result['baseline']} needs ÷ that the strategy needs")
    right.set_ylabel("masking strategy")
    middle.set_title(f"difference from {result['baseline']}, by seed", fontsize=10)
    middle.set_ylabel("difference in held-out loss (nats)")
    middle.set_xlabel("optimizer step")
    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if names and axes is not middle:
            axes.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)


def _write(
    jobs: Sequence[Job], arguments: argparse.Namespace, evaluation: compare_downstream.Evaluation | None = None
) -> dict[str, Any]:
    """evaluation: the fine-tuning that is done."""
    config = jobs[0].config.model_dump(mode="json", exclude={"seed", "output_dir", "masking"})
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "seeds": arguments.seeds,
        "config": config,
        **compare(jobs, arguments.target),
    }
    if evaluation is not None:
        runs = {(job.spec.text, job.seed): job.folder for job in jobs if job.is_done()}
        result["downstream"] = compare_downstream.scores(evaluation, runs, result["baseline"])
    output = Path(arguments.output)
    plot(result, output / PLOT)
    write_json(output / RESULT, result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Train and compare all runs. Returns 1 if a run failed; the others are trained and compared nevertheless."""
    jobs = plan(arguments)
    evaluation = compare_downstream.check(arguments, [job.config for job in jobs])
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    failed = []
    for number, job in enumerate(jobs, 1):
        what = f"[{number}/{len(jobs)}] {job.spec.text}, seed {job.seed}"
        if job.is_done():
            print(f"{what}: already completed", flush=True)
            continue
        print(f"{what}: {job.folder}", flush=True)
        if train(job, arguments):
            _write(jobs, arguments)
        else:
            failed.append(job)
            print(f"error: {what}: failed; see {job.folder.with_suffix('.log')}", file=sys.stderr, flush=True)
    fault = None
    if done := [job.folder for job in jobs if job.is_done()]:
        fault = compare_downstream.evaluate(evaluation, done) if evaluation else None
    print(table(_write(jobs, arguments, evaluation if done else None)))
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed; repeat the command to retry them", file=sys.stderr)
    if fault:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if failed or fault else 0
