"""Does a fine-tuned encoder get better if heads are switched off? Chosen on one half of the evaluation set, judged on
the other.

    for s in 0 1 2; do
        maskvr finetune all-MiniLM-L6-v2 --task sst2 --data glue --max-train 2000 --max-length 64 \\
            --learning-rates 1e-4 --epochs 3 --seed $s --output DIR/seed$s
    done
    python docs/experiments/heads_of_a_task.py DIR/seed0 DIR/seed1 DIR/seed2 --data glue --output DIR [--minutes 6]

On every other example of the evaluation set: predictions and losses with all heads and with each head off alone, and
importance by gradient (Michel et al. 2019). Then a choice for each model: the K heads without which the accuracy is
highest, or the loss lowest, or which are least important. These heads are switched off together on the other examples,
which had no part in the choice. `--both` also chooses on those and judges on the first ones, so that every example is
judged once. Intervals are those of the paired bootstrap over examples and models of `maskvr attention --task`. Layers
below the head are computed once. One core, about 15 minutes, with --both 30; after --minutes it stops between two
measurements, and the same command continues. Writes DIR/heads.json and prints the tables, if complete.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskvr_ds.analysis.attention.heads import output_projections, rank_correlation
from maskvr_ds.analysis.health.probe import layers_of
from maskvr_ds.downstream.baselines import targets
from maskvr_ds.downstream.comparison import changes
from maskvr_ds.downstream.examples import TaskData
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.metrics import score
from maskvr_ds.downstream.models import prepared
from maskvr_ds.downstream.task_heads import Outcome, TaskHeads
from maskvr_ds.downstream.tasks import TASKS, Kind
from maskvr_ds.runtime import distributed

TASK, METRIC, LENGTH = "sst2", "accuracy", 64
# Chosen on, judged on: every other example.
HALVES = {"even": "odd", "odd": "even"}
COUNTS, RULES = (1, 4, 8), ("accuracy", "loss", "importance")
Heads = list[tuple[int, int]]
Measured = dict[str, Any]


class Resumed:
    """Computes the outcome without one head, from the stored outputs of the layers below it."""

    def __init__(self, heads: TaskHeads) -> None:
        self._heads, self._layers = heads, layers_of(heads.model)
        self._projections = output_projections(heads.model)
        self._outputs: list[list[Any]] = [[] for _ in self._layers]

    def all_heads(self) -> Outcome:
        """With all heads; stores the layers' outputs, by batch."""
        for outputs in self._outputs:
            outputs.clear()
        handles = [
            layer.register_forward_hook(lambda _, args, output, n=n: self._outputs[n].append(output))
            for n, layer in enumerate(self._layers)
        ]
        try:
            return self._heads.outcome()
        finally:
            for handle in handles:
                handle.remove()

    def without(self, layer: int, head: int) -> Outcome:
        """With the columns of this head at zero in the output projection, which is the head off."""
        weight = self._projections[layer].weight
        size = weight.shape[1] // self._heads.shape[1]
        columns = weight.data[:, head * size : (head + 1) * size]
        before = columns.clone()
        columns.zero_()
        try:
            with self._from_layer(layer):
                return self._heads.outcome()
        finally:
            columns.copy_(before)

    @contextmanager
    def _from_layer(self, layer: int) -> Iterator[None]:
        with ExitStack() as stack:
            for n in range(layer):
                outputs = iter(self._outputs[n])
                stored = mock.patch.object(self._layers[n], "forward", lambda *_, o=outputs, **__: next(o))
                stack.enter_context(stored)
            yield


class Measurement:
    """Figures of one model on one half, kept in a file; `done` is false once the time is up."""

    def __init__(self, path: Path, heads: TaskHeads, deadline: float) -> None:
        self.path, self._heads, self._deadline, self.done = path, heads, deadline, True
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.found: Measured = {"without": {}, "together": {}} | stored

    def singles(self) -> None:
        """All heads on, each head off, importance."""
        layers, width = self._heads.shape
        keys = [(n, h) for n in range(layers) for h in range(width)]
        resumed: Resumed | None = None
        for n, h in keys:
            if f"{n}.{h}" in self.found["without"] or not self._time_left():
                continue
            if resumed is None:
                resumed = Resumed(self._heads)
                self._put(self.found, "all", resumed.all_heads())
            self._put(self.found["without"], f"{n}.{h}", resumed.without(n, h))
        if "importance" not in self.found and self._time_left():
            importance = self._heads.importance()
            self.found["importance"] = {f"{n}.{h}": float(importance[n, h]) for n, h in keys}
            self._store()

    def together(self, heads: Heads) -> None:
        """With all heads on, and with these heads off together."""
        if "all" not in self.found and self._time_left():
            self._put(self.found, "all", self._heads.outcome())
        if name(heads) not in self.found["together"] and self._time_left():
            off = torch.zeros(self._heads.shape, dtype=torch.bool)
            for n, h in heads:
                off[n, h] = True
            self._put(self.found["together"], name(heads), self._heads.outcome(off))

    def _put(self, where: dict[str, Any], key: str, outcome: Outcome) -> None:
        where[key] = {"predictions": outcome.predictions, "loss": outcome.loss}
        self._store()

    def _time_left(self) -> bool:
        self.done = self.done and time.monotonic() < self._deadline
        return self.done

    def _store(self) -> None:
        self.path.write_text(json.dumps(self.found), encoding="utf-8")


def name(heads: Heads) -> str:
    return " ".join(f"{n}.{h}" for n, h in sorted(heads))


def chosen(measured: Measured, truth: list[Any], by: str, count: int) -> Heads:
    """The `count` heads to switch off: those without which alone the accuracy is highest, of equal ones with the lower
    loss; or the loss lowest; or the least important ones."""
    singles: dict[str, dict[str, Any]] = measured["without"]
    orders: dict[str, Callable[[str], tuple[float, ...]]] = {
        "accuracy": lambda key: (-score(METRIC, truth, singles[key]["predictions"]), singles[key]["loss"]),
        "loss": lambda key: (singles[key]["loss"],),
        "importance": lambda key: (measured["importance"][key],),
    }
    ordered = sorted(singles, key=orders[by])[:count]
    return [(int(layer), int(head)) for layer, head in (key.split(".") for key in ordered)]


def measure(
    arguments: argparse.Namespace, data: TaskData, truth: dict[str, list[Any]]
) -> dict[str, dict[str, Measured]]:
    """Model -> half -> figures; empty if the time was not enough."""
    deadline = time.monotonic() + 60 * arguments.minutes
    ((_, dev),) = data.dev.items()
    found: dict[str, dict[str, Measured]] = {}
    folders = [str(Path(model) / "model") for model in arguments.models]
    with prepared(folders, {Kind.CLASSIFICATION: LENGTH}) as encoders:
        for half, other in list(HALVES.items())[: 1 + arguments.both]:
            for model, encoder in zip(arguments.models, encoders, strict=True):
                parts = {}
                for start, part in enumerate(HALVES):
                    heads = TaskHeads(encoder, data, dev.subset(range(start, len(dev), 2)), LENGTH)
                    file = arguments.output / f"{Path(model).name}_{part}.json"
                    parts[part] = Measurement(file, heads, deadline)
                parts[half].singles()
                for by in RULES if parts[half].done else ():
                    for count in COUNTS:
                        parts[other].together(chosen(parts[half].found, truth[half], by, count))
                if not all(part.done for part in parts.values()):
                    return {}
                found[Path(model).name] = {part: parts[part].found for part in HALVES}
    return found


def summary(found: dict[str, dict[str, Measured]], truth: dict[str, list[Any]], halves: list[str]) -> dict[str, Any]:
    """Scores, losses and rank correlations on the halves that chose, and what each choice is worth on the other."""
    models: dict[str, Any] = {}
    for model, measured in found.items():
        models[model] = {"accuracy": {h: score(METRIC, truth[h], m["all"]["predictions"]) for h, m in measured.items()}}
        for half in halves:
            m = measured[half]
            keys = list(m["importance"])
            base = m["all"]
            accuracy = [score(METRIC, truth[half], m["without"][key]["predictions"]) for key in keys]
            losses = [m["without"][key]["loss"] - base["loss"] for key in keys]
            importance = [m["importance"][key] for key in keys]
            drops = [models[model]["accuracy"][half] - value for value in accuracy]
            models[model][f"chosen on {half}"] = {
                "loss": base["loss"],
                "accuracy_without": dict(zip(keys, accuracy, strict=True)),
                "loss_increase": dict(zip(keys, losses, strict=True)),
                "importance": m["importance"],
                "rank_correlation": {
                    "loss": _correlation(importance, losses),
                    "loss, either way": _correlation(importance, [abs(x) for x in losses]),
                    "accuracy": _correlation(importance, drops),
                },
            }
    sizes = {half: len(labels) for half, labels in truth.items()}
    return {"task": TASK, "examples": sizes, "models": models, "choices": _choices(found, truth, halves)}


def _choices(
    found: dict[str, dict[str, Measured]], truth: dict[str, list[Any]], halves: list[str]
) -> list[dict[str, Any]]:
    """Change of the accuracy by each choice: on the examples that had no part in it, and for one head on those that
    had."""
    judged = [label for half in halves for label in truth[HALVES[half]]]
    before = [[p for half in halves for p in m[HALVES[half]]["all"]["predictions"]] for m in found.values()]
    rows: list[dict[str, Any]] = []
    after: list[list[list[Any]]] = []
    for by in RULES:
        for count in COUNTS:
            heads = {model: {h: name(chosen(m[h], truth[h], by, count)) for h in halves} for model, m in found.items()}
            row: dict[str, Any] = {"by": by, "count": count, "heads": heads}
            if count == 1:
                row["on_those_that_chose"] = statistics.fmean(
                    score(METRIC, truth[h], m[h]["without"][heads[model][h]]["predictions"])
                    - score(METRIC, truth[h], m[h]["all"]["predictions"])
                    for model, m in found.items()
                    for h in halves
                )
            rows.append(row)
            after.append(
                [
                    [p for h in halves for p in m[HALVES[h]]["together"][heads[model][h]]["predictions"]]
                    for model, m in found.items()
                ]
            )
    intervals = changes(METRIC, judged, before, after)
    for row, (difference, low, high), changed in zip(rows, intervals, after, strict=True):
        each = [score(METRIC, judged, a) - score(METRIC, judged, b) for a, b in zip(changed, before, strict=True)]
        row |= {"difference": difference, "low": low, "high": high, "by_model": dict(zip(found, each, strict=True))}
    return rows


def _correlation(a: list[float], b: list[float]) -> float | None:
    return rank_correlation(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


def table(result: dict[str, Any]) -> str:
    """Heads that matter, rank correlations of importance with what is lost, and changes in percentage points."""
    lines = ["| model | half | accuracy, loss | accuracy without a head: higher | lower | loss: lower | higher "]
    lines[0] += "| rank correlation with accuracy | with loss | with the size of the loss' change |"
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for model, found in result["models"].items():
        for half in HALVES:
            if (figures := found.get(f"chosen on {half}")) is None:
                continue
            base, correlations = found["accuracy"][half], figures["rank_correlation"]
            without, losses = figures["accuracy_without"].values(), figures["loss_increase"].values()
            counts = [
                sum(x > base for x in without),
                sum(x < base for x in without),
                sum(x < 0 for x in losses),
                sum(x > 0 for x in losses),
            ]
            values = [f"{base:.1%}, {figures['loss']:.3f}", *map(str, counts)]
            values += [f"{correlations[key]:.2f}" for key in ("accuracy", "loss", "loss, either way")]
            lines.append(f"| {model} | {half} | " + " | ".join(values) + " |")
    lines += ["", "| chosen by | heads off | change of the accuracy | 95% interval | by model | where chosen |"]
    lines.append("|---|---:|---:|---|---|---:|")
    for row in result["choices"]:
        each = ", ".join(f"{100 * x:+.1f}" for x in row["by_model"].values())
        own = f"{100 * row['on_those_that_chose']:+.2f}" if "on_those_that_chose" in row else ""
        lines.append(
            f"| {row['by']} | {row['count']} | {100 * row['difference']:+.2f} | {100 * row['low']:+.2f} to "
            f"{100 * row['high']:+.2f} | {each} | {own} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="output folders of `maskvr finetune`")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--both", action="store_true", help="choose on either half")
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    data = read_task(TASKS[TASK], arguments.data)
    ((_, dev),) = data.dev.items()
    truth = {
        half: targets(data.task, data.labels, dev.subset(range(start, len(dev), 2)))
        for start, half in enumerate(HALVES)
    }
    found: dict[str, dict[str, Measured]] = {}
    status = distributed.run_as_rank(lambda: found.update(measure(arguments, data, truth)))
    if status or not found:
        print("incomplete; the same command continues")
        return status or 1
    result = summary(found, truth, list(HALVES)[: 1 + arguments.both])
    (arguments.output / "heads.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
