"""Weights of terms from their distribution over the classes of a training set.

Shapes: n examples, V terms, C classes. Of the examples in which a term occurs (at all: counts do not matter), with
a of class c, and b not, of P examples of class c and N others:

    tpr = a/P, fpr = b/N
    information gain   I(term; class), in nats, over all classes
    χ²                 max over c of n (a(N−b) − b(P−a))² / ((a+b)(n−a−b) P N)
    relevance frequency max over c of log₂(2 + a / max(1, b))     (Lan et al. 2009)
    idf                log((1 + n) / (1 + a + b)) + 1              (scikit-learn's)

Per-class functions are made global by their maximum over the classes (Debole & Sebastiani 2003). Loads no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TermCounts:
    """Examples that contain a term. present: float64 [C, V], of each class; sizes: float64 [C], examples per class."""

    present: Array
    sizes: Array

    @classmethod
    def of(cls, features: sparse.csr_matrix, classes: Sequence[int], number: int) -> "TermCounts":
        """From features [n, V], not 0 where a term occurs, and class indices [n] below `number`."""
        member = sparse.csr_matrix((np.ones(len(classes)), (classes, np.arange(len(classes)))), (number, len(classes)))
        occurs = features.copy()
        occurs.data = (occurs.data != 0).astype(np.float64)
        return cls((member @ occurs).toarray(), np.bincount(classes, minlength=number).astype(np.float64))

    @property
    def total(self) -> float:
        """n."""
        return float(self.sizes.sum())

    @property
    def rates(self) -> tuple[Array, Array]:
        """tpr and fpr, [C, V]; 0 where a class has no example, or all."""
        others = self.present.sum(0) - self.present
        return _ratio(self.present, self.sizes[:, None]), _ratio(others, (self.total - self.sizes)[:, None])


def term_frequency(counts: TermCounts) -> Array:
    """1: no weight beyond the term's frequency in the text."""
    return np.ones(counts.present.shape[1])


def inverse_document_frequency(counts: TermCounts) -> Array:
    """idf, [V]."""
    return np.log((1 + counts.total) / (1 + counts.present.sum(0))) + 1


def information_gain(counts: TermCounts) -> Array:
    """Mutual information of a term's presence and the class, in nats: [V]."""
    share = counts.sizes[:, None] / counts.total
    gain = np.zeros(counts.present.shape[1])
    for cells in (counts.present, counts.sizes[:, None] - counts.present):
        joint = cells / counts.total  # [C, V]
        expected = share * joint.sum(0)
        gain += np.sum(joint * np.log(np.divide(joint, expected, out=np.ones_like(joint), where=joint > 0)), axis=0)
    return np.maximum(gain, 0)


def chi_square(counts: TermCounts) -> Array:
    """Pearson's χ² of the 2 × 2 table of a term and a class, its maximum over the classes: [V]."""
    n, a, positives = counts.total, counts.present, counts.sizes[:, None]
    with_term = a.sum(0)
    b = with_term - a
    negatives = n - positives
    cross = a * (negatives - b) - b * (positives - a)
    return _ratio(n * cross**2, with_term * (n - with_term) * positives * negatives).max(0)


def relevance_frequency(counts: TermCounts) -> Array:
    """log₂(2 + a / max(1, b)), its maximum over the classes: [V]."""
    others = counts.present.sum(0) - counts.present
    return np.log2(2 + counts.present / np.maximum(1, others)).max(0)


# Name on the command line -> weights [V] from the counts of a training set.
WEIGHTS: dict[str, Callable[[TermCounts], Array]] = {
    "tf": term_frequency,
    "information_gain": information_gain,
    "chi2": chi_square,
    "relevance_frequency": relevance_frequency,
}


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)
