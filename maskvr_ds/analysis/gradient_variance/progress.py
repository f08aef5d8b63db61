"""Progress of a step towards a goal: what masks and rates are chosen by.

Goal: the gradient G of the loss that is judged, that of uniform masks at the held-out rate. A step along the gradient g
of a batch of B passes, of the best length for a loss of equal curvature in all directions, gains in proportion to

    p = (E[g]·G / ‖G‖)² / (‖E[g]‖² + tr Var(g) / B),        0 ≤ p ≤ 1.

p is the squared cosine of the angle between E[g] and G, times the share of E‖g‖² that is not noise. For small B the
noise decides, for large B the angle. Divided by the seconds of a step: progress per second.

N sequences, C resamples as counts of 0 or 1. With m_n and M_n the means of a sequence's gradients under the masks in
question and under the goal's, per prediction and relative to k_n as in random_effects.py,

    E[g]·G      from ⟨m_a, M_b⟩, a ≠ b            its square from ⟨m_a, M_b⟩ ⟨m_c, M_d⟩, all four different
    ‖E[g]‖²     from ⟨m_a, m_b⟩, a ≠ b            ‖G‖² likewise
    tr Var(g)   J V_d + V_m(J), random_effects.py

Products of different sequences are products of independent draws: every one of the four is unbiased. Their quotient p
has a bias of order 1/N. Intervals: jackknife over sequences of log p, Student's t (Efron & Stein 1981; Arvesen 1969 for
functions of U-statistics). Not the bootstrap: a resample has sequences twice, whose products are not independent.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from maskvr_ds.analysis.gradient_variance.random_effects import Counts, Floats, VarianceComponents, variances

# (estimate, low, high); NaN if undefined.
Interval = tuple[float, float, float]
# p needs four different sequences, and the jackknife one more.
MINIMUM_SEQUENCES = 5


def product(inner: Floats, counts: Floats) -> Floats:
    """E⟨a, b⟩ of different sequences: float64 [N, N], [C, N] of 0 and 1 → [C]."""
    total = counts.sum(1)
    return (np.einsum("cn,nm,cm->c", counts, inner, counts) - counts @ np.diagonal(inner)) / (total * (total - 1))


def squared_product(inner: Floats, counts: Floats) -> Floats:
    """(E⟨a, b⟩)² from ⟨a, b⟩⟨c, d⟩ of four different sequences: float64 [N, N], [C, N] of 0 and 1 → [C].

    All pairs of pairs, without those that share a sequence, by inclusion and exclusion.
    """
    total = counts.sum(1)
    apart = inner - np.diag(np.diagonal(inner))
    first, second = counts @ apart.T * counts, counts @ apart * counts  # Σ_b ⟨a, b⟩ by a; Σ_a by b
    shared = (first**2 + second**2 + 2 * first * second).sum(1)
    twice = np.einsum("cn,nm,cm->c", counts, apart**2 + apart * apart.T, counts)
    pairs = first.sum(1) ** 2 - shared + twice
    return pairs / (total * (total - 1) * (total - 2) * (total - 3))


def batch_variance(moments: VarianceComponents, ways: Counts) -> Floats:
    """B · tr Var(g) = J V_d + V_m(J) of the full gradient: float64 [C]."""
    data, mask = variances(moments, ways)
    return moments.segments * data[:, -1] + mask[:, -1]


def gain(moments: VarianceComponents, counts: Floats, batch: float, variance: Floats | None = None) -> Floats:
    """p · ‖G‖² = (E[g]·G)² / (‖E[g]‖² + tr Var(g) / B): float64 [C]. The factor is that of the goal alone.

    variance: float64 [C], B · tr Var(g), if it is not that of `moments`.
    """
    assert moments.cross is not None
    sizes = counts @ moments.relative_sizes / counts.sum(1)
    squared = squared_product(moments.cross, counts) / sizes**2
    mean = product(moments.gram.sum(0), counts) / sizes**2
    noise = batch_variance(moments, Counts(counts)) if variance is None else variance
    with np.errstate(divide="ignore", invalid="ignore"):
        return squared / (mean + noise / batch)


def progress(moments: VarianceComponents, goal: VarianceComponents, counts: Floats, batch: float) -> Floats:
    """p: float64 [C]. goal: components of uniform masks at the held-out rate on the same sequences."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # The goal's number of predictions cancels.
        return gain(moments, counts, batch) / product(goal.gram.sum(0), counts)


def jackknife(figure: Callable[[Floats], Floats], sequences: int, level: float) -> Interval:
    """Interval of a positive statistic, counts [C, N] → [C]; NaN if it or one of its jackknife values is not positive.

    Raises ValueError for fewer than MINIMUM_SEQUENCES sequences.
    """
    if sequences < MINIMUM_SEQUENCES:
        raise ValueError(f"{sequences} sequences; progress needs at least {MINIMUM_SEQUENCES}")
    (full,) = figure(np.ones((1, sequences)))
    without = figure(1.0 - np.eye(sequences))
    if not (np.isfinite(full) and full > 0):
        return float("nan"), float("nan"), float("nan")
    if not (np.isfinite(without) & (without > 0)).all():
        return float(full), float("nan"), float("nan")
    logs = np.log(without)
    error = float(np.sqrt((sequences - 1) / sequences * ((logs - logs.mean()) ** 2).sum()))
    width = np.exp(student(0.5 + level / 2, sequences - 1) * error)
    return float(full), float(full / width), float(full * width)


def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t: Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5), to 1% from 4 degrees on."""
    z, f = NormalDist().inv_cdf(probability), freedom
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


def progress_figures(
    moments: VarianceComponents,
    baseline: VarianceComponents,
    goal: VarianceComponents,
    *,
    batch: int,
    cost: float,
    level: float,
) -> dict[str, Any]:
    """Progress p of a step of `batch` sequences, relative to the baseline's, and that per cost: [estimate, low, high]
    each. cost: of a step, relative to the baseline's."""

    def ratio(counts: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return gain(moments, counts, batch) / gain(baseline, counts, batch)

    sequences = len(goal.within)
    value = jackknife(lambda counts: progress(moments, goal, counts, batch), sequences, level)
    relative = jackknife(ratio, sequences, level)
    per_cost = tuple(x / cost for x in relative)
    return {
        name: [x if np.isfinite(x) else None for x in found]
        for name, found in (("value", value), ("ratio", relative), ("per_cost", per_cost))
    }
