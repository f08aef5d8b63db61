"""One-way random-effects model of vectors: variance components between and within sequences, with BCa intervals.

N sequences, R draws each, G layers; the variance of a vector is the trace of its covariance, E‖g − E g‖².

    g_nr = μ + a_n + e_nr,   V_d = E‖a‖² (data),   V_m = E‖e‖² (mask)

With W_n the variance of g_n1 … g_nR (divisor R − 1) and S² that of the N means (divisor N − 1),

    V_m ≈ mean W_n,   V_d ≈ S² − V_m / R,

both unbiased (Searle, Casella & McCulloch 1992, Variance Components, §3.6: the analysis of variance). The estimate of
V_d can be negative. S² needs only the inner products of the means, not the vectors.

A draw may be a mean over the J masks of a sequence that share a batch. A batch of B forward passes then has B/J
sequences, and its gradient the variance (J V_d + V_m(J)) / B with V_m(J) = J · (variance of a draw).

Sequences may have different numbers of predictions k_n. A batch's gradient is then a ratio, Σ of the sequences' sums
of gradients over Σ k_n, whose variance to first order is that of the residuals g_n − c_n μ with c_n = k_n / mean k and
the ratio's mean μ (Cochran 1977, Sampling Techniques, §2.11): a sequence with few predictions has a small gradient, and
little weight. Without it, V_d would count the differences of k_n themselves.

Every statistic is a function of the count of each sequence, so that the bootstrap over sequences and the jackknife
evaluate the same function, and statistics of two strategies on the same sequences are resampled together. Intervals:
BCa (Efron 1987, "Better bootstrap confidence intervals"), implemented here because the package does not depend on
SciPy. The bootstrap's S² is multiplied by N/(N − 1), which makes it unbiased.
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
    """Sufficient statistics of N × R gradients.

    within: float64 [N, G], W_n. gram: float64 [G, N, N], inner products of the sequences' means.
    norm_variance: float64 [N], the variance of ‖g_n1‖ … ‖g_nR‖ (divisor R − 1).
    draws: R. segments: J, masks per draw. sizes: float64 [N], c_n, with mean 1; None if all are 1.
    cross: float64 [N, N], inner products of the sequences' means with those of the goal (progress.py); None if unknown.
    """

    within: Floats
    gram: Floats
    norm_variance: Floats
    draws: int
    segments: int = 1
    sizes: Floats | None = None
    cross: Floats | None = None

    @property
    def relative_sizes(self) -> Floats:
        """c_n, float64 [N]."""
        return np.ones(self.gram.shape[1]) if self.sizes is None else self.sizes


@dataclass(frozen=True)
class Counts:
    """C resamples as counts of every sequence: float64 [C, N]. inflation: factor applied to S²."""

    counts: Floats
    inflation: float = 1.0


class Resampling:
    """The sample, its jackknife samples and bootstrap samples, which are a function of the seed.

    Raises ValueError for fewer than 3 sequences.
    """

    def __init__(self, sequences: int, *, seed: int, level: float) -> None:
        if sequences < 3:
            raise ValueError(f"{sequences} sequences; confidence intervals need at least 3")
        random = np.random.default_rng(hashing.fold(seed, sequences) & (1 << 63) - 1)
        drawn = random.multinomial(sequences, np.full(sequences, 1 / sequences), size=_RESAMPLES)
        self.level = level
        self._ways = (
            Counts(np.ones((1, sequences))),
            Counts(1.0 - np.eye(sequences)),
            Counts(drawn.astype(np.float64), sequences / (sequences - 1)),
        )

    def interval(self, figure: Callable[[Counts], Floats]) -> list[tuple[float, float, float]]:
        """(estimate, low, high) of each of the F statistics of `figure`: C resamples → float64 [C, F]."""
        full, without, resampled = (figure(way) for way in self._ways)
        return [self._bca(*columns) for columns in zip(full[0], without.T, resampled.T, strict=True)]

    def _bca(self, estimate: float, without: Floats, resampled: Floats) -> tuple[float, float, float]:
        normal = NormalDist()
        # Ties count half, so that a constant statistic has an interval of one point. A resample with every sequence
        # once is a tie, but sums in a different order.
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
    """V_d and V_m(J), each float64 [C, G + 1]: of the G layers, then of the full gradient."""
    counts, sizes = ways.counts, moments.relative_sizes
    total, predicted = counts.sum(1, keepdims=True), (counts @ sizes)[:, None]
    # Gradients per prediction of the resample.
    scale = (total / predicted) ** 2
    within = scale * (counts @ moments.within) / total
    own = counts @ np.diagonal(moments.gram, axis1=1, axis2=2).T
    with_sum = counts @ moments.gram
    joint = np.einsum("gcn,cn->cg", with_sum, counts)
    sized = np.einsum("gcn,cn->cg", with_sum, counts * sizes)
    residuals = own - 2 * sized / predicted + (counts @ sizes**2)[:, None] * joint / predicted**2
    between = ways.inflation * scale * residuals / (total - 1)
    data, mask = between - within / moments.draws, moments.segments * within
    return tuple(np.concatenate([v, v.sum(1, keepdims=True)], axis=1) for v in (data, mask))  # type: ignore[return-value]


def whole_mask_variance(moments: VarianceComponents, ways: Counts) -> Floats:
    """V_m of the ideal proposal of complete masks, q(M) ∝ p(M) ‖g(M)‖ with weights p/q: float64 [C, 1].

    The second moment of its weighted gradient is (E_p‖g‖)² instead of E_p‖g‖²: for each sequence the variance of the
    norm is removed, and nothing else changes.
    """
    _, mask = variances(moments, ways)
    total, predicted = ways.counts.sum(1), ways.counts @ moments.relative_sizes
    saved = (total / predicted) ** 2 * (ways.counts @ moments.norm_variance) / total
    return mask[:, -1:] - saved[:, None]
