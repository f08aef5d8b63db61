"""`maskvr compare --downstream`: fine-tuned scores of the runs of a comparison, by `maskvr evaluate`.

Each run's last checkpoint is a model, and so is the one that runs start from (model.initialize_from). Of a strategy and
seed of the pretraining, the score is the mean over its final runs; mean, minimum and maximum are over the seeds of the
pretraining, as of held-out losses. What is fine-tuned is stored in OUTPUT/downstream, an evaluation's folder, and not
repeated.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskvr_ds.config import ConfigError, RunConfig
from maskvr_ds.downstream import tasks
from maskvr_ds.runtime.files import read_json

if TYPE_CHECKING:
    from maskvr_ds.downstream.command import Request

FOLDER = "downstream"
_PROTOCOL = ("seeds", "learning_rates", "epochs", "batch_size", "max_length", "precision")
_OPTIONS = ("data", *_PROTOCOL, "max_train", "text_columns", "label_column", "jobs")
_BASELINES = ("majority", "bag of words")
_INITIAL = "initial weights"
# Points.
_NEAR = 10.0


@dataclass(frozen=True)
class Evaluation:
    """What is fine-tuned. initial: models that the runs start from."""

    request: "Request"
    initial: tuple[str, ...]

    @property
    def baselines(self) -> dict[str, str]:
        """Rows that the comparison trained nothing for: name -> row of the evaluation."""
        names = [_INITIAL] if len(self.initial) == 1 else [f"{_INITIAL} {model}" for model in self.initial]
        return {**{name: name for name in _BASELINES}, **dict(zip(names, self.initial, strict=True))}


def check(arguments: argparse.Namespace, configs: Sequence[RunConfig]) -> Evaluation | None:
    """The evaluation that is asked for, None without one; reads the files of all tasks.

    Raises ConfigError for options without --downstream or a model that is too short, TaskError as `maskvr evaluate`.
    """
    if arguments.downstream is None:
        for name in _OPTIONS:
            if getattr(arguments, f"downstream_{name}") is not None:
                option = f"--downstream-{name.replace('_', '-')}"
                raise ConfigError(f"{option}: no task is evaluated; add --downstream TASK, or omit it")
        return None
    if arguments.downstream_data is None:
        raise ConfigError(
            "--downstream: --downstream-data is required: the folder with the tasks' folders, or your own files"
        )
    from maskvr_ds.downstream import command
    from maskvr_ds.downstream.protocol import Protocol

    given = {name: value for name in _PROTOCOL if (value := getattr(arguments, f"downstream_{name}")) is not None}
    if "learning_rates" in given:
        given["learning_rates"] = tuple(given["learning_rates"])
    request = command.Request(
        tasks.resolve(arguments.downstream, arguments.downstream_text_columns or (), arguments.downstream_label_column),
        Path(arguments.downstream_data),
        Path(arguments.output) / FOLDER,
        Protocol(**given),
        arguments.downstream_max_train,
        arguments.downstream_jobs or 1,
    )
    command.read(request)
    for config in configs:
        for task in request.tasks:
            length, positions = request.protocol.settings(task).max_length, config.model.positions
            if positions is not None and length > positions:
                raise ConfigError(
                    f"--downstream {task.name}: reads {length} tokens, the model has {positions} positions; lower "
                    "--downstream-max-length"
                )
    initial = tuple(dict.fromkeys(str(folder) for c in configs if (folder := c.model.initialize_from) is not None))
    if initial:
        command.check_models(initial, request)
    return Evaluation(request, initial)


def evaluate(evaluation: Evaluation, folders: Sequence[Path]) -> str | None:
    """Fine-tune the models that runs start from and the runs in these folders; → what failed, while all else is done.

    Raises OSError, or TaskError for a model that cannot be evaluated.
    """
    from maskvr_ds.downstream import command

    try:
        command.evaluate([*evaluation.initial, *map(str, folders)], evaluation.request)
    except command.IncompleteError as error:
        return str(error)
    return None


def scores(evaluation: Evaluation, runs: dict[tuple[str, int], Path], baseline: str) -> dict[str, Any]:
    """Columns "TASK METRIC" -> `baselines`: scores of the rows of `Evaluation.baselines`, None for a model without one;
    `strategies`: name -> mean, minimum and maximum of the `score` and of its `difference` from the baseline strategy,
    and `runs`, one mapping per seed with the score and the standard deviation over final runs.

    runs: (strategy, seed) -> folder, of completed runs. A run without a score, as its fine-tuning failed, is absent.
    """
    found: dict[str, Any] = {}
    content = read_json(evaluation.request.output / "results.json")
    for task in evaluation.request.tasks:
        rows = content["tasks"][task.name]["rows"]
        for metric in rows[_BASELINES[0]]["scores"]:
            title = metric if metric == task.name else f"{task.name} {metric}"
            known = {
                key: entry
                for key, folder in runs.items()
                if (entry := rows.get(str(folder), {}).get("scores", {}).get(metric)) and entry["mean"] is not None
            }
            found[title] = {
                "baselines": {
                    name: rows.get(row, {}).get("scores", {}).get(metric, {}).get("mean")
                    for name, row in evaluation.baselines.items()
                },
                "strategies": {
                    name: _of_strategy(name, known, baseline) for name in dict.fromkeys(name for name, _ in runs)
                },
            }
    return found


def _of_strategy(name: str, known: dict[tuple[str, int], Any], baseline: str) -> dict[str, Any]:
    runs = [
        {
            "seed": seed,
            "score": entry["mean"],
            "std": entry["std"],
            "difference": entry["mean"] - known[baseline, seed]["mean"] if (baseline, seed) in known else None,
        }
        for (strategy, seed), entry in known.items()
        if strategy == name
    ]
    return {key: _spread([run[key] for run in runs]) for key in ("score", "difference")} | {"runs": runs}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)} if known else None


def lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a table: scores × 100, mean and, in brackets, minimum and maximum over seeds, and the difference from
    the baseline strategy; last, the rows of `Evaluation.baselines`."""
    first = next(iter(found.values()))
    table = [("strategy", *(cell for title in found for cell in (title, "− baseline")))]
    for name in first["strategies"]:
        entries = [column["strategies"][name] for column in found.values()]
        table.append((name, *(_cell(entry[key]) for entry in entries for key in ("score", "difference"))))
    for name in first["baselines"]:
        values = [column["baselines"][name] for column in found.values()]
        table.append((name, *(cell for value in values for cell in (_score(value), "–"))))
    return table


def _score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _cell(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "–"
    mean, low, high = (_score(spread[key]) for key in ("mean", "min", "max"))
    return f"{mean} [{low}, {high}]"


def _limits(column: dict[str, Any]) -> tuple[float, float] | None:
    """Scores × 100 between which all runs lie, and the rows without one that are no more than _NEAR away: a majority of
    one class among many would make the differences invisible. None without a run."""
    runs = [100 * run["score"] for entry in column["strategies"].values() for run in entry["runs"]]
    if not runs:
        return None
    others = [100 * value for value in column["baselines"].values() if value is not None]
    shown = [*runs, *(value for value in others if min(runs) - _NEAR <= value <= max(runs) + _NEAR)]
    margin = max(0.1 * (max(shown) - min(shown)), 0.5)
    return min(shown) - margin, max(shown) + margin


def draw(axes: Sequence[Any], found: dict[str, Any], names: Sequence[str], labels: Sequence[str]) -> None:
    """One panel per column: a mark per seed, a bar for the mean, lines for the rows of `Evaluation.baselines`."""
    for panel, (title, column) in zip(axes, found.items(), strict=False):
        for place, name in enumerate(names):
            entry = column["strategies"][name]
            values = [100 * run["score"] for run in entry["runs"]]
            (marks,) = panel.plot(values, [place] * len(values), "o", markersize=5)
            if entry["score"]:
                panel.plot([100 * entry["score"]["mean"]], [place], "|", markersize=18, color=marks.get_color())
        for (name, value), style in zip(column["baselines"].items(), itertools.cycle((":", "--", "-.", "-"))):
            if value is not None:
                label = f"{name}: {_score(value)}"
                panel.axvline(100 * value, color="grey", linestyle=style, linewidth=1, label=label)
        panel.set_xlim(_limits(column))
        panel.set_yticks(range(len(names)), labels, fontsize=9)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_title(f"{title} after fine-tuning: by seed, and mean", fontsize=10)
        panel.set_xlabel(f"{title} × 100")
        panel.set_ylabel("masking strategy")
        panel.legend(fontsize=9)
        panel.grid(alpha=0.3)
