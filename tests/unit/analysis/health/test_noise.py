"""The gradient noise scale of a linear model, whose covariance has a closed form."""

import numpy as np
import pytest

from maskvr_ds.analysis.gradient_variance.random_effects import VarianceComponents
from maskvr_ds.analysis.health.noise import noise_scale


def components(gradients: np.ndarray) -> VarianceComponents:
    """Of gradients [N, R, d], with one layer."""
    means = gradients.mean(1)
    within = gradients.var(axis=1, ddof=1).sum(1)[:, None]
    norms = np.linalg.norm(gradients, axis=2).var(axis=1, ddof=1)
    return VarianceComponents(within, (means @ means.T)[None], norms, draws=gradients.shape[1])


@pytest.mark.parametrize("mask", [0.0, 1.5])
def test_a_linear_model(mask: float) -> None:
    """The loss (xᵀ(w − w*) − ε)² / 2 with x ~ N(0, I), ε ~ N(0, s²) has the gradient x (xᵀδ − ε), δ = w − w*, with mean
    δ and tr Σ = d (|δ|² + s²) + |δ|²; masks add independent noise of variance mask² in each coordinate."""
    random = np.random.default_rng(0)
    N, R, d, s = 6000, 2, 12, 0.7
    delta = random.normal(size=d)
    x, errors = random.normal(size=(N, d)), s * random.normal(size=N)
    of_rows = x * (x @ delta - errors)[:, None]
    gradients = of_rows[:, None] + mask * random.normal(size=(N, R, d))
    squared = delta @ delta
    trace = d * (squared + s**2) + squared + d * mask**2
    found = noise_scale(components(gradients))
    assert found.signal == pytest.approx(squared, rel=0.05)
    assert found.noise == pytest.approx(trace, rel=0.05)
    assert found.scale == pytest.approx(trace / squared, rel=0.07)


def test_the_estimates_have_no_bias() -> None:
    """Averaged over many small samples, signal and noise are those of the distribution."""
    random = np.random.default_rng(1)
    delta = np.array([0.3, -0.2, 0.1])
    found = [
        noise_scale(components(delta + random.normal(size=(4, 1, 3)) + 2 * random.normal(size=(4, 2, 3))))
        for _ in range(4000)
    ]
    assert np.mean([f.signal for f in found]) == pytest.approx(delta @ delta, abs=0.06)
    assert np.mean([f.noise for f in found]) == pytest.approx(3 * 5, rel=0.03)


def test_no_signal_is_infinite_noise() -> None:
    gradients = np.array([[[1.0], [1.0]], [[-1.0], [-1.0]]])
    assert noise_scale(components(gradients)).scale == np.inf
