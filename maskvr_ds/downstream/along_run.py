"""Scores along a run: its checkpoints as models of one evaluation, against step, seconds of training and tokens.

    OUTPUT/curve.json   per run its points; scores of every task and metric, and the rows that need no encoder
    OUTPUT/curve.png    the same as curves
    OUTPUT/results.md   has the table as well

Seconds are those of training steps (metrics.jsonl), without evaluation and checkpointing.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskvr_ds.downstream.baselines import BAG_OF_WORDS, MAJORITY
from maskvr_ds.downstream.report import aligned, score_cell
from maskvr_ds.downstream.store import TABLES, Content, RunStore
from maskvr_ds.downstream.tasks import TaskError
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.layout import BEST, CHECKPOINTS, METRICS
from maskvr_ds.runtime.files import atomic_path, atomic_write
from maskvr_ds.telemetry.metrics_file import read_lines

CURVE, PLOT = "curve.json", "curve.png"
_EVERY = re.compile(r"every:([1-9]\d{0,11})", re.ASCII)
_AXES = {"step": "optimizer step", "seconds": "seconds of training", "tokens": "tokens"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run. model: its path, as a MODEL. seconds: None if metrics.jsonl lacks its step."""

    run: str
    model: str
    step: int
    seconds: float | None
    tokens: int | None


def select(runs: Sequence[str], which: str) -> list[Point]:
    """The checkpoints of runs, oldest first. which: "all", "best" (checkpoint.keep_best), or "every:N": steps that are
    multiples of N.

    Damaged checkpoints, and those that the run has rolled back from, are skipped with a warning. Raises TaskError if a
    run has no such checkpoint.
    """
    return [point for run in runs for point in _points(run, which)]


def _points(run: str, which: str) -> list[Point]:
    folder = Path(run)
    if not (folder / CHECKPOINTS).is_dir():
        raise TaskError(f"--checkpoints {which}: {run} is no run with checkpoints")
    skipped: list[str] = []
    found = [checkpoint.folder for checkpoint in checkpoints.intact(folder, skipped)][::-1]
    for fault in skipped:
        logger.warning("skipped: %s", fault)
    steps = [checkpoints.step_of(checkpoint) for checkpoint in found]
    if which == "best":
        try:
            names = {(folder / CHECKPOINTS / BEST).read_text(encoding="utf-8").strip()}
        except FileNotFoundError:
            raise TaskError(
                f"--checkpoints best: {run} has not recorded its best checkpoint, as checkpoint.keep_best was not set; "
                "use --checkpoints all"
            ) from None
        found = [checkpoint for checkpoint in found if checkpoint.name in names]
    elif match := _EVERY.fullmatch(which):
        found = [c for c, step in zip(found, steps, strict=True) if step % int(match[1]) == 0]
    elif which != "all":
        raise TaskError(f"--checkpoints {which}: expected all, best or every:N")
    if not found:
        there = ", ".join(map(str, steps)) or "none"
        raise TaskError(f"--checkpoints {which}: {run} has no such checkpoint; intact ones are of step {there}")
    progress = _progress(folder / METRICS)
    return [
        Point(run, str(checkpoint), step, *progress.get(step, (None, None)))
        for checkpoint in found
        for step in (checkpoints.step_of(checkpoint),)
    ]


def _progress(metrics: Path) -> dict[int, tuple[float, int]]:
    """Step -> seconds of training and tokens up to it."""
    seconds, found = 0.0, {}
    for line in read_lines(metrics) if metrics.is_file() else ():
        seconds += line["step_seconds"]
        found[line["step"]] = seconds, line["tokens"]
    return found


def curve(points: Sequence[Point], reports: dict[str, Content]) -> Content:
    """Scores by run and point, and those of the baselines. A point lacks tasks on which its evaluation failed."""
    runs: dict[str, list[Content]] = {}
    for point in points:
        scores = {
            task: report["rows"][point.model]["scores"]
            for task, report in reports.items()
            if point.model in report["rows"]
        }
        entry = {"step": point.step, "seconds": point.seconds, "tokens": point.tokens, "checkpoint": point.model}
        runs.setdefault(point.run, []).append({**entry, "scores": scores})
    baselines = {
        task: {name: report["rows"][name]["scores"] for name in (MAJORITY, BAG_OF_WORDS)}
        for task, report in reports.items()
    }
    return {"runs": runs, "baselines": baselines}


def _columns(found: Content) -> list[tuple[str, str]]:
    """(task, metric)."""
    return [(task, metric) for task, rows in found["baselines"].items() for metric in rows[MAJORITY]]


def table(found: Content) -> str:
    """Markdown: a line per checkpoint, scores × 100, mean ± standard deviation over seeds."""
    columns = _columns(found)
    titles = [metric if task == metric else f"{task} {metric}" for task, metric in columns]
    lines = ["### Along the run", ""] if len(found["runs"]) == 1 else ["### Along the runs", ""]
    body = [["run", "step", "seconds", "tokens", *titles]]
    for run, points in found["runs"].items():
        for point in points:
            seconds = "–" if point["seconds"] is None else f"{point['seconds']:,.1f}"
            tokens = "–" if point["tokens"] is None else f"{point['tokens']:,}"
            cells = [
                score_cell(point["scores"][task][metric]) if task in point["scores"] else "failed"
                for task, metric in columns
            ]
            body.append([run, f"{point['step']:,}", seconds, tokens, *cells])
    for name in (MAJORITY, BAG_OF_WORDS):
        cells = [score_cell(found["baselines"][task][name][metric]) for task, metric in columns]
        body.append([name, "–", "–", "–", *cells])
    return "\n".join([*lines, *aligned(body)]) + "\n"


def plot(found: Content, path: Path) -> None:
    """One row of curves per task and metric: against step, seconds and tokens; bars of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = _columns(found)
    figure, axes = plt.subplots(len(columns), 3, figsize=(14, 3.6 * len(columns)), dpi=110, squeeze=False, sharey="row")
    for row, (task, metric) in zip(axes, columns, strict=True):
        for panel, (key, label) in zip(row, _AXES.items(), strict=True):
            for run, points in found["runs"].items():
                shown = [
                    (point[key], point["scores"][task][metric])
                    for point in points
                    if point[key] is not None
                    if task in point["scores"] and point["scores"][task][metric]["mean"] is not None
                ]
                means = [100 * entry["mean"] for _, entry in shown]
                spread = [100 * (entry["std"] or 0) for _, entry in shown]
                panel.errorbar([x for x, _ in shown], means, spread, marker="o", markersize=4, capsize=3, label=run)
            for name, style in ((MAJORITY, ":"), (BAG_OF_WORDS, "--")):
                mean: Any = found["baselines"][task][name][metric]["mean"]
                panel.axhline(100 * mean, color="grey", linestyle=style, linewidth=1, label=name)
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"{task}: {metric} × 100")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("score after fine-tuning; mean and standard deviation over seeds", fontsize=10)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def write(store: RunStore, points: Sequence[Point], reports: dict[str, Content], text: str) -> str:
    """Write curve.json and curve.png, and add the table to results.md; returns it with `text` before it."""
    found = curve(points, reports)
    atomic_write(store.folder / CURVE, json.dumps(found, indent=1, allow_nan=False) + "\n")
    plot(found, store.folder / PLOT)
    text = f"{text}\n{table(found)}"
    atomic_write(store.folder / TABLES, text)
    return text
