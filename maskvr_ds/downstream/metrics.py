"""Metrics of the downstream tasks, on many weightings of the examples at once, for the bootstrap.

n examples, R weightings. A metric maps truth and predictions of n examples and weights [R, n] to float64 [R]; a weight
is how often an example occurs in a resample, so that `metric(truth, predicted, counts)` is the metric of the repeated
examples. Where scikit-learn or scipy has the metric, the values are theirs; both compute one weighting per call, which
would take minutes for a bootstrap. An undefined correlation (one side is constant) is 0, as in GLUE's own scorer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from maskvr_ds.downstream import squad_scoring

Array = NDArray[np.float64]
Metric = Callable[[Sequence[Any], Sequence[Any], Array], Array]


def score(name: str, truth: Sequence[Any], predicted: Sequence[Any]) -> float:
    """The metric with every example counted once."""
    return float(METRICS[name](truth, predicted, np.ones((1, len(truth))))[0])


def accuracy(truth: Sequence[int], predicted: Sequence[int], weights: Array) -> Array:
    """Share of class indices [n] that are equal."""
    return weights @ np.equal(truth, predicted) / weights.sum(1)


def f1(truth: Sequence[int], predicted: Sequence[int], weights: Array) -> Array:
    """F1 of class 1; 0 if it occurs neither in the truth nor in the predictions."""
    t, p = np.equal(truth, 1), np.equal(predicted, 1)
    return _ratio(2 * (weights @ (t & p)), weights @ t + weights @ p)


def macro_f1(truth: Sequence[int], predicted: Sequence[int], weights: Array) -> Array:
    """Mean of the classes' F1 over those that occur in the truth or in the predictions."""
    t, p, correct = _class_counts(truth, predicted, weights)
    both = t + p
    return _ratio(2 * correct, both).sum(1) / (both > 0).sum(1)


def matthews(truth: Sequence[int], predicted: Sequence[int], weights: Array) -> Array:
    """Matthews correlation coefficient, of several classes as in Gorodkin 2004."""
    t, p, correct = _class_counts(truth, predicted, weights)
    total = weights.sum(1)
    covariance = correct.sum(1) * total - (t * p).sum(1)
    return _ratio(covariance, np.sqrt((total**2 - (t**2).sum(1)) * (total**2 - (p**2).sum(1))))


def pearson(truth: Sequence[float], predicted: Sequence[float], weights: Array) -> Array:
    """Pearson correlation."""
    x, y = (np.broadcast_to(np.asarray(side, np.float64), weights.shape) for side in (truth, predicted))
    return _correlation(x, y, weights)


def spearman(truth: Sequence[float], predicted: Sequence[float], weights: Array) -> Array:
    """Spearman correlation: Pearson's of the ranks, ties at their mean rank."""
    return _correlation(_ranks(truth, weights), _ranks(predicted, weights), weights)


def entity_f1(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], weights: Array) -> Array:
    """F1 of entities over all sentences: label, first and last token must agree; weights are those of the sentences."""
    pairs = [(set(entities(t)), set(entities(p))) for t, p in zip(truth, predicted, strict=True)]
    correct = np.array([len(t & p) for t, p in pairs])
    both = np.array([len(t) + len(p) for t, p in pairs])
    return _ratio(2 * (weights @ correct), weights @ both)


def exact_match(truth: Sequence[Sequence[str]], predicted: Sequence[str], weights: Array) -> Array:
    """Share of questions with a predicted answer that equals a true one (squad_scoring)."""
    return weights @ _each(squad_scoring.exact_match, truth, predicted) / weights.sum(1)


def squad_f1(truth: Sequence[Sequence[str]], predicted: Sequence[str], weights: Array) -> Array:
    """Mean F1 of the words of answers, by the rules of SQuAD 1.1."""
    return weights @ _each(partial(squad_scoring.f1, unanswerable=False), truth, predicted) / weights.sum(1)


def squad_v2_f1(truth: Sequence[Sequence[str]], predicted: Sequence[str], weights: Array) -> Array:
    """Mean F1 of the words of answers, by the rules of SQuAD 2.0."""
    return weights @ _each(partial(squad_scoring.f1, unanswerable=True), truth, predicted) / weights.sum(1)


METRICS: dict[str, Metric] = {
    function.__name__: function
    for function in (
        *(accuracy, f1, macro_f1, matthews, pearson, spearman, entity_f1),
        *(exact_match, squad_f1, squad_v2_f1),
    )
}


def _each(
    function: Callable[[Sequence[str], str], float], truth: Sequence[Sequence[str]], predicted: Sequence[str]
) -> Array:
    """Scores of the n questions."""
    return np.array([function(answers, answer) for answers, answer in zip(truth, predicted, strict=True)])


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of a sentence as (label, first token, last token).

    Tags are O or PREFIX-LABEL, by the rules of the shared task's scorer conlleval, which reads IOB1, IOB2 and IOBES: an
    entity starts at B, S, at another label than before, and after O or the end (E, S) of another.
    """
    found = []
    start, label = 0, ""
    previous = "O"
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        starts = prefix != "O" and (prefix in ("B", "S") or previous in ("O", "E", "S") or name != label)
        if previous != "O" and (starts or prefix == "O"):
            found.append((label, start, i - 1))
        if starts:
            start, label = i, name
        previous = prefix
    return found


def _class_counts(truth: Sequence[int], predicted: Sequence[int], weights: Array) -> tuple[Array, Array, Array]:
    """Weighted counts of each class [R, C]: of examples of the class, of predictions of it, and of those that are
    correct. Not a confusion matrix: a task may have thousands of classes."""
    t, p = np.asarray(truth), np.asarray(predicted)
    classes, n = int(max(t.max(), p.max())) + 1, len(t)

    def counts(chosen: NDArray[np.int64], ones: NDArray[np.bool_]) -> Array:
        member = sparse.csr_matrix((ones.astype(np.float64), (chosen, np.arange(n))), (classes, n))
        return (member @ weights.T).T

    every = np.ones(n, bool)
    return counts(t, every), counts(p, every), counts(t, t == p)


def _ranks(values: ArrayLike, weights: Array) -> Array:
    """Ranks [R, n], from 1, among the repeated examples; equal values have their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    size = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(size, axis=1) - (size - 1) / 2)[:, group]


def _correlation(x: Array, y: Array, weights: Array) -> Array:
    constant = np.logical_or(*(_is_constant(side, weights) for side in (x, y)))
    total = weights.sum(1, keepdims=True)
    # From the means: sums of squares would cancel.
    x, y = (side - (weights * side).sum(1, keepdims=True) / total for side in (x, y))
    spread = np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))
    return np.where(constant, 0.0, _ratio((weights * x * y).sum(1), spread))


def _is_constant(values: Array, weights: Array) -> NDArray[np.bool_]:
    drawn = weights > 0
    return np.max(values, axis=1, where=drawn, initial=-np.inf) <= np.min(values, axis=1, where=drawn, initial=np.inf)


def _ratio(above: Array, below: Array) -> Array:
    """above / below, and 0 where below is 0."""
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=below > 0)
