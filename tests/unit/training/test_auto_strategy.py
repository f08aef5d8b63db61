"""Strategy auto: variance formulas against enumeration, the decision, and its effect on masker and loader."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.moments import Sample
from maskvr_ds.analysis.gradient_variance.random_effects import Counts, VarianceComponents
from maskvr_ds.config import AutoConfig
from maskvr_ds.data.loader import Loader, RepeatSchedule
from maskvr_ds.data.mixture import Mixture, Share
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.pareto import proposal_to_inclusion
from maskvr_ds.masking.strategies import STRATEGIES, Parameters
from maskvr_ds.training import auto_strategy
from maskvr_ds.training.auto_strategy import (
    BASELINE,
    PROPOSAL,
    SEGMENTS,
    UNIFORM,
    Chooser,
    _figures,
    baseline,
    better,
    confirm_choice,
    same_round_share,
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
        alone = VarianceComponents(
            drawn[:, :, 0].var(1, ddof=1).sum(1)[:, None],
            (drawn[:, :, 0].mean(1) @ drawn[:, :, 0].mean(1).T)[None],
            np.zeros(4),
            draws,
        )
        one = Counts(np.ones((1, 4)))
        found.append(_figures(alone, (moments, single), None, 3, one, together=1.0, cost=0.0)[0, :3])
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
        exact_components(g.mean(1), singles, 1),
        (exact_components(g.mean(1), pairs, 2), singles[:, None]),
        exact_components(g.mean(1), proposed, 1),
        most,
        Counts(np.ones((1, N))),
        together=1.0,
        cost=cost,
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
    strategy, segments = better({"all_segments": everything, "proposal": proposal}, most) or BASELINE
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
    assert better({"all_segments": bad, "proposal": None}, 7) is None


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

    rate = 1 / 3
    corpus: Any = SimpleNamespace(sequence_length=8)
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


@pytest.mark.parametrize(
    ("copies", "of_row", "share"), [(4, 7, 32 / 42), (7, 7, 1), (1, 7, 1), (2, 4, 1), (2, 3, 2 / 3)]
)
def test_share_of_pairs_in_one_round(copies: int, of_row: int, share: float) -> None:
    """By the loader's epochs: e · J + j, of which fully_explored predicts segment epoch mod S of round epoch div S."""
    epochs = np.arange(copies * of_row * 20).reshape(-1, copies)
    rounds = epochs // of_row
    pairs = [rounds[:, a] == rounds[:, b] for a in range(copies) for b in range(a)]
    assert same_round_share(copies, of_row) == pytest.approx(np.mean(pairs) if pairs else 1)
    assert same_round_share(copies, of_row) == pytest.approx(share)


@pytest.mark.parametrize("together", [0.0, 0.76, 1.0])
def test_straddling_copies_complement_each_other_less(together: float) -> None:
    """Two copies of a row: in one round with probability f, else with independent masks; by enumeration."""
    g, cuts = gradients(0), rounds()
    singles = np.array([variance(row) for row in g])
    pairs = np.array([2 * variance(np.stack([row[list(cut[:2])].mean(0) for cut in cuts])) for row in g])
    of_two = together * pairs / 2 + (1 - together) * singles / 2
    data = variance(g.mean(1))
    found = _figures(
        exact_components(g.mean(1), singles, 1),
        (exact_components(g.mean(1), pairs, 2), singles[:, None]),
        None,
        2,
        Counts(np.ones((1, N))),
        together=together,
        cost=0.0,
    )[0]
    assert found[3] == pytest.approx(2 * (data + of_two.mean()) / (data + singles.mean()), rel=1e-9)


def test_the_baseline_predicts_as_many_tokens_as_uniform_masks() -> None:
    assert baseline(126, 0.15) == (UNIFORM, 1)  # 18 instead of 19
    assert baseline(126, 1 / 7) == (SEGMENTS, 1)
    for rate in (0.15, 0.19, 0.24, 0.3, 0.4, 0.6):
        assert baseline(126, rate) == (UNIFORM, 1)


class Norms:
    """In place of a Sketcher: the gradient of a prediction has a direction of its own (of its token), and a norm of 1
    or 4. Records what it saw."""

    layers: ClassVar = ["all"]
    size = 24

    def __init__(self, heavy: torch.Tensor) -> None:
        self.scale = torch.where(heavy, 4.0, 1.0)
        self.seen: list[tuple[int, int]] = []

    def __call__(self, masked: Any) -> torch.Tensor:
        out = torch.zeros(len(masked.labels), 1, self.size)
        sides = masked.labels % self.size
        values = masked.weights * self.scale[masked.labels]
        out[:, 0].scatter_add_(1, sides, values)
        self.seen.append((len(masked.labels), int((masked.weights != 0).sum())))
        return out


def rated(corpus: Corpus, seed: int, scores: torch.Tensor, rows: int, draws: int, monkeypatch: Any) -> Any:
    """What `Chooser` measures with a stand-in proposal whose π follows `scores` of tokens: [estimate, low, high]."""
    sketcher = Norms(torch.arange(200) % 5 == 0)
    masker = Masker.for_corpus(corpus, seed=0, rate=0.15)

    class Proposer:
        gate, learning = "never", True

    def propose(batch: Any, maskable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        counts = (share[:, 0] * maskable.sum(1)).round().long()
        return proposal_to_inclusion(scores[batch.input_ids.long()], maskable, counts, 64, 1e-9)

    masker.parameters = Parameters(proposal=propose)
    monkeypatch.setattr(auto_strategy, "Sketcher", lambda *_, **__: sketcher)
    monkeypatch.setattr(Chooser, "_full_precision_copy", lambda self: None)
    loader = Loader(corpus, seed=0, global_size=64)
    of = Chooser(
        AutoConfig(rows=rows, draws=draws),
        engine=None,
        masker=masker,
        loader=loader,
        proposer=Proposer(),  # type: ignore[arg-type]
        most=1,
        proposal_cost=0.0,
        micro_size=64,
        seed=seed,
    )
    figures, _ = of._measure(seed)
    return figures["proposal"], sketcher


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("long") / "corpus", rows=300, length=128, words=190))


def test_a_uniform_proposal_is_rated_one_and_a_better_one_is_told_from_it(long_rows: Corpus, monkeypatch: Any) -> None:
    """At the default rate, rows and draws: 20 seeds, of which 16 are 80 of 100."""
    heavy = torch.arange(200) % 5 == 0
    uniform, better_ones = [], []
    for seed in range(20):
        if seed < 5:
            uniform.append(rated(long_rows, seed, torch.ones(200), 32, 4, monkeypatch)[0])
        scores = torch.where(heavy, BETTER, 1.0).double()
        better_ones.append(rated(long_rows, seed, scores, 32, 4, monkeypatch)[0])
    assert np.array(uniform) == pytest.approx(1, abs=1e-6), "equal masks from equal random numbers"
    found = np.array(better_ones)
    assert found[:, 0].mean() == pytest.approx(0.9, abs=0.02)
    assert (found[:, 2] < 1).sum() >= 16


def test_measurement_draws_rows_and_masks_as_training_does(tmp_path: Path, monkeypatch: Any) -> None:
    """Rows of a mixture by weight; as many predictions under the baseline as the proposal makes; the share of one
    round."""
    one, two = (
        Corpus(make_corpus(tmp_path / name, rows=100, length=128, words=20, seed=s)) for s, name in enumerate("ab")
    )
    mixture = Mixture([one, two], [0.1, 1.9])
    drawn: list[np.ndarray] = []
    given: list[dict[str, Any]] = []
    real = auto_strategy._figures

    def sample(corpus: Any, rows: np.ndarray, *rest: Any) -> Sample:
        drawn.append(rows)
        return Sample(corpus, rows, *rest)

    def figures(*args: Any, **options: Any) -> Any:
        given.append(options)
        return real(*args, **options)

    monkeypatch.setattr(auto_strategy, "Sample", sample)
    monkeypatch.setattr(auto_strategy, "_figures", figures)
    sketcher = Norms(torch.arange(200) % 5 == 0)
    monkeypatch.setattr(auto_strategy, "Sketcher", lambda *_, **__: sketcher)
    monkeypatch.setattr(Chooser, "_full_precision_copy", lambda self: None)
    of = Chooser(
        AutoConfig(rows=40, draws=2),
        engine=None,
        masker=Masker.for_corpus(mixture, seed=0, rate=0.15),
        loader=Loader(mixture, seed=0, global_size=64),
        proposer=None,
        most=4,
        proposal_cost=0.0,
        micro_size=64,
        seed=3,
    )
    of._measure(5)
    (rows,) = drawn
    assert (rows < 100).mean() == pytest.approx(0.05, abs=0.06)
    assert given[0]["together"] == pytest.approx(32 / 42)
    uniform, of_segments = (sum(p for _, p in half) for half in (sketcher.seen[:40], sketcher.seen[40:]))
    assert uniform > 1.03 * of_segments


def test_old_state_keeps_its_baseline() -> None:
    each, masker, _ = chooser()
    each.restore({"strategy": SEGMENTS, "stretch": {"copies": 1, "sample": 0, "place": 0, "base": 0}})
    assert each._baseline == BASELINE
    assert masker.strategy is STRATEGIES[SEGMENTS]
