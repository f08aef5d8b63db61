"""Measurements of strategy auto: variance formulas against enumeration; what is measured, on which rows and masks."""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.moments import Sample
from maskvr_ds.analysis.gradient_variance.progress import jackknife
from maskvr_ds.analysis.gradient_variance.random_effects import Counts, VarianceComponents
from maskvr_ds.config import AutoConfig, ConfigError
from maskvr_ds.data.loader import Loader
from maskvr_ds.data.mixture import Mixture, Share
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.pareto import proposal_to_inclusion
from maskvr_ds.masking.strategies import Parameters
from maskvr_ds.training.auto_choice import PROPOSAL, SEGMENTS, UNIFORM, MaskingPlan
from maskvr_ds.training.auto_measurement import (
    Candidates,
    Found,
    _with_less_mask_variance,
    check_rows,
    measure_candidates,
    rate_plans,
    rows_of_epoch,
    total_variance,
)
from tests.support.corpora import make_corpus

# Rows, positions, positions per segment, gradient dimensions.
N, n, k, D = 3, 6, 2, 4
# Score of a token whose gradient is four times as large, with which the total variance is a tenth below uniform's.
BETTER = 1.21


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
def test_totals_are_unbiased(seed: int) -> None:
    """Estimates from random pairs, averaged over many samples of rows and masks, against the enumerated values."""
    g, cuts, random = gradients(seed), np.array(rounds()), np.random.default_rng(seed)
    draws, samples = 3, 4000
    data = variance(g.mean(1))
    of_all = [variance(np.stack([row[list(cut)].mean(0) for cut in cuts])) for row in g]
    found = []
    for _ in range(samples):
        rows = random.integers(0, N, 4)
        drawn = g[rows[:, None, None], cuts[random.integers(0, len(cuts), (4, draws)), :2]]  # [4, draws, 2, D]
        single = drawn.var(1, ddof=1).sum(2).mean(1)[:, None]
        means = drawn.mean(2)
        of_rows = means.mean(1)
        within = means.var(1, ddof=1).sum(1)[:, None]
        moments = VarianceComponents(within, (of_rows @ of_rows.T)[None], np.zeros(4), draws, segments=2)
        found.append(total_variance(moments, single, 3, Counts(np.ones((1, 4))), together=1.0)[0])
    mean, error = np.mean(found), np.std(found) / samples**0.5
    # Rows are drawn with replacement from a population of N, hence the divisor N in its variance.
    assert abs(mean - 3 * (data + np.mean(of_all))) < 5 * error


def exact_components(means: np.ndarray, within: np.ndarray, segments: int) -> VarianceComponents:
    """Components without sampling error: means [N, D] of equally likely rows, variances within them [N]."""
    scaled = means * ((N - 1) / N) ** 0.5  # the estimate has the divisor N − 1
    return VarianceComponents((within / segments)[:, None], (scaled @ scaled.T)[None], np.zeros(N), 10**15, segments)


@given(st.integers(0, 100), st.sampled_from((2, 3)))
def test_totals_equal_those_of_enumeration(seed: int, count: int) -> None:
    """J (V_d + variance of the mean of J segments)."""
    g, cuts = gradients(seed), rounds()
    singles = np.array([variance(row) for row in g])
    pairs = np.array([2 * variance(np.stack([row[list(cut[:2])].mean(0) for cut in cuts])) for row in g])
    of_all = [variance(np.stack([row[list(cut[:count])].mean(0) for cut in cuts])) for row in g]
    ways = Counts(np.ones((1, N)))
    found = total_variance(exact_components(g.mean(1), pairs, 2), singles[:, None], count, ways, together=1.0)
    assert found[0] == pytest.approx(count * (variance(g.mean(1)) + np.mean(of_all)), rel=1e-9)
    less = _with_less_mask_variance(exact_components(g.mean(1), singles, 1), 0.25, ways)
    assert less[0] == pytest.approx(variance(g.mean(1)) + 0.75 * singles.mean(), rel=1e-9)


@pytest.mark.parametrize("together", [0.0, 0.76, 1.0])
def test_straddling_copies_complement_each_other_less(together: float) -> None:
    """Two copies of a row: in one round with probability f, else with independent masks; by enumeration."""
    g, cuts = gradients(0), rounds()
    singles = np.array([variance(row) for row in g])
    pairs = np.array([2 * variance(np.stack([row[list(cut[:2])].mean(0) for cut in cuts])) for row in g])
    of_two = together * pairs / 2 + (1 - together) * singles / 2
    components = exact_components(g.mean(1), pairs, 2)
    found = total_variance(components, singles[:, None], 2, Counts(np.ones((1, N))), together=together)
    assert found[0] == pytest.approx(2 * (variance(g.mean(1)) + of_two.mean()), rel=1e-9)


class Norms:
    """In place of a Sketcher: the gradient of a prediction has a direction of its own (of its token), and a norm of 1
    or 4; with [MASK] from layer n it is 1 + n times as long. Records what it saw."""

    layers: ClassVar = ["all"]
    size = 24

    def __init__(self, heavy: torch.Tensor) -> None:
        self.scale = torch.where(heavy, 4.0, 1.0)
        self.seen: list[tuple[int, int]] = []
        self.layer = 0
        self.at: list[int] = []

    def enter(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, masked: Any) -> torch.Tensor:
        out = torch.zeros(len(masked.labels), 1, self.size)
        sides = masked.labels % self.size
        values = masked.weights * self.scale[masked.labels] * (1 + self.layer)
        self.at.append(self.layer)
        out[:, 0].scatter_add_(1, sides, values)
        self.seen.append((len(masked.labels), int((masked.weights != 0).sum())))
        return out


def measured(
    corpus: Corpus, seed: int, *, rows: int, draws: int, candidates: Candidates, scores: torch.Tensor | None = None
) -> tuple[Found, Norms]:
    """Measured with `Norms`, with a stand-in for MAPNet whose π follows `scores` of tokens."""
    sketcher = Norms(torch.arange(200) % 5 == 0)
    masker = Masker.for_corpus(corpus, seed=seed, rate=0.15)

    class Proposer:
        gate, learning = "never", True

    def propose(batch: Any, maskable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        assert scores is not None
        assert (Proposer.gate, stand_in.gate, stand_in.learning) == ("never", "always", False)
        counts = (share[:, 0] * maskable.sum(1)).round().long()
        return proposal_to_inclusion(scores[batch.input_ids.long()], maskable, counts, 64, 1e-9)

    stand_in: Any = Proposer()
    masker.parameters = Parameters(proposal=propose)
    loader = Loader(corpus, seed=0, global_size=64)
    sample = Sample(corpus, rows_of_epoch(loader.shares, seed, rows), seed, 64, torch.device("cpu"))
    model: Any = sketcher
    before = copy.copy(masker)
    found = measure_candidates(
        candidates,
        AutoConfig(rows=rows, draws=draws),
        sample=sample,
        sketcher=model,
        masker=masker,
        proposer=stand_in,
        batch=64,
        enter=sketcher.enter,
    )
    assert (stand_in.gate, stand_in.learning) == ("never", True)
    assert vars(masker) == vars(before)
    return found, sketcher


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("long") / "corpus", rows=300, length=128, words=190))


NOW, PROPOSED = MaskingPlan(UNIFORM, 1, 0.15), MaskingPlan(PROPOSAL, 1, 0.15)
ONE_AND_PROPOSAL = Candidates((NOW,), (), 7, proposal=True)


def test_a_uniform_proposal_is_rated_one_and_a_better_one_is_told_from_it(long_rows: Corpus) -> None:
    """At the default rate, rows and draws: 20 seeds, of which 16 are 80 of 100. The mean gradient of the stand-in is
    small: progress is in proportion to 1 ÷ variance, as at small batches."""
    heavy = torch.arange(200) % 5 == 0

    def rated(seed: int, scores: torch.Tensor) -> tuple[float, float, float]:
        found, _ = measured(long_rows, seed, rows=32, draws=4, candidates=ONE_AND_PROPOSAL, scores=scores)
        ratings = rate_plans(found.gains, {NOW: 1.0, PROPOSED: 1.0}, NOW, 32, 0.95)
        assert ratings[NOW].progress == (1, 1, 1)
        return ratings[PROPOSED].per_second

    uniform = np.array([rated(seed, torch.ones(200)) for seed in range(5)])
    assert uniform == pytest.approx(1, abs=1e-6), "equal masks from equal random numbers"
    found = np.array([rated(seed, torch.where(heavy, BETTER, 1.0).double()) for seed in range(20)])
    assert found[:, 0].mean() > 1
    assert (found[:, 1] > 1).sum() >= 16


def test_the_proposal_pays_for_its_time(long_rows: Corpus) -> None:
    """12% of the time for 4% of the variance, as measured: never chosen, however many FLOPs it has."""
    scores = torch.where(torch.arange(200) % 5 == 0, BETTER, 1.0).double()
    found, _ = measured(long_rows, 0, rows=32, draws=4, candidates=ONE_AND_PROPOSAL, scores=scores)
    for seconds in (1.0, 1.12):
        ratings = rate_plans(found.gains, {NOW: 1.0, PROPOSED: seconds}, NOW, 32, 0.95)
        assert ratings[PROPOSED].seconds == seconds
        assert ratings[PROPOSED].per_second == pytest.approx([x / seconds for x in ratings[PROPOSED].progress])
        # From the proposal's side, the other way round.
        back = rate_plans(found.gains, {NOW: 1.0, PROPOSED: seconds}, PROPOSED, 32, 0.95)
        assert back[NOW].per_second[0] == pytest.approx(1 / ratings[PROPOSED].per_second[0])


def test_plans_make_as_many_predictions_as_in_training(long_rows: Corpus) -> None:
    """19 of 126 by uniform masks, as the proposal, and 18 by a segment (rows with a [SEP] in the middle: one less)."""
    candidates = Candidates((NOW, MaskingPlan(UNIFORM, 1, 0.1)), (2, 4), 7, proposal=True)
    found, sketcher = measured(long_rows, 3, rows=8, draws=2, candidates=candidates, scores=torch.ones(200))
    totals = {}
    for part, name in enumerate(("goal", "lower rate", "segments", "proposal")):
        totals[name] = sum(p for _, p in sketcher.seen[8 * part : 8 * (part + 1)])
    assert len(sketcher.seen) == 4 * 8, "the goal's masks are those of rate 0.15"
    assert found.passes == sum(passes for passes, _ in sketcher.seen) == 2 * 4 * 8 * 2
    assert totals["goal"] == totals["proposal"] == 8 * 4 * 19
    assert totals["segments"] == pytest.approx(8 * 4 * 126 / 7, rel=0.01)
    assert totals["lower rate"] == pytest.approx(8 * 4 * 12.5, rel=0.05)
    assert set(found.gains) == {
        *candidates.plain,
        *(MaskingPlan(SEGMENTS, count, 0.15) for count in (2, 4)),
        PROPOSED,
    }


def test_late_masks_are_measured_against_the_goal_of_ordinary_ones(long_rows: Corpus) -> None:
    """Every plan by the model in which [MASK] enters at its layer. Twice as long gradients make the same progress."""
    late, plain = MaskingPlan(UNIFORM, 1, 0.15, 1), MaskingPlan(UNIFORM, 1, 0.15)
    candidates = Candidates((late, MaskingPlan(UNIFORM, 1, 0.1, 1)), (2,), 7, proposal=True, late=(plain,))
    found, sketcher = measured(long_rows, 0, rows=8, draws=2, candidates=candidates, scores=torch.ones(200))
    # Goal, which the plain plan is; the two late ones, segments and the proposal.
    assert sketcher.at == [0] * 8 + [1] * 4 * 8
    assert found.passes == 2 * 5 * 8 * 2
    of_segments, of_proposal = MaskingPlan(SEGMENTS, 2, 0.15, 1), MaskingPlan(PROPOSAL, 1, 0.15, 1)
    assert set(found.gains) == {*candidates.plain, plain, of_segments, of_proposal}
    every = np.ones((1, 8))
    own, _ = measured(long_rows, 0, rows=8, draws=2, candidates=Candidates((NOW,), (), 7, proposal=False))
    assert found.gains[plain](every) == pytest.approx(own.gains[NOW](every))
    assert found.gains[late](every) == pytest.approx(found.gains[plain](every), rel=1e-5)


def test_straddling_is_counted(long_rows: Corpus) -> None:
    """Four of seven segments: a share of 0.76 of the pairs is in one round, which is worse than if all were."""
    for_all = Candidates((NOW,), (4,), 8, proposal=False)
    as_trained = Candidates((NOW,), (4,), 7, proposal=False)
    of = [
        measured(long_rows, 1, rows=16, draws=4, candidates=c)[0].gains[MaskingPlan(SEGMENTS, 4, 0.15)](
            np.ones((1, 16))
        )
        for c in (for_all, as_trained)
    ]
    assert of[1][0] < of[0][0]


def test_an_ideal_proposal_is_between_all_and_nothing(long_rows: Corpus) -> None:
    found, _ = measured(long_rows, 0, rows=16, draws=2, candidates=Candidates((NOW,), (), 7, proposal=False))
    every = np.ones((1, 16))
    ratio = jackknife(partial(lambda own, counts: own(counts) / found.gains[NOW](counts), found.ideal), 16, 0.95)[0]
    assert ratio > 1
    assert found.ideal(every) > found.gains[NOW](every)
    assert found.mask > 0


def test_rows_are_drawn_as_training_draws_them_and_once(tmp_path: Path) -> None:
    """Rows of a mixture by weight; no row twice, although an epoch has nine uses of each row of the second corpus."""
    one, two = (
        Corpus(make_corpus(tmp_path / name, rows=rows, words=20, seed=s))
        for s, (name, rows) in enumerate((("a", 1000), ("b", 60)))
    )
    loader = Loader(Mixture([one, two], [0.1, 9]), seed=0, global_size=64)
    rows = rows_of_epoch(loader.shares, 5, 40)
    assert len(set(rows.tolist())) == 40
    assert (rows >= 1000).mean() > 0.6, "540 of 640 slots"
    plain = rows_of_epoch([Share(500, 500)], 7, 12)
    assert len(set(plain.tolist())) == 12
    assert (rows_of_epoch([Share(500, 500)], 7, 20)[:12] == plain).all()
    small = [Share(50, 500), Share(50, 50)]
    assert len(rows_of_epoch(small, 0, 101)) == 100
    check_rows(small, 100)
    with pytest.raises(ConfigError, match=r"auto\.rows 101: an epoch has only 100 different rows"):
        check_rows(small, 101)
