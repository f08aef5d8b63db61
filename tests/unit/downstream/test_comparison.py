"""Paired bootstrap: against scipy, against the normal approximation, and its answers to clear cases."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from maskvr_ds.downstream.comparison import differences

N = 400


def predictions(truth: np.ndarray, correct: float, seed: int) -> list[int]:
    random = np.random.default_rng(seed)
    return np.where(random.random(len(truth)) < correct, truth, 1 - truth).tolist()


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.random.default_rng(0).integers(2, size=N)


def test_equal_to_scipy(truth: np.ndarray) -> None:
    """One run per row: scipy's paired percentile bootstrap of the difference of F1, with its own resamples."""
    a, b = predictions(truth, 0.8, 1), predictions(truth, 0.75, 2)
    (found,) = differences("f1", truth.tolist(), {"a": [a], "b": [b]}, resamples=20_000)

    def difference(t: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
        return f1_score(t, first) - f1_score(t, second)

    expected = scipy.stats.bootstrap(
        (truth, a, b), difference, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    assert found.difference == pytest.approx(difference(truth, np.array(a), np.array(b)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.012)


def test_seeds_widen_the_interval(truth: np.ndarray) -> None:
    """Variance of the mean accuracy: of the examples, plus that of the drawn runs."""
    runs = [predictions(truth, share, 3) for share in (0.6, 0.9)]
    # Always right: all variance is of the other row.
    (found,) = differences("accuracy", truth.tolist(), {"runs": runs, "right": [truth.tolist()]}, resamples=20_000)
    accuracies = [np.mean(np.equal(run, truth)) for run in runs]
    (alone,) = differences("accuracy", truth.tolist(), {"run": runs[:1], "right": [truth.tolist()]})
    assert found.difference == pytest.approx(np.mean(accuracies) - 1)
    # Drawn runs: both first, both second, or one of each, with 1/4, 1/4, 1/2; so the ends are near the two accuracies.
    assert found.low == pytest.approx(min(accuracies) - 1 - 1.28 * 0.024, abs=0.015)
    assert found.high - found.low > 2 * (alone.high - alone.low)
    spread = 1.96 * np.sqrt(accuracies[0] * (1 - accuracies[0]) / N)
    assert (alone.low, alone.high) == pytest.approx((accuracies[0] - 1 - spread, accuracies[0] - 1 + spread), abs=0.01)


def test_verdicts(truth: np.ndarray) -> None:
    rows = {
        "good": [predictions(truth, 0.9, seed) for seed in range(3)],
        "same": [predictions(truth, 0.9, seed) for seed in range(3)],
        "bad": [predictions(truth, 0.6, 9)],
    }
    verdicts = {(d.first, d.second): d for d in differences("accuracy", truth.tolist(), rows)}
    assert list(verdicts) == [("good", "same"), ("good", "bad"), ("same", "bad")]
    assert verdicts["good", "same"].difference == 0
    assert verdicts["good", "same"].within_noise
    assert not verdicts["good", "bad"].within_noise
    assert verdicts["good", "bad"].low > 0.2


def test_false_alarms_are_as_rare_as_the_level_says() -> None:
    """Models of equal quality, on 300 sets: 5% of the intervals exclude 0, within sampling error."""
    random = np.random.default_rng(4)
    alarms = 0
    for _ in range(300):
        truth = random.integers(2, size=150)
        rows = {name: [np.where(random.random(150) < 0.8, truth, 1 - truth).tolist()] for name in "ab"}
        (found,) = differences("accuracy", truth.tolist(), rows, resamples=400)
        alarms += not found.within_noise
    assert 4 <= alarms <= 27  # 15 ± 3 standard deviations
