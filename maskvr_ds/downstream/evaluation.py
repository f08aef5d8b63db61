"""Protocol of an evaluation: learning rates are chosen on a part of the training set, seeds repeated, runs stored.

For each model and task: every learning rate of the grid is tried on the training set without its held-out part
(`examples.hold_out`) with the first `selection_seeds` seeds; the one with the highest mean score on the held-out part
is used for the final runs on the complete training set, one per seed. Only final runs see the evaluation sets, and
their labels are compared with predictions that are stored already. Where questions may have no answer, the threshold
for giving none is chosen on the held-out part, too, by the same runs, which a single learning rate therefore needs as
well.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from maskvr_ds.downstream import spans
from maskvr_ds.downstream.baselines import BAG_OF_WORDS, MAJORITY, bag_of_words, main_score, majority, targets
from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.fine_tuning import DivergenceError, Settings, fine_tune
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.store import Content, RunStore
from maskvr_ds.downstream.tasks import Kind, Task, TaskError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """Repeats of an evaluation. None: the task's own. seeds: number, from 0. learning_rates: the grid; a single one
    needs no choice, except for a threshold. max_length: tokens per example; stride: tokens that two windows share."""

    seeds: int = 5
    selection_seeds: int = 1
    learning_rates: tuple[float, ...] | None = None
    epochs: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    precision: str = "fp32"
    stride: int | None = None

    def settings(self, task: Task) -> Settings:
        """Raises TaskError for windows of which two share more than they can."""
        length = self.max_length or task.max_length
        stride = None
        if task.kind is Kind.SPAN:
            stride = spans.default_stride(length) if self.stride is None else self.stride
            spans.check_stride(length, stride)
        return Settings(self.epochs or task.epochs, self.batch_size or task.batch_size, length, self.precision, stride)

    def rates(self, task: Task) -> tuple[float, ...]:
        return tuple(sorted(set(self.learning_rates or task.learning_rates)))

    def chooses(self, task: Task) -> bool:
        """Whether something is chosen on the held-out part of the training set."""
        return len(self.rates(task)) > 1 or task.unanswerable


@dataclass(frozen=True)
class Choice:
    """Selection of a learning rate. tried: one entry per run, with the score on the held-out part, None if it
    diverged. threshold: of `spans.final_answers`."""

    learning_rate: float
    tried: tuple[Content, ...] = ()
    threshold: float | None = None


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
        chosen = "minimum_cosine" if self.data.task.kind is Kind.SPAN else "inverse_regularisation"
        return Row(BAG_OF_WORDS, (run,), settings={chosen: run["strength"]})

    def encoder(self, encoder: Encoder) -> Row:
        """The choice of a learning rate, and one final run per seed."""
        choice = self.choose(encoder)
        runs = tuple(
            self._answered(
                self.run(encoder, "final", self.data.train, self.data.dev, choice.learning_rate, seed), choice
            )
            for seed in range(self.protocol.seeds)
        )
        return Row(encoder.name, runs, choice, asdict(self.protocol.settings(self.data.task)))

    def kept(self, encoder: Encoder, seed: int, folder: Path) -> Row:
        """The choice of a learning rate, and a single final run, whose model is saved as the new folder `folder`.

        The final run is repeated if it is stored, as its model is not. Nothing is saved if it diverges.
        """
        choice = self.choose(encoder)
        run = self.run(encoder, "final", self.data.train, self.data.dev, choice.learning_rate, seed, keep=folder)
        return Row(encoder.name, (self._answered(run, choice),), choice, asdict(self.protocol.settings(self.data.task)))

    def choose(self, encoder: Encoder) -> Choice:
        """The learning rate with the highest mean score on the held-out part of the training set; of equal ones the
        lowest. Raises TaskError if all diverge."""
        task = self.data.task
        rates = self.protocol.rates(task)
        if not self.protocol.chooses(task):
            return Choice(rates[0])
        fit, held_out = hold_out(self.data.train, task)
        truth = targets(task, self.data.labels, held_out)
        tried: list[Content] = []
        means: dict[float, float] = {}
        thresholds: dict[float, float | None] = {}
        for rate in rates:
            found = []
            for seed in range(self.protocol.selection_seeds):
                run = self.run(encoder, "selection", fit, {"held_out": held_out}, rate, seed)
                found.append(None if run["diverged"] else run["predictions"]["held_out"])
            thresholds[rate] = None
            if task.unanswerable and (complete := [run for run in found if run is not None]):
                thresholds[rate], _ = spans.choose_threshold(truth, complete)
            scores = [
                None if run is None else main_score(task, truth, self._final(run, thresholds[rate])) for run in found
            ]
            tried += [
                {"learning_rate": rate, "seed": seed, "held_out_score": score} for seed, score in enumerate(scores)
            ]
            means[rate] = sum(-math.inf if score is None else score for score in scores) / len(scores)
        best = max(rates, key=lambda rate: (means[rate], -rate))
        if means[best] == -math.inf:
            raise TaskError(
                f"{task.name}: {encoder.name} diverges at every learning rate ({', '.join(map(str, rates))}); "
                "try lower ones with --learning-rates"
            )
        return Choice(best, tuple(tried), thresholds[best])

    def _final(self, predictions: list[Any], threshold: float | None) -> list[Any]:
        """Predictions of a run as they are scored."""
        return spans.final_answers(predictions, threshold) if self.data.task.kind is Kind.SPAN else predictions

    def _answered(self, run: Content, choice: Choice) -> Content:
        found = {name: self._final(predictions, choice.threshold) for name, predictions in run["predictions"].items()}
        return {**run, "predictions": found}

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
        settings = self.protocol.settings(self.data.task)

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
            **settings.identity(),
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
