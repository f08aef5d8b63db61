"""Protocol of an evaluation: learning rates are chosen on a part of the training set, seeds repeated, runs stored.

For each model and task: every learning rate of the grid is tried on the training set without its held-out part
(`examples.hold_out`) with the first `selection_seeds` seeds; the one with the highest mean score on the held-out part
is used for the final runs on the complete training set, one per seed. Only final runs see the evaluation sets, and
their labels are compared with predictions that are stored already. With early stopping, final runs train without the
held-out part as well, which says when to stop. Where questions may have no answer, the threshold
for giving none is chosen on the held-out part, too, by the same runs, which a single learning rate therefore needs as
well.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from maskvr_ds.downstream import spans
from maskvr_ds.downstream.baselines import BAG_OF_WORDS, MAJORITY, bag_of_words, main_score, majority, targets
from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.fine_tuning import fine_tune
from maskvr_ds.downstream.intermediate import Intermediate
from maskvr_ds.downstream.losses import DivergenceError
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.protocol import Protocol
from maskvr_ds.downstream.store import Content, RunStore
from maskvr_ds.downstream.tasks import LEARNING_TO_WEIGHT, WEIGHTED_ROWS, Kind, TaskError
from maskvr_ds.downstream.weighted_words import weighted_bag
from maskvr_ds.run_folder.layout import CHECKPOINTS

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Run:
    """One fine-tuning of a model. purpose: selection (without the held-out part, which is predicted), final, or
    intermediate (`intermediate.py`)."""

    purpose: str
    learning_rate: float
    seed: int

    def label(self, encoder: Encoder) -> str:
        *folders, name = (part for part in Path(encoder.name).parts if part != CHECKPOINTS)
        # Several runs have a seed or a step of this name.
        if folders and re.fullmatch(r"(seed|step)-\d+", name):
            name = f"{folders[-1]}/{name}"
        return f"{name}-{self.purpose}-{self.learning_rate:g}-seed{self.seed}"


class Evaluator:
    """Runs of one task. done: how many were computed; reused: how many were stored already. computed: those of this
    command that other processes have computed and stored. report: called with a line for each run of a model."""

    def __init__(
        self,
        store: RunStore,
        data: TaskData,
        protocol: Protocol,
        report: Callable[[str], None] = logger.info,
        intermediate: Intermediate | None = None,
    ) -> None:
        self.store, self.data, self.protocol, self.report = store, data, protocol, report
        self.intermediate = intermediate
        self.done = self.reused = 0
        self.computed: set[tuple[Encoder, Run]] = set()

    def rows(self, encoders: Sequence[Encoder]) -> list[Row]:
        """Baselines first, then the models in their order. Raises TaskError, or OSError if a run cannot be stored."""
        return [*self.baselines(), *(self.encoder(encoder) for encoder in encoders)]

    def baselines(self) -> list[Row]:
        """Rows without an encoder."""
        weighted = [self.weighted_words(name) for name in self.protocol.baselines]
        return [self.majority(), self.bag_of_words(), *weighted]

    @property
    def bags_of_words(self) -> int:
        """Number of runs without an encoder."""
        names = self.protocol.baselines
        return 1 + sum(self.protocol.seeds if name == LEARNING_TO_WEIGHT else 1 for name in names)

    def majority(self) -> Row:
        return Row(MAJORITY, ({"predictions": majority(self.data), "diverged": None},))

    def bag_of_words(self) -> Row:
        def make() -> Content:
            predictions, strength = bag_of_words(self.data)
            return {"predictions": predictions, "strength": strength, "diverged": None}

        run, stored = self.store.get(BAG_OF_WORDS, self._identity("final", self.data.train, self.data.dev), make)
        self._count(BAG_OF_WORDS, run, stored=stored)
        chosen = "minimum_cosine" if self.data.task.kind is Kind.SPAN else "inverse_regularisation"
        return Row(BAG_OF_WORDS, (run,), settings={chosen: run["strength"]})

    def weighted_words(self, name: str) -> Row:
        """A bag of words with other weights of the terms; learned ones once per seed."""
        row = WEIGHTED_ROWS[name]
        runs = []
        for seed in range(self.protocol.seeds if name == LEARNING_TO_WEIGHT else 1):
            identity = self._identity("final", self.data.train, self.data.dev) | {"baseline": name, "seed": seed}
            label = f"{row}, seed {seed}" if name == LEARNING_TO_WEIGHT else row
            run, stored = self.store.get(label, identity, partial(weighted_bag, self.data, name, seed))
            self._count(label, run, stored=stored)
            runs.append(run)
        return Row(row, tuple(runs), settings={"inverse_regularisation": [run["strength"] for run in runs]})

    def encoder(self, encoder: Encoder) -> Row:
        """The choice of a learning rate, and one final run per seed."""
        choice = self.choose(encoder)
        runs = tuple(self._answered(self.run(encoder, run), choice) for run in self.final(choice))
        return Row(encoder.name, runs, choice, self._settings())

    def _settings(self) -> Content:
        first = {} if self.intermediate is None else {"intermediate": self.intermediate.identity()}
        return {**asdict(self.protocol.settings(self.data.task)), **first}

    def heading(self) -> str:
        """How all models are fine-tuned."""
        first = "" if self.intermediate is None else f"first on {self.intermediate.described()}, then "
        return f"Fine-tuning: {first}{self.protocol.settings(self.data.task).described()}."

    def kept(self, encoder: Encoder, seed: int, folder: Path) -> Row:
        """The choice of a learning rate, and a single final run, whose model is saved as the new folder `folder`.

        The final run is repeated if it is stored, as its model is not. Nothing is saved if it diverges.
        """
        choice = self.choose(encoder)
        run = self.run(encoder, Run("final", choice.learning_rate, seed), keep=folder)
        return Row(encoder.name, (self._answered(run, choice),), choice, self._settings())

    def missing_intermediate(self, encoder: Encoder) -> list[Run]:
        """Intermediate models of a model that are not stored: the same ones for all tasks of a command."""
        if (first := self.intermediate) is None:
            return []
        seeds = range(max(self.protocol.seeds, self.protocol.selection_seeds))
        runs = [Run("intermediate", first.learning_rate, seed) for seed in seeds]
        return [run for run in runs if first.stored(self.store, encoder, run.seed) is None]

    def selection(self) -> list[Run]:
        """Runs that a model's learning rate, or threshold, is chosen by."""
        if not self.protocol.chooses(self.data.task):
            return []
        rates, seeds = self.protocol.rates(self.data.task), range(self.protocol.selection_seeds)
        return [Run("selection", rate, seed) for rate in rates for seed in seeds]

    def final(self, choice: Choice) -> list[Run]:
        return [Run("final", choice.learning_rate, seed) for seed in range(self.protocol.seeds)]

    def missing(self, encoder: Encoder) -> list[Run]:
        """Runs that can be computed now: those of the selection that are not stored or, if all are, final ones.

        Raises TaskError if no learning rate can be chosen.
        """
        stored = {run: self._stored(encoder, run) for run in self.selection()}
        if absent := [run for run, content in stored.items() if content is None]:
            return absent
        choice = self.choose(encoder, lambda run: stored[run] or {})
        return [run for run in self.final(choice) if self._stored(encoder, run) is None]

    def choose(self, encoder: Encoder, get: Callable[[Run], Content] | None = None) -> Choice:
        """The learning rate with the highest mean score on the held-out part of the training set; of equal ones the
        lowest. get: a run's content; by default it is computed if it is not stored. Raises TaskError if all diverge."""
        task = self.data.task
        rates = self.protocol.rates(task)
        if not self.protocol.chooses(task):
            return Choice(rates[0])
        content = {run: get(run) if get else self.run(encoder, run) for run in self.selection()}
        _, held_out = self._held_out
        truth = targets(task, self.data.labels, held_out)
        tried: list[Content] = []
        means: dict[float, float] = {}
        thresholds: dict[float, float | None] = {}
        for rate in rates:
            mine = [found for run, found in content.items() if run.learning_rate == rate]
            found = [None if run["diverged"] else run["predictions"]["held_out"] for run in mine]
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

    @cached_property
    def _held_out(self) -> tuple[Split, Split]:
        return hold_out(self.data.train, self.data.task)

    def _splits(self, run: Run) -> tuple[Split, dict[str, Split]]:
        """What a run trains on, and what it predicts."""
        if run.purpose == "final":
            return self.data.train if self.protocol.patience is None else self._held_out[0], self.data.dev
        fit, held_out = self._held_out
        return fit, {"held_out": held_out}

    def _stored(self, encoder: Encoder, run: Run) -> Content | None:
        return self.store.find(self._run_identity(encoder, run))

    def run(self, encoder: Encoder, run: Run, *, keep: Path | None = None) -> Content:
        """One fine-tuning, unless it is stored and no model is to be kept. `diverged` is None, or names the step.

        Raises TaskError for lack of memory; other errors have a note that names the run.
        """
        label = run.label(encoder)
        train, evaluate = self._splits(run)

        def make() -> Content:
            try:
                outcome = fine_tune(
                    encoder,
                    self.data.task,
                    self.data.labels,
                    train,
                    evaluate,
                    self.protocol.settings(self.data.task),
                    learning_rate=run.learning_rate,
                    seed=run.seed,
                    keep=keep,
                    held_out=None if self.protocol.patience is None else self._held_out[1],
                    weights=self.start(encoder, run.seed),
                )
            except DivergenceError as error:
                return {"diverged": str(error), "predictions": {}}
            except (MemoryError, torch.OutOfMemoryError):
                raise TaskError(
                    f"{self.data.task.name}: {label}: out of memory; lower --batch-size, --max-length or --jobs"
                ) from None
            except Exception as error:
                error.add_note(f"in the run {label} of {self.data.task.name}")
                raise
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            return {"diverged": None, **asdict(outcome), "versions": versions}

        content, stored = self.store.get(label, self._run_identity(encoder, run), make, repeat=keep is not None)
        if (encoder, run) in self.computed:
            self.done += 1  # reported already
        else:
            self._count(label, content, stored=stored)
        return content

    def start(self, encoder: Encoder, seed: int) -> Path | None:
        """Folder with the weights that runs of a seed start from; None for the encoder's own."""
        if self.intermediate is None:
            return None

        def report(label: str, content: Content, stored: bool) -> None:
            self.report(self.line(label, content, stored=stored, task=first.name))

        first = self.intermediate
        return first.weights(self.store, encoder, seed, report)

    def _run_identity(self, encoder: Encoder, run: Run) -> Content:
        return self._identity(run.purpose, *self._splits(run)) | {
            **encoder.identity,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            **self.protocol.settings(self.data.task).identity(),
            **({} if self.intermediate is None else {"intermediate": self.intermediate.identity()}),
        }

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

    def _count(self, label: str, content: Content, *, stored: bool) -> None:
        self.reused += stored
        self.done += not stored
        self.report(self.line(label, content, stored=stored))

    def task_of(self, run: Run) -> str:
        """Name of the task that a run trains on."""
        return self.intermediate.name if self.intermediate and run.purpose == "intermediate" else self.data.task.name

    def line(self, label: str, content: Content, *, stored: bool, task: str | None = None) -> str:
        """How a run ended. task: its name, by default that of this one."""
        how = "stored" if stored else f"{content.get('train_seconds') or 0:.0f} s"
        failed = f": {content['diverged']}" if content["diverged"] else ""
        return f"{task or self.data.task.name}: {label} ({how}){failed}"
