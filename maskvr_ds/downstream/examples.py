"""Examples of a task: the training set, the part of it that is held out for choices, and the evaluation sets."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maskvr_ds.downstream.tasks import Kind, Task, TaskError

# Share of the training set on which hyperparameters are chosen, and its maximum number of examples.
HELD_OUT_SHARE, HELD_OUT_MAXIMUM = 0.1, 2000
# Of the split and of the subset --max-train: equal for all models, learning rates and seeds.
_SPLIT_SEED = 20_190_610
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """n examples. texts: one or two texts each; of a token task the tokens. labels: a name, a number, or tags each."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of texts and labels, in order."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()

    def subset(self, indices: Sequence[int]) -> "Split":
        return Split(tuple(self.texts[i] for i in indices), tuple(self.labels[i] for i in indices))

    @property
    def empty_texts(self) -> int:
        """Number of examples with a text of white space, or no token."""
        return sum(not texts or not all(text.strip() for text in texts) for texts in self.texts)


@dataclass(frozen=True)
class TaskData:
    """A task's files. dev: name of an evaluation set -> examples. skipped: damaged rows of a GLUE file."""

    task: Task
    train: Split
    dev: dict[str, Split]
    skipped: int = 0

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, or tags, in the order of their indices; none for regression."""
        if self.task.kind is Kind.REGRESSION:
            return ()
        return self.task.labels or tuple(sorted(_names(self.train, self.task)))


def limited(data: TaskData, maximum: int | None) -> TaskData:
    """The task with at most `maximum` training examples, drawn once for all models and seeds."""
    if maximum is None or maximum >= len(data.train):
        return data
    drawn = np.random.default_rng(_SPLIT_SEED).permutation(len(data.train))[:maximum]
    return TaskData(data.task, data.train.subset(sorted(drawn.tolist())), data.dev, data.skipped)


def hold_out(train: Split, task: Task) -> tuple[Split, Split]:
    """A training set without the examples held out for choices, and these; of each class the same share.

    Depends on the training set alone. Raises TaskError if it is too small.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(train)).tolist()
    share = min(HELD_OUT_SHARE, HELD_OUT_MAXIMUM / len(train))
    by_class: dict[Any, list[int]] = {}
    for i in order:
        by_class.setdefault(train.labels[i] if task.kind is Kind.CLASSIFICATION else None, []).append(i)
    chosen = {i for members in by_class.values() for i in members[: round(share * len(members))]}
    if not chosen:
        raise TaskError(
            f"{task.name}: no learning rate can be chosen on a tenth of {len(train)} training examples; name one with "
            "--learning-rates, or take more examples"
        )
    rest = [i for i in range(len(train)) if i not in chosen]
    return train.subset(rest), train.subset(sorted(chosen))


def check(data: TaskData) -> None:
    """Raise TaskError if models cannot be fine-tuned and evaluated on the task: an empty part, a single class, a label
    of an evaluation set that the training set lacks, or a constant evaluation set of a regression."""
    task = data.task
    for name, split in {"training": data.train, **data.dev}.items():
        if not len(split):
            raise TaskError(f"{task.name}: the {name} set is empty")
    if task.kind is Kind.REGRESSION:
        if len(set(data.train.labels)) == 1:
            raise TaskError(f"{task.name}: all numbers of the training set are {data.train.labels[0]}")
        return
    known = _names(data.train, task)
    if len(known) < 2:
        raise TaskError(f"{task.name}: all training examples have the label {min(known)!r}; at least two are needed")
    for name, split in data.dev.items():
        if unknown := _names(split, task) - known:
            raise TaskError(
                f"{task.name}: the {name} set has labels that the training set ({len(data.train):,} examples) lacks: "
                f"{', '.join(map(repr, sorted(unknown)[:_SHOWN]))}"
            )


def _names(split: Split, task: Task) -> set[str]:
    if task.kind is Kind.TOKENS:
        return {tag for tags in split.labels for tag in tags}
    return set(split.labels)


def describe(data: TaskData) -> dict[str, Any]:
    """Counts for a report: examples, classes, damaged rows, examples with an empty text."""
    counts = Counter(data.train.labels) if data.task.kind is Kind.CLASSIFICATION else None
    return {
        "train": len(data.train),
        **{name: len(split) for name, split in data.dev.items()},
        **({"train_by_label": {label: counts[label] for label in data.labels}} if counts else {}),
        "skipped_rows": data.skipped,
        "empty_texts": data.train.empty_texts + sum(split.empty_texts for split in data.dev.values()),
    }
