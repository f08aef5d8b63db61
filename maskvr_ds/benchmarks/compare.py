"""`maskvr compare`: strategies × seeds, each run a `maskvr train`; who reaches the baseline's held-out loss, and when.

Runs of one seed begin with the same weights and read the same rows in the same order (J segments of a row in one
batch: J times fewer rows), and all are measured on the same held-out rows under the same uniform masks. The target of a
seed is the baseline's last held-out loss with that seed, unless one is given. Steps to it are interpolated between
evaluations; seconds are those of training steps and of what `auto` measures, without evaluation and saving, as
metrics.jsonl has them.

    OUTPUT/runs/STRATEGY/seed-0/     a run's folder each
    OUTPUT/compare.json, compare.png after every run

A run that has its last checkpoint is not repeated; one that was cut short goes on. No collectives here.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskvr_ds.analysis.gradient_variance.report import wrapped_label
from maskvr_ds.config import ConfigError, RunConfig, load_config
from maskvr_ds.config.strategy_spec import ORACLES, StrategySpec, parse_strategies
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import CONFIG, METRICS
from maskvr_ds.telemetry.metrics_file import AUTO_EVENT, read_events, read_lines
from maskvr_ds.training.corpora import open_corpora

RESULT, PLOT = "compare.json", "compare.png"
_SPREAD = ("final", "difference", "fewer_steps", "less_time")


@dataclass(frozen=True)
class Job:
    """A run. assignments: all that is given to `maskvr train --config … --set`."""

    spec: StrategySpec
    seed: int
    assignments: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def is_done(self) -> bool:
        saved = complete_checkpoints(self.folder)
        return bool(saved) and saved[-1].name == f"step-{self.config.training.steps:08d}"


def plan(arguments: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed. Raises ValueError for whatever would stop one of them, or another run in its place."""
    specs = parse_strategies(arguments.strategies)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, arguments.seeds))}: one is named twice")
    if oracles := [spec.text for spec in specs if spec.strategy in ORACLES]:
        raise ConfigError(f"{', '.join(oracles)}: cannot be trained with; `maskvr variance` measures it")
    if len({spec.folder for spec in specs}) < len(specs):
        raise ConfigError(f"--strategies {' '.join(arguments.strategies)}: two have the same name but for punctuation")
    jobs = []
    for seed in arguments.seeds:
        for spec in specs:
            folder = Path(arguments.output) / "runs" / spec.folder / f"seed-{seed}"
            own = (*arguments.assignments, *spec.assignments, f"seed={seed}", f"output_dir={json.dumps(str(folder))}")
            config = load_config(arguments.config, own)
            if config.evaluation.every_steps == 0:
                raise ConfigError("evaluation.every_steps is 0; a comparison needs held-out losses")
            if seed == arguments.seeds[0]:
                open_corpora(config)
            check_same(folder / CONFIG, config)
            jobs.append(Job(spec, seed, own, config))
    return jobs


def check_same(path: Path, config: RunConfig) -> None:
    """Raise ConfigError where the run there has other settings, naming the first few."""
    if not path.is_file():
        return
    found, asked = (_flat(c.model_dump(mode="json")) for c in (load_config(path), config))
    differing = [key for key in sorted({*found, *asked} - {"output_dir"}) if found.get(key) != asked.get(key)]
    if differing:
        shown = ", ".join(f"{key} {found.get(key)!r} -> {asked.get(key)!r}" for key in differing[:3])
        raise ConfigError(f"{path.parent}: a run of other settings ({shown}); name another --output")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def train(job: Job, arguments: argparse.Namespace) -> bool:
    """Whether the run is done now."""
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
    """(step, seconds of training until then, held-out loss) of every evaluation."""
    seconds, points = 0.0, []
    measuring = {
        event["step"]: event["seconds"] for event in read_events(folder / METRICS) if event["event"] == AUTO_EVENT
    }
    for line in read_lines(folder / METRICS):
        # What is measured after a step counts from the next one on.
        seconds += line["step_seconds"] + measuring.get(line["step"] - 1, 0.0)
        if line.get("held_out_loss") is not None:
            points.append((line["step"], seconds, line["held_out_loss"]))
    return points


def reached(points: Sequence[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """Step and seconds at which the loss first falls to `target`, between two evaluations in proportion to the fall.

    At the first evaluation: that one. None where it never does.
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
    """Results of the runs that are done. The first strategy is the baseline.

    strategies: name → runs (a mapping a seed) and, over seeds for which the baseline is done too, mean, least and
    greatest of `final` held-out loss, `difference` from the baseline's, `fewer_steps` and `less_time`: the baseline's
    steps (seconds) divided by the strategy's, to the target, or to the lowest loss that both had where one never fell
    so far: who misses the target has a figure too, below 1. `reached` of `seeds`: who did not miss it.
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
            assert theirs is not None, "both had a loss as low as that"
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
    """A line a strategy: mean and, in brackets, least and greatest over seeds."""
    lines = [("strategy", "held-out loss", "− baseline", "reached", "fewer steps ×", "less time ×")]
    for name, found in result["strategies"].items():
        cells = [_cell(found[key], digits) for key, digits in (("final", 3), ("difference", 3))]
        speed = [_cell(found[key], 2) for key in ("fewer_steps", "less_time")]
        lines.append((name, *cells, f"{found['reached']}/{found['seeds']}", *speed))
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
    """Held-out loss over steps, mean and range over seeds; its difference from the baseline's; speed-ups → PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), dpi=120)
    baseline = {run["seed"]: dict(_losses(run)) for run in result["strategies"][result["baseline"]]["runs"]}
    names = [name for name, found in result["strategies"].items() if found["runs"]]
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
            label = key.replace("_", " ") if place == 0 else None
            right.plot(values, [place + up] * len(values), marker, color=line.get_color(), markersize=5, label=label)
    left.set_xlabel("step")
    left.set_ylabel("held-out loss [nats]")
    right.axvline(1, color="grey", linestyle="--", linewidth=0.8)
    right.set_yticks(range(len(names)), [wrapped_label(name) for name in names], fontsize=6)
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_xlabel(f"× fewer than {result['baseline']} to its last loss; a mark a seed", fontsize=8)
    middle.set_ylabel(f"held-out loss − that of {result['baseline']}")
    middle.set_xlabel("step; a line a seed")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if names and axes is not middle:
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)


def _write(jobs: Sequence[Job], arguments: argparse.Namespace) -> dict[str, Any]:
    config = jobs[0].config.model_dump(mode="json", exclude={"seed", "output_dir", "masking"})
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "seeds": arguments.seeds,
        "config": config,
        **compare(jobs, arguments.target),
    }
    output = Path(arguments.output)
    plot(result, output / PLOT)
    partial = output / f".{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(output / RESULT)
    return result


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 where a run failed: the others are trained and compared all the same."""
    jobs = plan(arguments)
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    failed = []
    for number, job in enumerate(jobs, 1):
        what = f"[{number}/{len(jobs)}] {job.spec.text}, seed {job.seed}"
        if job.is_done():
            print(f"{what}: done before", flush=True)
            continue
        print(f"{what}: {job.folder}", flush=True)
        if train(job, arguments):
            _write(jobs, arguments)
        else:
            failed.append(job)
            print(f"error: {what}: did not finish; see {job.folder.with_suffix('.log')}", file=sys.stderr, flush=True)
    print(table(_write(jobs, arguments)))
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs did not finish; the same command tries again", file=sys.stderr)
    return 1 if failed else 0
