"""Bags of words with supervised term weights: further rows of a task's table, without an encoder.

They differ from the row `bag of words` in the weights of the terms alone: the same words and word pairs, (1 + log tf)
times the weight, texts of unit length, logistic regression, and regularisation chosen on the same held-out part of the
training set. Weights are computed from the training set: without its held-out part as long as something is chosen.

Of a pair of texts, a term occurs in the example if the two texts have it unequally often: what they share is no
evidence of how they relate, to a linear model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from maskvr_ds.downstream.baselines import TOKEN_PATTERN, choose_linear, fitted, targets
from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.learning_to_weight import Learned, learn
from maskvr_ds.downstream.store import Content
from maskvr_ds.downstream.tasks import LEARNING_TO_WEIGHT, WEIGHTED_ROWS, Kind, Task, TaskError
from maskvr_ds.downstream.term_weights import WEIGHTS, Array, TermCounts


def check_weightable(task: Task, baselines: tuple[str, ...]) -> None:
    """Raise TaskError if the task has no classes that terms could be weighted by. baselines: names of weights."""
    if baselines and task.kind is not Kind.CLASSIFICATION:
        raise TaskError(
            f"{task.name}: weights of terms ({', '.join(baselines)}) need classes, and this is no classification; "
            "choose other tasks, or leave them out"
        )


class WeightedWords:
    """Words and word pairs of texts with a weight each."""

    def __init__(self, task: Task, train: Split) -> None:
        self._words = fitted(
            TfidfVectorizer(
                ngram_range=(1, 2), sublinear_tf=True, use_idf=False, norm=None, token_pattern=TOKEN_PATTERN
            ),
            task,
            train,
        )
        self.weights: Array = np.ones(len(self._words.vocabulary_))

    def unweighted(self, split: Split) -> sparse.csr_matrix:
        """1 + log tf of the examples, float64 [n, V]; of pairs the absolute difference of the two texts."""
        return difference([self._words.transform(texts) for texts in zip(*split.texts, strict=True)])

    def transform(self, texts: Any) -> sparse.csr_matrix:
        """Weighted texts of unit length, float64 [n, V]."""
        return normalize(self._words.transform(texts) @ sparse.diags(self.weights)).tocsr()


def difference(sides: Sequence[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Features of one text, or the absolute difference of those of two, without stored zeros: [n, V]."""
    if len(sides) == 1:
        return sides[0]
    found = abs(sides[0] - sides[1]).tocsr()
    found.eliminate_zeros()
    return found


def weighted_bag(data: TaskData, name: str, seed: int) -> Content:
    """Predictions of a bag of words with the weights of this name; strength of regularisation; for `ltw` the round and
    held-out accuracy of the learned function. seed: of `ltw`."""
    learned = learn_weights(data, seed) if name == LEARNING_TO_WEIGHT else None

    def vectorise(train: Split) -> WeightedWords:
        words = WeightedWords(data.task, train)
        counts = _counts(words, train, data)
        words.weights = learned.function.weights(counts) if learned else WEIGHTS[name](counts)
        return words

    predictions, strength = choose_linear(data, vectorise)
    how = {"round": learned.round, "held_out_accuracy": learned.accuracy} if learned else {}
    return {"predictions": predictions, "strength": strength, "diverged": None, **how}


def learn_weights(data: TaskData, seed: int) -> Learned:
    """Learning to Weight on the training set, stopped by its held-out part."""
    fit, held_out = hold_out(data.train, data.task)
    words = WeightedWords(data.task, fit)
    sides = [(words.unweighted(split), targets(data.task, data.labels, split)) for split in (fit, held_out)]
    return learn(*sides[0], *sides[1], number=len(data.labels), seed=seed)


def _counts(words: WeightedWords, train: Split, data: TaskData) -> TermCounts:
    return TermCounts.of(words.unweighted(train), targets(data.task, data.labels, train), len(data.labels))


assert set(WEIGHTED_ROWS) == {*WEIGHTS, LEARNING_TO_WEIGHT}
