"""One-way random effects of vectors: how much of their variance lies between sequences, how much within.

N sequences, R draws each, G layers; variance of a vector means the trace of its covariance, E‖g − E g‖².

    g_nr = μ + a_n + e_nr,   V_d = E‖a‖² (data),   V_m = E‖e‖² (mask)

With W_n the variance of g_n1 … g_nR (divisor R − 1) and S² that of the N means (divisor N − 1),

    V_m ≈ mean W_n,   V_d ≈ S² − V_m / R,

both unbiased (Searle, Casella & McCulloch 1992, Variance Components, §3.6: the analysis of variance). V_d may come out
below 0. S² needs no vectors, only the means' inner products.

A draw may be a mean over the J masks of a sequence that share a batch. A batch of B forward passes then has B/J
sequences, and its gradient the variance (J V_d + V_m(J)) / B with V_m(J) = J · (variance of a draw).

Every figure is a function of how often each sequence is counted, so bootstrap over sequences and jackknife evaluate the
same function, and figures of two strategies on the same sequences are resampled together. Intervals: BCa (Efron 1987,
"Better bootstrap confidence intervals"). The bootstrap's S² is multiplied by N/(N − 1), which makes its mean right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from maskvr_ds import hashing

Floats = NDArray[np.float64]
_RESAMPLES = 2000


@dataclass(frozen=True)
class VarianceComponents:
    """What is kept of N × R gradients.

    within: float64 [N, G], W_n. gram: float64 [G, N, N], inner products of the sequences' means.
    norm_variance: float64 [N], the variance of ‖g_n1‖ … ‖g_nR‖ (divisor R − 1).
    draws: R. segments: J, masks a draw.
    """

    within: Floats
    gram: Floats
    norm_variance: Floats
    draws: int
    segments: int = 1


@dataclass(frozen=True)
class Counts:
    """How often every sequence is counted: float64 [C, N], C ways. inflation: what S² is multiplied with."""

    counts: Floats
    inflation: float = 1.0


class Resampling:
    """The sample itself, all samples without one sequence, and bootstrap samples, the same for equal seeds.

    Raises ValueError below 3 sequences.
    """

    def __init__(self, sequences: int, *, seed: int, level: float) -> None:
        if sequences < 3:
            raise ValueError(f"{sequences} sequences; intervals need at least 3")
        random = np.random.default_rng(hashing.fold(seed, sequences) & (1 << 63) - 1)
        drawn = random.multinomial(sequences, np.full(sequences, 1 / sequences), size=_RESAMPLES)
        self.level = level
        self._ways = (
            Counts(np.ones((1, sequences))),
            Counts(1.0 - np.eye(sequences)),
            Counts(drawn.astype(np.float64), sequences / (sequences - 1)),
        )

    def interval(self, figure: Callable[[Counts], Floats]) -> list[tuple[float, float, float]]:
        """figure: Counts of C ways → float64 [C, F]. Returns (estimate, low, high) of each of the F figures."""
        whole, without, resampled = (figure(way) for way in self._ways)
        return [self._bca(*columns) for columns in zip(whole[0], without.T, resampled.T, strict=True)]

    def _bca(self, estimate: float, without: Floats, resampled: Floats) -> tuple[float, float, float]:
        normal = NormalDist()
        # Ties count half: a figure that does not vary has an interval of one point. A resampling that takes every
        # sequence once is one, but sums in another order.
        tied = np.isclose(resampled, estimate, rtol=1e-9, atol=0)
        below = np.mean((resampled < estimate) & ~tied) + np.mean(tied) / 2
        edge = 1 / (2 * len(resampled))
        bias = normal.inv_cdf(min(max(float(below), edge), 1 - edge))
        influence = without.mean() - without
        squares = float((influence**2).sum())
        acceleration = float((influence**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
        ends = []
        for tail in ((1 - self.level) / 2, (1 + self.level) / 2):
            z = bias + normal.inv_cdf(tail)
            ends.append(normal.cdf(bias + z / max(1 - acceleration * z, 1e-3)))
        low, high = np.quantile(resampled, ends)
        return float(estimate), float(low), float(high)


def variances(moments: VarianceComponents, ways: Counts) -> tuple[Floats, Floats]:
    """V_d and V_m(J) of the layers, and last of the whole gradient: two float64 [C, G + 1]."""
    counts = ways.counts
    total = counts.sum(1, keepdims=True)
    within = counts @ moments.within / total
    own = counts @ np.diagonal(moments.gram, axis1=1, axis2=2).T
    joint = np.einsum("gcn,cn->cg", counts @ moments.gram, counts)
    between = ways.inflation * (own - joint / total) / (total - 1)
    data, mask = between - within / moments.draws, moments.segments * within
    return tuple(np.concatenate([v, v.sum(1, keepdims=True)], axis=1) for v in (data, mask))  # type: ignore[return-value]


def whole_mask_variance(moments: VarianceComponents, ways: Counts) -> Floats:
    """V_m of an ideal proposal of whole masks, q(M) ∝ p(M) ‖g(M)‖ with weights p/q: float64 [C, 1].

    The second moment of its weighted gradient is (E_p‖g‖)² instead of E_p‖g‖²: of each sequence the variance of the
    norm is saved, and nothing else changes.
    """
    _, mask = variances(moments, ways)
    saved = ways.counts @ moments.norm_variance / ways.counts.sum(1)
    return mask[:, -1:] - saved[:, None]
