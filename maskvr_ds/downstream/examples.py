"""Examples of a task: the training set, the part of it that is held out for choices, and the evaluation sets."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from maskvr_ds.downstream.tasks import Kind, Task, TaskError

# Share of the training set on which hyperparameters are chosen, and its maximum number of examples.
HELD_OUT_SHARE, HELD_OUT_MAXIMUM = 0.1, 2000
# Of the split and of the subset --max-train: equal for all models, learning rates and seeds.
_SPLIT_SEED = 20_190_610
# Held-out examples that a training set of many small classes should give.
_MANY = 10
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """n examples. texts: one or two texts each; of a token task the tokens. labels: a name, a number, or tags each; of
    a question the answers, each as (text, offset in the context), none if it has no answer."""

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

    @property
    def misplaced_answers(self) -> int:
        """Number of questions with answers, none of which is in the context at its offset."""
        return sum(
            bool(answers) and first_placed(context, answers) is None
            for (_, context), answers in zip(self.texts, self.labels, strict=True)
        )


def first_placed(context: str, answers: Sequence[tuple[str, int]]) -> tuple[int, int] | None:
    """Characters [first, end) of the first answer that is in the context at its offset; None if none is."""
    for text, start in answers:
        if text and start >= 0 and context[start : start + len(text)] == text:
            return start, start + len(text)
    return None


@dataclass(frozen=True)
class TaskData:
    """A task's files. dev: name of an evaluation set -> examples. skipped: damaged rows of a GLUE file."""

    task: Task
    train: Split
    dev: dict[str, Split]
    skipped: int = 0

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, or tags, in the order of their indices; none for regression and questions."""
        if self.task.kind in (Kind.REGRESSION, Kind.SPAN):
            return ()
        return self.task.labels or tuple(sorted(_names(self.train, self.task)))


def limited(data: TaskData, maximum: int | None, option: str = "--max-train") -> TaskData:
    """The task with at most `maximum` training examples, drawn once for all models and seeds.

    option: what names the maximum. Raises TaskError if models cannot be fine-tuned on so few (`check`).
    """
    if maximum is None or maximum >= len(data.train):
        return data
    drawn = np.random.default_rng(_SPLIT_SEED).permutation(len(data.train))[:maximum]
    found = TaskData(data.task, data.train.subset(sorted(drawn.tolist())), data.dev, data.skipped)
    try:
        check(found)
    except TaskError as error:
        raise TaskError(f"{option} {maximum}: {error}; raise it") from None
    return found


def hold_out(train: Split, task: Task) -> tuple[Split, Split]:
    """A training set without the examples held out for choices, and these; of each class the same share, and all
    questions on a context or none.

    Depends on the training set alone. Raises TaskError if it is too small.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(train)).tolist()
    share = min(HELD_OUT_SHARE, HELD_OUT_MAXIMUM / len(train))
    if task.kind is Kind.SPAN:
        contexts = list(dict.fromkeys(train.texts[i][1] for i in order))
        drawn = set(contexts[: max(round(share * len(contexts)), len(contexts) > 1)])
        chosen = {i for i in order if train.texts[i][1] in drawn}
    else:
        by_class: dict[Any, list[int]] = {}
        for i in order:
            by_class.setdefault(train.labels[i] if task.kind is Kind.CLASSIFICATION else None, []).append(i)
        chosen = {i for members in by_class.values() for i in members[: round(share * len(members))]}
        intended = round(share * len(train))
        if 2 * len(chosen) < intended >= _MANY:
            # Most classes are too small for a share of their own: one example of each, until there are enough.
            small = (members[0] for members in by_class.values() if len(members) > 1 and members[0] not in chosen)
            chosen.update(islice(small, intended - len(chosen)))
    if not chosen:
        raise TaskError(
            f"{task.name}: nothing can be held out of {len(train)} training examples for the choice of a learning rate "
            "or of the strength of regularisation; take more examples"
        )
    rest = [i for i in range(len(train)) if i not in chosen]
    return train.subset(rest), train.subset(sorted(chosen))


def check(data: TaskData) -> None:
    """Raise TaskError if models cannot be fine-tuned and evaluated on the task: an empty part, no word in the training
    texts, a single class, a label of an evaluation set that the training set lacks, or equal numbers in a part of a
    regression, whose correlations are undefined then."""
    task = data.task
    for name, split in {"training": data.train, **data.dev}.items():
        if not len(split):
            raise TaskError(f"{task.name}: the {name} set is empty")
    if not any(text.strip() for texts in data.train.texts for text in texts):
        raise TaskError(f"{task.name}: the training texts have no word")
    if task.kind is Kind.REGRESSION:
        for name, split in {"training": data.train, **data.dev}.items():
            if len(set(split.labels)) == 1:
                raise TaskError(f"{task.name}: all numbers of the {name} set are {split.labels[0]}")
        return
    if task.kind is Kind.SPAN:
        _check_questions(data)
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


def _check_questions(data: TaskData) -> None:
    task, train = data.task, data.train
    if not any(map(first_placed, (context for _, context in train.texts), train.labels)):
        raise TaskError(f"{task.name}: no training question has an answer that is in its context at its offset")
    for name, split in {"training": train, **data.dev}.items():
        without = split.labels.count(())
        if without and not task.unanswerable:
            raise TaskError(
                f"{task.name}: {without:,} questions of the {name} set have no answer, and its rules have none for "
                "them; evaluate on squad_v2"
            )
    if task.unanswerable and () not in train.labels:
        raise TaskError(
            f"{task.name}: all {len(train):,} training questions have an answer, so that a model cannot learn to give "
            "none; evaluate on squad"
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
        **({"misplaced_answers": _misplaced(data)} if data.task.kind is Kind.SPAN else {}),
        "skipped_rows": data.skipped,
        "empty_texts": data.train.empty_texts + sum(split.empty_texts for split in data.dev.values()),
    }


def _misplaced(data: TaskData) -> int:
    return data.train.misplaced_answers + sum(split.misplaced_answers for split in data.dev.values())
