"""Strategy auto: variance formulas against enumeration, the decision, and its effect on masker and loader."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.analysis.gradient_variance.random_effects import Counts, VarianceComponents
from maskvr_ds.config import AutoConfig
from maskvr_ds.data.loader import RepeatSchedule
from maskvr_ds.data.mixture import Share
from maskvr_ds.masking.strategies import STRATEGIES
from maskvr_ds.training.auto_strategy import BASELINE, PROPOSAL, SEGMENTS, Chooser, _figures, better, confirm_choice

# Rows, positions, positions per segment, gradient dimensions.
N, n, k, D = 3, 6, 2, 4


def gradients(seed: int) -> np.ndarray:
    """A gradient for each set of k positions, with an interaction term: float64 [N, masks, D]."""
    random = np.random.default_rng(seed)
    of_position, of_row = random.normal(size=(N, n, D)), random.normal(size=(N, D))
    masks = list(itertools.combinations(range(n), k))
    context = random.normal(size=(N, len(masks), D))
    rows = [
        [of_row[row] + of_position[row, list(mask)].mean(0) + 0.5 * context[row, m] for m, mask in enumerate(masks)]
        for row in range(N)
    ]
    return np.array(rows)


def rounds() -> list[tuple[int, ...]]:
    """All ordered partitions of the positions into disjoint masks, as mask indices."""
    masks = list(itertools.combinations(range(n), k))
    found = []
    for cut in itertools.permutations(range(len(masks)), n // k):
        if len({position for mask in cut for position in masks[mask]}) == n:
            found.append(cut)
    return found


def variance(vectors: np.ndarray) -> float:
    """Trace of the covariance of equally likely vectors [·, D]."""
    return float(((vectors - vectors.mean(0)) ** 2).sum(1).mean())


@pytest.mark.parametrize("seed", range(5))
def test_total_variance_is_linear_in_the_number_of_segments(seed: int) -> None:
    """J · (V_d + variance of the mean of J segments) by enumeration of all rounds, against the formula."""
    g, cuts = gradients(seed), rounds()
    data = variance(g.mean(1))
    mask = float(np.mean([variance(row) for row in g]))
    pairs = float(np.mean([variance(np.stack([row[list(cut[:2])].mean(0) for cut in cuts])) for row in g]))
    covariance = 2 * pairs - mask
    for segments in (1, 2, 3):
        means = [np.stack([row[list(cut[:segments])].mean(0) for cut in cuts]) for row in g]
        exact = segments * (data + float(np.mean([variance(each) for each in means])))
        assert exact == pytest.approx(segments * data + mask + (segments - 1) * covariance, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_unbiased(seed: int) -> None:
    """Estimates from random pairs, averaged over many samples of rows and masks, against the enumerated values."""
    g, cuts, random = gradients(seed), np.array(rounds()), np.random.default_rng(seed)
    draws, samples = 3, 4000
    data = variance(g.mean(1))
    mask = float(np.mean([variance(row) for row in g]))
    pairs = float(np.mean([variance(np.stack([row[list(cut[:2])].mean(0) for cut in cuts])) for row in g]))
    found = []
    for _ in range(samples):
        rows = random.integers(0, N, 4)
        drawn = g[rows[:, None, None], cuts[random.integers(0, len(cuts), (4, draws)), :2]]  # [4, draws, 2, D]
        single = drawn.var(1, ddof=1).sum(2).mean(1)[:, None]
        means = drawn.mean(2)
        within = means.var(1, ddof=1).sum(1)[:, None]
        of_rows = means.mean(1)
        moments = VarianceComponents(within, (of_rows @ of_rows.T)[None], np.zeros(4), draws, segments=2)
        found.append(_figures(moments, single, None, 3, 0.0, Counts(np.ones((1, 4))))[0, :3])
    mean, error = np.mean(found, 0), np.std(found, 0) / samples**0.5
    # Rows are drawn with replacement from a population of N, hence the divisor N in its variance.
    assert np.all(np.abs(mean - [data, mask, 2 * pairs - mask]) < 5 * error)


def exact_components(means: np.ndarray, within: np.ndarray, segments: int) -> VarianceComponents:
    """Components without sampling error: means [N, D] of equally likely rows, variances within them [N]."""
    scaled = means * ((N - 1) / N) ** 0.5  # the estimate has the divisor N − 1
    return VarianceComponents((within / segments)[:, None], (scaled @ scaled.T)[None], np.zeros(N), 10**15, segments)


@given(st.integers(0, 100), st.sampled_from((1, 2, 3)), st.floats(0, 0.5))
def test_totals_equal_those_of_enumeration(seed: int, most: int, cost: float) -> None:
    """All segments: J (V_d + variance of their mean), relative to one. The proposal: q ∝ ‖g(M)‖ with weights p/q, its
    total larger by its cost (in the time that it takes, the baseline makes a larger batch)."""
    g, cuts = gradients(seed), rounds()
    singles = np.array([variance(row) for row in g])
    pairs = np.array([2 * variance(np.stack([row[list(cut[:2])].mean(0) for cut in cuts])) for row in g])
    norms = np.linalg.norm(g, axis=2)
    # Σ q (g p/q)² − mean²
    proposed = norms.mean(1) ** 2 - (g.mean(1) ** 2).sum(1)
    data = variance(g.mean(1))
    baseline = data + singles.mean()
    of_all = [variance(np.stack([row[list(cut[:most])].mean(0) for cut in cuts])) for row in g]
    figures = _figures(
        exact_components(g.mean(1), pairs, 2),
        singles[:, None],
        exact_components(g.mean(1), proposed, 1),
        most,
        cost,
        Counts(np.ones((1, N))),
    )[0]
    assert figures[3] == pytest.approx(most * (data + np.mean(of_all)) / baseline, rel=1e-9)
    assert figures[4] == pytest.approx((1 + cost) * (data + proposed.mean()) / baseline, rel=1e-9)


# [estimate, low, high].
INTERVALS = st.one_of(
    st.none(),
    st.lists(st.floats(0.1, 3), min_size=3, max_size=3).map(sorted).map(lambda x: [x[1], x[0], x[2]]),
)


@given(INTERVALS, INTERVALS, st.integers(1, 9))
def test_switching_needs_an_interval_below_one(everything: Any, proposal: Any, most: int) -> None:
    strategy, segments = better({"all_segments": everything, "proposal": proposal}, most)
    sure = {
        name: interval[0]
        for name, interval in ((SEGMENTS, everything), (PROPOSAL, proposal))
        if interval is not None and interval[2] < 1
    }
    if not sure:
        assert (strategy, segments) == (SEGMENTS, 1)
    else:
        assert sure[strategy] == min(sure.values())
        assert segments == (most if strategy == SEGMENTS else 1)


@pytest.mark.parametrize("bad", [[np.nan] * 3, [0.5, 0.4, np.nan], [-np.inf, -np.inf, np.inf]])
def test_non_finite_estimates_change_nothing(bad: list[float]) -> None:
    assert better({"all_segments": bad, "proposal": None}, 7) == (SEGMENTS, 1)


def test_leaving_the_baseline_takes_two_measurements() -> None:
    everything, proposal = (SEGMENTS, 7), (PROPOSAL, 1)
    current, before, taken = BASELINE, BASELINE, []
    for best in (everything, BASELINE, everything, everything, proposal, proposal, everything, BASELINE):
        current = confirm_choice(best, before, current)
        before = best
        taken.append(current)
    assert taken == [BASELINE] * 3 + [everything] * 2 + [proposal] * 2 + [BASELINE]


class Double:
    """Test double for masker, loader and proposer."""

    strategy: Any = None
    gate = "?"
    repeats = RepeatSchedule()


def chooser(proposer: Any = None) -> tuple[Chooser, Double, Double]:
    masker, loader = Double(), Double()
    parts: dict[str, Any] = {"masker": masker, "loader": loader, "proposer": proposer}
    config = AutoConfig(every_steps=10)
    return (
        Chooser(config, engine=None, most=3, proposal_cost=0.01, micro_size=4, seed=1, **parts),
        masker,
        loader,
    )


def test_state_is_restored_to_masker_loader_and_proposal() -> None:
    proposer = Double()
    first, masker, loader = chooser(proposer)
    assert (masker.strategy, proposer.gate) == (STRATEGIES[SEGMENTS], "never")
    loader.repeats = loader.repeats.change_copies(120, 3, [Share(50, 50)])
    first._take(PROPOSAL)
    first._best = SEGMENTS, 3
    assert (masker.strategy, proposer.gate) == (STRATEGIES[PROPOSAL], "always")
    second_proposer = Double()
    second, masker, other = chooser(second_proposer)
    second.restore(json.loads(json.dumps(first.state())))
    assert (masker.strategy, second_proposer.gate) == (STRATEGIES[PROPOSAL], "always")
    assert other.repeats == loader.repeats
    assert second._best == (SEGMENTS, 3)
    assert other.repeats.place == 120


def test_due_every_n_steps_except_the_last() -> None:
    each, _, _ = chooser()
    assert [step for step in range(1, 41) if each.due(step, 40)] == [10, 20, 30]
