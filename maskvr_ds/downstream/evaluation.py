"""Protocol of an evaluation: learning rates are chosen on a part of the training set, seeds repeated, runs stored.

For each model and task: every learning rate of the grid is tried on the training set without its held-out part
(`examples.hold_out`) with the first `selection_seeds` seeds; the one with the highest mean score on the held-out part
is used for the final runs on the complete training set, one per seed. Only final runs see the evaluation sets, and
their labels are compared with predictions that are stored already.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers

from maskvr_ds.downstream.baselines import BAG_OF_WORDS, MAJORITY, bag_of_words, main_score, majority, targets
from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.fine_tuning import DivergenceError, Settings, fine_tune
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.store import Content, RunStore
from maskvr_ds.downstream.tasks import TaskError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """Repeats of an evaluation. None: the task's own. seeds: number, from 0. learning_rates: the grid; a single one
    needs no choice. max_length: tokens per example."""

    seeds: int = 5
    selection_seeds: int = 1
    learning_rates: tuple[float, ...] | None = None
    epochs: float | None = None
    batch_size: int | None = None
    max_length: int = 128
    precision: str = "fp32"

    def settings(self, data: TaskData) -> Settings:
        task = data.task
        return Settings(self.epochs or task.epochs, self.batch_size or task.batch_size, self.max_length, self.precision)

    def rates(self, data: TaskData) -> tuple[float, ...]:
        return tuple(sorted(set(self.learning_rates or data.task.learning_rates)))


@dataclass(frozen=True)
class Choice:
    """Selection of a learning rate. tried: one entry per run, with the score on the held-out part, None if it
    diverged."""

    learning_rate: float
    tried: tuple[Content, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a task's table. runs: final runs, `predictions` and `diverged` among others; baselines have one."""

    name: str
    runs: tuple[Content, ...]
    choice: Choice | None = None
    settings: Content | None = None

    @property
    def diverged(self) -> list[int]:
        """Seeds."""
        return [run["identity"]["seed"] for run in self.runs if run["diverged"]]


class Evaluator:
    """Runs of one task. done: how many were computed; reused: how many were stored already."""

    def __init__(self, store: RunStore, data: TaskData, protocol: Protocol) -> None:
        self.store, self.data, self.protocol = store, data, protocol
        self.done = self.reused = 0

    def rows(self, encoders: Sequence[Encoder]) -> list[Row]:
        """Baselines first, then the models in their order. Raises TaskError, or OSError if a run cannot be stored."""
        return [self.majority(), self.bag_of_words(), *(self.encoder(encoder) for encoder in encoders)]

    def majority(self) -> Row:
        return Row(MAJORITY, ({"predictions": majority(self.data), "diverged": None},))

    def bag_of_words(self) -> Row:
        def make() -> Content:
            predictions, strength = bag_of_words(self.data)
            return {"predictions": predictions, "strength": strength, "diverged": None}

        run = self._get(BAG_OF_WORDS, self._identity("final", self.data.train, self.data.dev), make)
        return Row(BAG_OF_WORDS, (run,), settings={"inverse_regularisation": run["strength"]})

    def encoder(self, encoder: Encoder) -> Row:
        """The choice of a learning rate, and one final run per seed."""
        choice = self.choose(encoder)
        runs = tuple(
            self.run(encoder, "final", self.data.train, self.data.dev, choice.learning_rate, seed)
            for seed in range(self.protocol.seeds)
        )
        return Row(encoder.name, runs, choice, asdict(self.protocol.settings(self.data)))

    def kept(self, encoder: Encoder, seed: int, folder: Path) -> Row:
        """The choice of a learning rate, and a single final run, whose model is saved as the new folder `folder`.

        The final run is repeated if it is stored, as its model is not. Nothing is saved if it diverges.
        """
        choice = self.choose(encoder)
        run = self.run(encoder, "final", self.data.train, self.data.dev, choice.learning_rate, seed, keep=folder)
        return Row(encoder.name, (run,), choice, asdict(self.protocol.settings(self.data)))

    def choose(self, encoder: Encoder) -> Choice:
        """The learning rate with the highest mean score on the held-out part of the training set; of equal ones the
        lowest. Raises TaskError if all diverge."""
        task = self.data.task
        rates = self.protocol.rates(self.data)
        if len(rates) == 1:
            return Choice(rates[0])
        fit, held_out = hold_out(self.data.train, task)
        truth = targets(task, self.data.labels, held_out)
        tried, means = [], {}
        for rate in rates:
            scores = []
            for seed in range(self.protocol.selection_seeds):
                run = self.run(encoder, "selection", fit, {"held_out": held_out}, rate, seed)
                failed = run["diverged"]
                found = None if failed else main_score(task, truth, run["predictions"]["held_out"])
                tried.append({"learning_rate": rate, "seed": seed, "held_out_score": found})
                scores.append(-math.inf if found is None else found)
            means[rate] = sum(scores) / len(scores)
        best = max(rates, key=lambda rate: (means[rate], -rate))
        if means[best] == -math.inf:
            raise TaskError(
                f"{task.name}: {encoder.name} diverges at every learning rate ({', '.join(map(str, rates))}); "
                "try lower ones with --learning-rates"
            )
        return Choice(best, tuple(tried))

    def run(
        self,
        encoder: Encoder,
        purpose: str,
        train: Split,
        evaluate: dict[str, Split],
        learning_rate: float,
        seed: int,
        *,
        keep: Path | None = None,
    ) -> Content:
        """One fine-tuning, unless it is stored and no model is to be kept. `diverged` is None, or names the step."""
        settings = self.protocol.settings(self.data)

        def make() -> Content:
            try:
                outcome = fine_tune(
                    encoder,
                    self.data.task,
                    self.data.labels,
                    train,
                    evaluate,
                    settings,
                    learning_rate=learning_rate,
                    seed=seed,
                    keep=keep,
                )
            except DivergenceError as error:
                return {"diverged": str(error), "predictions": {}}
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            return {"diverged": None, **asdict(outcome), "versions": versions}

        identity = self._identity(purpose, train, evaluate) | {
            "model": encoder.digest,
            "learning_rate": learning_rate,
            "seed": seed,
            **asdict(settings),
        }
        label = f"{Path(encoder.name).name}-{purpose}-{learning_rate:g}-seed{seed}"
        return self._get(label, identity, make, repeat=keep is not None)

    def _identity(self, purpose: str, train: Split, evaluate: dict[str, Split]) -> Content:
        """Predictions do not depend on the labels of the evaluation sets; nor does a stored run."""
        unlabelled = {name: replace(split, labels=(None,) * len(split)).digest for name, split in evaluate.items()}
        return {
            "task": self.data.task.name,
            "purpose": purpose,
            "kind": self.data.task.kind.value,
            "labels": list(self.data.labels),
            "train": train.digest,
            "evaluate": unlabelled,
        }

    def _get(self, label: str, identity: Content, make: Callable[[], Content], *, repeat: bool = False) -> Content:
        content, stored = self.store.get(label, identity, make, repeat=repeat)
        self.reused += stored
        self.done += not stored
        how = "stored" if stored else f"{content.get('train_seconds', 0):.0f} s"
        failed = f": {content['diverged']}" if content["diverged"] else ""
        logger.info("%s: %s (%s)%s", self.data.task.name, label, how, failed)
        return content
