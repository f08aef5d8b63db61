"""Differences between rows of a table: paired bootstrap over the examples of an evaluation set.

A resample draws the n examples with replacement, the same for both rows, and for each row as many of its final runs as
it has, with replacement. An interval therefore covers which examples the set has, and which seeds were run; with few
seeds it is somewhat too narrow. A difference whose interval contains 0 is within noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskvr_ds.downstream.metrics import METRICS

RESAMPLES, LEVEL = 2000, 0.95
_SEED = 190_606
# Weights computed at once.
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Difference:
    """first − second, as means over runs. low, high: of the 95% interval."""

    first: str
    second: str
    difference: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        return self.low <= 0 <= self.high


def differences(
    metric: str, truth: Sequence[Any], predictions: dict[str, list[list[Any]]], resamples: int = RESAMPLES
) -> list[Difference]:
    """All pairs of rows. predictions: row -> one list of n predictions per run."""
    function = METRICS[metric]
    n = len(truth)
    ones = np.ones((1, n))
    measured = {
        row: float(np.mean([function(truth, run, ones)[0] for run in runs])) for row, runs in predictions.items()
    }
    resampled: dict[str, list[NDArray[np.float64]]] = {row: [] for row in predictions}
    random = np.random.default_rng(_SEED)
    for weights in _weights(n, resamples, random):
        for row, runs in predictions.items():
            scores = np.stack([function(truth, run, weights) for run in runs])  # [runs, resamples of the chunk]
            drawn = random.integers(len(runs), size=scores.shape)
            resampled[row].append(np.take_along_axis(scores, drawn, axis=0).mean(0))
    means = {row: np.concatenate(parts) for row, parts in resampled.items()}
    tail = (1 - LEVEL) / 2
    found = []
    for first, second in combinations(predictions, 2):
        low, high = np.quantile(means[first] - means[second], [tail, 1 - tail])
        found.append(Difference(first, second, measured[first] - measured[second], float(low), float(high)))
    return found


def changes(
    metric: str, truth: Sequence[Any], before: Sequence[Sequence[Any]], after: Sequence[Sequence[Sequence[Any]]]
) -> list[tuple[float, float, float]]:
    """Change of a metric by each of several changes of S models: mean over models, and its 95% interval.

    before: predictions of n examples by each model. after: for each change, those of the changed models. A resample
    draws examples, and models with replacement; a model's own score before is subtracted from that after.
    """
    function, n, models = METRICS[metric], len(truth), len(before)

    def scores(runs: Sequence[Sequence[Any]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([function(truth, run, weights) for run in runs])  # [S, resamples of the chunk]

    ones = np.ones((1, n))
    measured = [float((scores(changed, ones) - scores(before, ones)).mean()) for changed in after]
    resampled: list[list[NDArray[np.float64]]] = [[] for _ in after]
    random = np.random.default_rng(_SEED)
    for weights in _weights(n, RESAMPLES, random):
        base = scores(before, weights)
        drawn = random.integers(models, size=base.shape)
        for parts, changed in zip(resampled, after, strict=True):
            parts.append(np.take_along_axis(scores(changed, weights) - base, drawn, axis=0).mean(0))
    tail = (1 - LEVEL) / 2
    intervals = [np.quantile(np.concatenate(parts), [tail, 1 - tail]) for parts in resampled]
    return [(mean, float(low), float(high)) for mean, (low, high) in zip(measured, intervals, strict=True)]


def _weights(n: int, resamples: int, random: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """How often each of n examples is drawn, [resamples of the chunk, n]."""
    size = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
