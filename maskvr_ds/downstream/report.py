"""Tables of an evaluation: per task one row per baseline and model, and the differences between them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from maskvr_ds.downstream.baselines import targets
from maskvr_ds.downstream.comparison import LEVEL, RESAMPLES, Difference, differences
from maskvr_ds.downstream.evaluation import Row
from maskvr_ds.downstream.examples import TaskData, describe
from maskvr_ds.downstream.metrics import score
from maskvr_ds.downstream.store import RESULTS, TABLES, Content, RunStore
from maskvr_ds.runtime.files import atomic_write


def task_report(
    data: TaskData, rows: Sequence[Row], heading: str = "", failed: Mapping[str, str] | None = None
) -> Content:
    """Scores (fractions) of every run with mean and sample standard deviation, chosen settings, and differences.

    A row with a diverged run has no mean and takes part in no comparison. heading: how all models are fine-tuned;
    failed: models without a row, and why.
    """
    report: Content = {"data": describe(data), "heading": heading, "rows": {}, "failed": dict(failed or {})}
    report["differences"] = {}
    for row in rows:
        report["rows"][row.name] = {
            # Digest of the files of the model (checkpoint/scores.py); baselines have none.
            "model": row.runs[0].get("identity", {}).get("model"),
            "learning_rate": row.choice.learning_rate if row.choice else None,
            "selection": list(row.choice.tried) if row.choice else [],
            "threshold": row.choice.threshold if row.choice else None,
            "settings": row.settings,
            "diverged_seeds": row.diverged,
            "truncated": row.runs[0].get("truncated"),
            "seconds": [run.get("train_seconds") for run in row.runs],
            "early_stopping": [run.get("stopping") for run in row.runs] if row.choice else None,
            "scores": {},
        }
    for name, split in data.dev.items():
        truth = targets(data.task, data.labels, split)
        for metric in data.task.metrics:
            column = metric if len(data.dev) == 1 else f"{metric} {name}"
            complete = {}
            for row in rows:
                runs = [run["predictions"][name] for run in row.runs if not run["diverged"]]
                entry = _scores([score(metric, truth, run) for run in runs], complete=not row.diverged)
                report["rows"][row.name]["scores"][column] = entry
                if not row.diverged:
                    complete[row.name] = runs
            report["differences"][column] = [
                vars(found) | {"within_noise": found.within_noise} for found in differences(metric, truth, complete)
            ]
    return report


def _scores(runs: list[float], *, complete: bool) -> Content:
    return {
        "mean": statistics.fmean(runs) if complete else None,
        "std": statistics.stdev(runs) if complete and len(runs) > 1 else None,
        "runs": runs,
    }


def tables(task: str, report: Content) -> str:
    """Markdown: scores × 100 as mean ± sample standard deviation over seeds, and all differences."""
    columns = list(report["differences"])
    counts = report["data"]
    sizes = ", ".join(f"{counts[key]:,} {key}" for key in counts if isinstance(counts[key], int) and counts[key])
    lines = [f"### {task}", "", f"Examples: {sizes.replace('_', ' ')}. Scores × 100, mean ± standard deviation."]
    lines += [report["heading"]] * bool(report["heading"]) + [""]
    body = [["row", "learning rate", "runs", *columns]]
    for name, row in report["rows"].items():
        rate = row["learning_rate"]
        cells = [_score(row["scores"][column], row["diverged_seeds"]) for column in columns]
        body.append([name, "–" if rate is None else f"{rate:g}", str(len(row["seconds"])), *cells])
    lines += [*aligned(body), "", *_notes(report)]
    lines += [f"Differences, {LEVEL:.0%} interval of a paired bootstrap ({RESAMPLES:,} resamples):", ""]
    for column, found in report["differences"].items():
        for entry in found:
            verdict = "within noise" if entry["within_noise"] else "beyond noise"
            difference = Difference(**{key: value for key, value in entry.items() if key != "within_noise"})
            lines.append(
                f"- {column}: {difference.first} − {difference.second} = {100 * difference.difference:+.1f} "
                f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}], {verdict}"
            )
    return "\n".join(lines) + "\n"


def _notes(report: Content) -> list[str]:
    notes = []
    for name, row in report["rows"].items():
        if row["truncated"] and (total := sum(row["truncated"].values())):
            # Of a text, of a question, or of the shorter text of a pair; others are read in windows.
            what = (
                "questions, or shorter texts, are shortened to fit into windows"
                if row["settings"].get("stride") is not None
                else (f"examples are truncated to {row['settings']['max_length']} tokens")
            )
            notes.append(f"{name}: {total:,} {what}.")
        if row["threshold"] is not None:
            notes.append(
                f'{name}: "no answer" is given if it scores more than {row["threshold"]:.2f} above the best answer.'
            )
        if len(row["seconds"]) == 1 and row["learning_rate"] is not None:
            notes.append(f"{name}: a single seed, so that the intervals do not cover the choice of seeds.")
        if row["early_stopping"] and (kept := [run["epoch"] for run in row["early_stopping"] if run]):
            notes.append(f"{name}: weights of epoch {', '.join(f'{epoch:g}' for epoch in kept)} (by seed).")
    notes += [f"{name}: no row: {reason}" for name, reason in report["failed"].items()]
    return [*notes, ""] if notes else []


def _score(entry: Content, diverged: list[int]) -> str:
    return f"diverged (seed {', '.join(map(str, diverged))})" if diverged else score_cell(entry)


def score_cell(entry: Content) -> str:
    """Mean × 100 and, of several runs, the standard deviation."""
    if entry["mean"] is None:
        return "diverged"
    spread = "" if entry["std"] is None else f" ± {100 * entry['std']:.1f}"
    return f"{100 * entry['mean']:.1f}{spread}"


def aligned(body: list[list[str]]) -> list[str]:
    """A Markdown table; the first column to the left, the others to the right."""
    body = [[cell.replace("|", "\\|") for cell in cells] for cells in body]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in body
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths))
    return [f"{line} |" for line in (lines[0], *lines[1:])][:1] + [f"{rule}|"] + [f"{line} |" for line in lines[1:]]


def write(store: RunStore, settings: Content, reports: dict[str, Content]) -> str:
    """Write results.json and results.md; returns the tables."""
    text = "\n".join(tables(task, report) for task, report in reports.items())
    content: dict[str, Any] = {"settings": settings, "tasks": reports}
    atomic_write(store.folder / RESULTS, json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(store.folder / TABLES, text)
    return text
