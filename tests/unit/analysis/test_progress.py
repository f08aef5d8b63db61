"""Progress of a step on a toy model, in which every mask of every row can be enumerated."""

import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.moments import Sample, measure_gradients
from maskvr_ds.analysis.gradient_variance.progress import (
    gain,
    jackknife,
    product,
    progress,
    squared_product,
    student,
)
from maskvr_ds.analysis.gradient_variance.random_effects import Counts, Floats, VarianceComponents
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.loader import read_rows
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.training.auto_measurement import total_variance
from tests.support.corpora import CLS, SEP, make_corpus

n, D, V = 6, 8, 25
GOAL = 1 / 6
RATES = (1 / 6, 1 / 3, 1 / 2, 2 / 3)


class Gradients:
    """In place of a Sketcher: the gradient of a prediction depends on its token, on the other predicted tokens, and on
    their number, which turns its mean away from that at the lowest rate."""

    layers: ClassVar = ["all"]
    size = D

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.mean, self.turn = np.eye(D)[0], np.eye(D)[1]
        self.of_token, self.of_other = random.normal(size=(2, V, D)) * np.array([0.8, 0.4])[:, None, None]

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Sum over the predictions of tokens [·, k] → [·, D]."""
        k = tokens.shape[1]
        others = self.of_other[tokens].sum(1, keepdims=True) - self.of_other[tokens]
        shared = (1 - 0.08 * (k - 1)) * self.mean + 0.45 * (k - 1) * self.turn
        return (shared + self.of_token[tokens] * (1 + 0.2 * others)).sum(1)

    def __call__(self, masked: MaskedBatch) -> torch.Tensor:
        k = int((masked.weights != 0).sum(1)[0])
        return torch.from_numpy(self.of(masked.labels.numpy()[:, :k])).float()[:, None]


class Toy:
    def __init__(self, folder: Path) -> None:
        self.corpus = Corpus(make_corpus(folder, rows=300, length=n + 2, words=20))
        everything = np.arange(self.corpus.rows)
        ids = read_rows(self.corpus, everything, np.zeros_like(everything)).input_ids.long().numpy()
        complete = ((ids == SEP).sum(1) == 1) & (ids[:, 0] == CLS)
        self.rows, self.ids, self.model = everything[complete], ids[complete][:, 1:-1], Gradients()

    def all_masks(self, rate: float) -> np.ndarray:
        """Gradients per prediction of every mask of every row: [rows, masks, D]."""
        k = round(rate * n)
        masks = [self.model.of(self.ids[:, list(mask)]) / k for mask in itertools.combinations(range(n), k)]
        return np.stack(masks, 1)

    def exact(self, rate: float, batch: float) -> float:
        g, G = self.all_masks(rate), self.all_masks(GOAL).mean((0, 1))
        mean = g.mean((0, 1))
        variance = ((g - mean) ** 2).sum(2).mean()
        return float((mean @ G) ** 2 / (G @ G) / (mean @ mean + variance / batch))

    def measured(self, seed: int, rates: tuple[float, ...], rows: int = 24, draws: int = 6) -> list[VarianceComponents]:
        """Components of the goal and of the rates, on rows drawn with replacement."""
        chosen = np.random.default_rng(seed).choice(self.rows, rows)
        sample = Sample(self.corpus, chosen, seed, 64, torch.device("cpu"))
        found: list[VarianceComponents] = []
        goal = None
        for rate in (GOAL, *rates):
            corruption = Corruption(mask_probability=1.0, random_probability=0.0)
            masker = Masker.for_corpus(self.corpus.manifest, seed=seed, rate=rate, corruption=corruption)
            model: Any = self.model
            measured = measure_gradients(sample, model, masker, draws=draws, copies=1, goal=goal)
            goal = measured.means if goal is None else goal
            found.append(measured.moments)
        return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("progress") / "corpus")


def test_sums_of_products_of_different_sequences() -> None:
    """Against loops, on subsets of the sequences too."""
    inner = np.random.default_rng(3).normal(size=(7, 7))
    counts = np.array([[1.0] * 7, [1, 1, 0, 1, 1, 0, 1]])
    for row, one, four in zip(counts, product(inner, counts), squared_product(inner, counts), strict=True):
        inside = np.flatnonzero(row)
        pairs = [inner[a, b] for a, b in itertools.permutations(inside, 2)]
        fours = [inner[a, b] * inner[c, d] for a, b, c, d in itertools.permutations(inside, 4)]
        assert one == pytest.approx(np.mean(pairs))
        assert four == pytest.approx(np.mean(fours))


def test_the_four_parts_are_unbiased() -> None:
    """Over all samples of five of six equally likely rows would be too few: 20,000 samples of six rows drawn from four
    vectors, against their exact moments."""
    random = np.random.default_rng(5)
    m, M = random.normal(size=(2, 4, 3)) + 0.5
    exact = (m.mean(0) @ M.mean(0), (m.mean(0) @ M.mean(0)) ** 2, m.mean(0) @ m.mean(0))
    found = []
    ones = np.ones((1, 6))
    for _ in range(20_000):
        rows = random.integers(0, 4, 6)
        cross = m[rows] @ M[rows].T
        found.append([product(cross, ones)[0], squared_product(cross, ones)[0], product(m[rows] @ m[rows].T, ones)[0]])
    error = np.std(found, 0) / 20_000**0.5
    assert (np.abs(np.mean(found, 0) - exact) < 4.5 * error).all()
    assert abs(np.mean(np.array(found)[:, 0] ** 2) - exact[1]) > 10 * error[1], "the plain square is biased"


def test_rows_of_different_length_are_resampled_as_if_measured_alone() -> None:
    """The figure of some of the rows is that of a measurement of these rows, with their own mean number of predictions:
    what the jackknife takes its interval from."""
    random = np.random.default_rng(8)
    k = np.array([3.0, 9.0, 3.0, 9.0, 9.0, 1.0, 6.0])
    sums = k[:, None, None] * (1 + random.normal(size=(7, 4, 5)))
    goal = 1 + random.normal(size=(7, 5))

    def components(inside: np.ndarray, segments: int = 1) -> VarianceComponents:
        sizes = k[inside] / k[inside].mean()
        g = sums[inside] / k[inside].mean()
        means = g.mean(1)
        return VarianceComponents(
            within=g.var(1, ddof=1).sum(1, keepdims=True),
            gram=(means @ means.T)[None],
            norm_variance=np.zeros(len(inside)),
            draws=4,
            segments=segments,
            sizes=sizes,
            cross=means @ goal[inside].T,
        )

    everything, some = np.arange(7), np.array([0, 2, 3, 5, 6])
    chosen, alone = np.isin(everything, some).astype(float)[None], np.ones((1, 5))
    for batch in (2, 1e9):
        found = gain(components(everything), chosen, batch)
        assert found == pytest.approx(gain(components(some), alone, batch), rel=1e-12)
    # Of two segments: the variance of single ones is per prediction too.
    single = random.random((7, 1)) * k[:, None] ** 2
    totals = [
        total_variance(components(inside, 2), single[inside] / k[inside].mean() ** 2, 3, Counts(ways), together=0.8)
        for inside, ways in ((everything, chosen), (some, alone))
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_student() -> None:
    # Abramowitz & Stegun, table 26.10.
    for freedom, quantile in ((4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert student(0.975, freedom) == pytest.approx(quantile, rel=0.01)


def test_intervals_cover_the_enumerated_progress(toy: Toy) -> None:
    cases = [(rate, batch) for rate in range(2) for batch in (4, 400)]
    rates = (1 / 3, 1 / 2)
    exact = np.array([toy.exact(rates[rate], batch) for rate, batch in cases])
    ends = []
    for seed in range(100):
        goal, *components = toy.measured(seed, rates)

        def of(case: tuple[int, int], components: Any = components, goal: Any = goal) -> tuple[float, float, float]:
            def figure(counts: Floats) -> Floats:
                return progress(components[case[0]], goal, counts, case[1])

            return jackknife(figure, 24, 0.95)

        ends.append([of(case) for case in cases])
    found = np.array(ends)
    covered = ((found[:, :, 1] <= exact) & (exact <= found[:, :, 2])).sum(0)
    assert ((covered >= 90) & (covered <= 99)).all(), covered
    width = (found[:, :, 2] - found[:, :, 1]).mean(0)
    assert (width <= 2 * 3.92 * found[:, :, 0].std(0)).all()


def test_the_best_rate_falls_as_the_batch_grows(toy: Toy) -> None:
    """Enumerated; and as measured on many rows."""
    batches = (1, 4, 16, 64, 256, 1024)
    best = [max(RATES, key=lambda rate: toy.exact(rate, batch)) for batch in batches]
    assert best == sorted(best, reverse=True)
    assert (best[0], best[-1]) == (1 / 2, GOAL)
    goal, *components = toy.measured(7, RATES, rows=300, draws=12)
    ones = np.ones((1, 300))
    for batch, expected in ((1, 1 / 2), (1024, GOAL)):
        found = [float(progress(moments, goal, ones, batch)[0]) for moments in components]
        assert RATES[int(np.argmax(found))] == expected
        assert found == pytest.approx([toy.exact(rate, batch) for rate in RATES], rel=0.15)


def test_progress_of_the_goal_itself_is_below_one_by_its_noise(toy: Toy) -> None:
    assert toy.exact(GOAL, 1e12) == pytest.approx(1)
    goal, same = toy.measured(1, (GOAL,), rows=40)
    ones = np.ones((1, 40))
    assert float(progress(same, goal, ones, 1e12)[0]) == pytest.approx(1, abs=0.1)
    assert float(progress(same, goal, ones, 2)[0]) < 0.9


def test_undefined_progress_has_no_interval() -> None:
    assert all(np.isnan(jackknife(lambda counts: -np.ones(len(counts)), 6, 0.9)))
    estimate, low, high = jackknife(lambda counts: np.where(counts.all(1), 1.0, -1.0), 6, 0.9)
    assert estimate == 1
    assert np.isnan([low, high]).all()
    with pytest.raises(ValueError, match="4 sequences; progress needs at least 5"):
        jackknife(lambda counts: np.ones(len(counts)), 4, 0.9)
