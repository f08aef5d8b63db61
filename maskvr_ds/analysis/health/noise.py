"""Gradient noise scale and critical batch (McCandlish et al. 2018, arXiv:1812.06162).

B_simple = tr Σ / |G|², in sequences: Σ the covariance of a sequence's gradient, by data and by masks, G the mean
gradient. A step of much more than B_simple sequences is hardly better than one of B_simple; the critical batch, at
which a run takes twice the minimum of steps, is about B_simple (their equation 2.11).

Both come from the variance instrument (analysis/gradient_variance), without bias: tr Σ = V_d + V_m, and |G|² is the
mean inner product of the gradients of two different sequences.
"""

from dataclasses import dataclass

import numpy as np

from maskvr_ds.analysis.gradient_variance.random_effects import Counts, Floats, VarianceComponents, variances


@dataclass(frozen=True)
class NoiseScale:
    """signal: |G|²; noise: tr Σ; scale: B_simple in sequences, infinite if no signal was found."""

    signal: float
    noise: float
    scale: float


def signal(moments: VarianceComponents, ways: Counts) -> Floats:
    """|G|² without bias: float64 [C, 1] for C resamples."""
    counts = ways.counts
    gram = moments.gram.sum(0)
    total = counts.sum(1)
    own = counts @ np.diag(gram)
    joint = np.einsum("cm,mn,cn->c", counts, gram, counts)
    return ((joint - own) / (total * (total - 1)))[:, None]


def noise_scale(moments: VarianceComponents) -> NoiseScale:
    """Of N ≥ 2 sequences with R ≥ 2 masks each."""
    ways = Counts(np.ones((1, len(moments.within))))
    data, mask = (float(v[0, -1]) for v in variances(moments, ways))
    found = float(signal(moments, ways)[0, 0])
    noise = data + mask
    return NoiseScale(found, noise, noise / found if found > 0 else float("inf"))
