"""Variance components from inner products, against formulas on the vectors and against known truth."""

import numpy as np
import pytest

from maskvr_ds.analysis.gradient_variance.random_effects import (
    Counts,
    Resampling,
    VarianceComponents,
    variances,
    whole_mask_variance,
)


def moments_of(vectors: np.ndarray, segments: int = 1) -> VarianceComponents:
    """vectors: [N, R, G, s]."""
    means = vectors.mean(1)
    return VarianceComponents(
        within=vectors.var(1, ddof=1).sum(-1),
        gram=np.einsum("ngs,mgs->gnm", means, means),
        norm_variance=np.linalg.norm(vectors.reshape(*vectors.shape[:2], -1), axis=2).var(1, ddof=1),
        draws=vectors.shape[1],
        segments=segments,
    )


def draw(random: np.random.Generator, sequences: int, draws: int, data: float, mask: float) -> np.ndarray:
    """Two layers of 3 numbers: V_d = 3 data², V_m = 3 mask² in the first layer, twice as much in the second."""
    scale = np.array([1.0, 2.0**0.5])[:, None]
    a = data * scale * random.standard_normal((sequences, 1, 2, 3))
    return 5.0 + a + mask * scale * random.standard_normal((sequences, draws, 2, 3))


def test_unbiased_for_few_sequences_and_draws() -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(3000):
        m = moments_of(draw(random, 4, 2, data=1.0, mask=3.0))
        found.append(np.concatenate(variances(m, Counts(np.ones((1, 4)))), axis=1)[0])
    found = np.array(found)
    exact = np.array([3, 6, 9, 27, 54, 81])
    error = found.std(0) / len(found) ** 0.5
    assert (np.abs(found.mean(0) - exact) < 4 * error).all()


def test_counting_a_sequence_twice_equals_two_copies() -> None:
    random = np.random.default_rng(1)
    vectors = draw(random, 5, 3, 1.0, 1.0)
    counts = np.array([[2.0, 0, 1, 1, 1]])
    repeated = moments_of(vectors[[0, 0, 2, 3, 4]])
    for function in (variances, lambda *a: (whole_mask_variance(*a),)):
        weighted = function(moments_of(vectors), Counts(counts))
        plain = function(repeated, Counts(np.ones((1, 5))))
        np.testing.assert_allclose(np.concatenate(weighted, 1), np.concatenate(plain, 1), rtol=1e-12)


@pytest.mark.parametrize("short", [0.0, 0.5])
def test_rows_of_different_length_against_batches(short: float) -> None:
    """A share of the rows has half of the predictions. The variance of the gradient of a batch of 500 passes, Σ of sums
    over Σ of numbers, against (V_d + V_m) / 500: numbers of predictions are no variance of their own."""
    random = np.random.default_rng(11)
    batch = 500

    def rows(number: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        k = np.where(random.random(number) < short, 5.0, 10.0)
        of_row = 1 + random.standard_normal((number, 1, 1, 3)) / k[:, None, None, None] ** 0.5
        noise = random.standard_normal((number, draws, 1, 3)) * (4 / k[:, None, None, None]) ** 0.5
        return k, k[:, None, None, None] * (of_row + noise)  # sums over the predictions

    exact = []
    for _ in range(4000):
        k, sums = rows(batch, 1)
        exact.append(sums[:, 0, 0].sum(0) / k.sum())
    k, sums = rows(4000, 3)
    moments = moments_of(sums / k.mean())
    moments = VarianceComponents(moments.within, moments.gram, moments.norm_variance, 3, sizes=k / k.mean())
    data, mask = (float(v[0, -1]) for v in variances(moments, Counts(np.ones((1, 4000)))))
    assert (data + mask) / batch == pytest.approx(float(np.var(exact, axis=0).sum()), rel=0.05)
    plain = sum(float(v[0, -1]) for v in variances(moments_of(sums / k.mean()), Counts(np.ones((1, 4000)))))
    assert (plain > 1.1 * (data + mask)) == (short > 0)


def test_segments_multiply_the_mask_part() -> None:
    vectors = draw(np.random.default_rng(2), 5, 3, 1.0, 1.0)
    ones = Counts(np.ones((1, 5)))
    data, mask = variances(moments_of(vectors), ones)
    data_of_three, mask_of_three = variances(moments_of(vectors, segments=3), ones)
    np.testing.assert_allclose(mask_of_three, 3 * mask)
    np.testing.assert_allclose(data_of_three, data)


def test_whole_mask_oracle_equals_weighting_by_the_norm() -> None:
    """With all masks of a sequence known: q ∝ ‖g‖ over them, and the variance of g p/q by definition."""
    random = np.random.default_rng(3)
    gradients = random.standard_normal((2000, 4)) * random.uniform(0.2, 3, (2000, 1))
    norms = np.linalg.norm(gradients, axis=1)
    q = norms / norms.sum()
    second = (q * (norms / (2000 * q)) ** 2).sum()
    exact = second - (gradients.mean(0) ** 2).sum()
    vectors = np.broadcast_to(gradients[None, :, None], (3, 2000, 1, 4))
    found = whole_mask_variance(moments_of(vectors), Counts(np.ones((1, 3))))[0, 0]
    assert found == pytest.approx(exact, rel=2e-3)  # divisor R − 1


@pytest.mark.parametrize("heavy", [False, True])
def test_intervals_cover(heavy: bool) -> None:
    """200 experiments of 40 sequences × 4 draws; heavy: sequences whose gradients differ in scale."""
    random = np.random.default_rng(4)
    exact = np.array([9.0, 81.0, 90.0, 9.0])
    covered = np.zeros(4)
    for seed in range(200):
        vectors = draw(random, 40, 4, 1.0, 3.0)
        if heavy:  # E of the factor's square is 1
            vectors = 5 + (vectors - 5) * (random.gamma(2.0, 0.5, (40, 1, 1, 1)) ** 0.5)
        m = moments_of(vectors)

        def figures(ways: Counts, m: VarianceComponents = m) -> np.ndarray:
            data, mask = (v[:, -1] for v in variances(m, ways))
            return np.stack([data, mask, data + mask, mask / data], 1)

        intervals = Resampling(40, seed=seed, level=0.95).interval(figures)
        covered += [low <= x <= high for x, (_, low, high) in zip(exact, intervals, strict=True)]
    assert (covered >= 0.88 * 200).all(), covered
    assert (covered <= 199).all(), covered


# Efron & Tibshirani 1993, An Introduction to the Bootstrap, table 14.1: 26 children's scores in a test of spatial
# perception.
SPATIAL = np.array(
    [48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41]
)


def test_bca_interval_of_the_textbook() -> None:
    """The variance of the scores: 171.5 [115.8, 259.6] at 90% with 2,000 resamples (ibid., table 14.2).

    SciPy 1.17.1 with 400,000: 115.6 and 260.7 (`scipy.stats.bootstrap`, method "BCa"); percentiles without correction:
    98.0 and 235.5.
    """

    def variance(ways: Counts) -> np.ndarray:
        total = ways.counts.sum(1)
        return (ways.counts @ SPATIAL**2 / total - (ways.counts @ SPATIAL / total) ** 2)[:, None]

    found = np.array([Resampling(26, seed=seed, level=0.9).interval(variance)[0] for seed in range(25)])
    assert found[:, 0] == pytest.approx(171.534, abs=1e-3)
    # Over seeds, the ends have standard deviations of 2 and 4: of their means, 0.4 and 0.8.
    assert found[:, 1].mean() == pytest.approx(115.6, abs=1.6)
    assert found[:, 2].mean() == pytest.approx(260.7, abs=3.2)


def test_resampled_data_part_is_unbiased() -> None:
    """The mean over resamples is the sample's own estimate; without N/(N − 1), S² would be a quarter too small here."""
    sample = moments_of(draw(np.random.default_rng(7), 4, 3, data=2.0, mask=0.5))
    seen: list[np.ndarray] = []

    def data_part(ways: Counts) -> np.ndarray:
        seen.append(variances(sample, ways)[0][:, -1:])
        return seen[-1]

    Resampling(4, seed=0, level=0.95).interval(data_part)
    full, _, resampled = seen
    error = resampled.std() / len(resampled) ** 0.5
    assert error < 0.03 * full[0, 0]
    assert abs(resampled.mean() - full[0, 0]) < 4 * error


def test_interval_of_a_constant_statistic() -> None:
    resampling = Resampling(5, seed=0, level=0.9)
    assert resampling.interval(lambda ways: np.full((len(ways.counts), 1), 2.5)) == [(2.5, 2.5, 2.5)]


def test_too_few_sequences() -> None:
    with pytest.raises(ValueError, match="2 sequences; confidence intervals need at least 3"):
        Resampling(2, seed=0, level=0.95)
