"""Variance figures on a toy model: rows of six maskable tokens, of which two are predicted, so that all 15 masks, their
gradients and every figure can be computed exactly."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.mask_covariance import WINDOWS
from maskvr_ds.analysis.gradient_variance.measure import figures
from maskvr_ds.analysis.gradient_variance.moments import (
    Sample,
    measure,
    measure_covariance,
    measure_gradients,
    measure_segments,
)
from maskvr_ds.analysis.gradient_variance.oracles import TokenOracle, gradient_norms, head_norms
from maskvr_ds.analysis.gradient_variance.random_effects import (
    Counts,
    Floats,
    Resampling,
    VarianceComponents,
    whole_mask_variance,
)
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher, layer_of
from maskvr_ds.config import ModelConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.loader import read_rows
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.losses import weighted_loss
from tests.support.corpora import CLS, MASK, SEP, make_corpus

PAIRS = list(itertools.combinations(range(6), 2))
PARTITIONS = [
    [PAIRS.index(pair) for pair in three]
    for three in itertools.combinations(PAIRS, 3)
    if len({i for pair in three for i in pair}) == 6
]
LAYERS = ["embeddings", "layer 0", "head"]
CPU = torch.device("cpu")


class Toy:
    """rows: of the corpus, without a break in the middle. gradients: name of a layer → [rows, 15, elements], per
    prediction, from one backward pass per mask."""

    def __init__(self, folder: Path) -> None:
        self.corpus = Corpus(make_corpus(folder, rows=400, length=8, words=20))
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 2, "max_position_embeddings": 8}
        config = transformers_config(ModelConfig.model_validate(sizes), vocab_size=25, pad_id=0)
        self.model = MaskedLanguageModel(config).eval()
        for p in self.model.parameters():
            p.data += 0.3 * torch.randn_like(p)
        everything = np.arange(self.corpus.rows)
        ids = read_rows(self.corpus, everything, np.zeros_like(everything)).input_ids.long()
        self.rows = everything[((ids == SEP).sum(1) == 1).numpy() & (ids[:, 0] == CLS).numpy()]
        self.gradients = self._gradients(ids[self.rows])
        self.sketcher = Sketcher(self.model, size=4096, seed=5)

    def _gradients(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        masker = self.masker(0)
        found: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
        # Any masked batch of the right shapes, with the positions replaced by the pair's.
        shape = read_rows(self.corpus, self.rows[:1], np.zeros(1, dtype=np.int64))
        masked = masker(shape)
        for row, pair in itertools.product(ids, PAIRS):
            positions = torch.tensor([pair]) + 1
            masked = replace(
                masked,
                input_ids=row[None].scatter(1, positions, MASK),
                positions=positions,
                labels=row[None].gather(1, positions),
                weights=torch.ones(1, 2),
            )
            self.model.zero_grad()
            (weighted_loss(self.model, masked) / 2).backward()
            of_layer: dict[str, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
            for name, p in self.model.named_parameters():
                if p.grad is not None:
                    of_layer[layer_of(name)].append(p.grad.flatten())
            for layer in LAYERS:
                found[layer].append(torch.cat(of_layer[layer]))
        return {layer: torch.stack(g).double().view(len(ids), len(PAIRS), -1) for layer, g in found.items()}

    def masker(self, seed: int, strategy: str = "uniform") -> Masker:
        only_masks = Corruption(mask_probability=1.0, random_probability=0.0)
        return Masker.for_corpus(self.corpus.manifest, seed=seed, strategy=strategy, rate=1 / 3, corruption=only_masks)

    def exact(self, draws: list[list[int]], segments: int) -> np.ndarray:
        """Data, mask, total, mask over data of the layers and the full gradient, [4, 4]: draws are the equally likely
        sets of masks that share a batch."""
        data, mask = [], []
        for layer in LAYERS:
            g = torch.stack([self.gradients[layer][:, d].mean(1) for d in draws], 1)
            mean = g.mean(1)
            mask.append(segments * float((g - mean[:, None]).square().sum(2).mean()))
            data.append(float(mean.var(0).sum()))
        d, m = (np.array([*v, sum(v)]) for v in (data, mask))
        return np.stack([d, m, segments * d + m, m / d], 1)

    def sample(self, seed: int, sequences: int) -> Sample:
        rows = np.random.default_rng(seed).choice(self.rows, sequences, replace=False)
        return Sample(self.corpus, rows, seed, 64, CPU)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy") / "corpus")


def all_figures(moments: VarianceComponents, ways: Counts) -> Floats:
    return figures(moments, moments, ways)


def test_intervals_cover_the_exact_values_in_90_of_100_seeds(toy: Toy) -> None:
    exact = toy.exact([[i] for i in range(len(PAIRS))], 1)
    assert exact[3, 1] > 0.2 * exact[3, 0] > 0.01 * exact[3, 1]  # neither part is negligible
    covered = np.zeros(exact.shape)
    estimates = []
    for seed in range(100):
        moments, predictions = measure(toy.sample(seed, 40), toy.sketcher, toy.masker(seed), draws=4, copies=1)
        assert predictions == 2
        found = np.array(Resampling(40, seed=seed, level=0.95).interval(partial(all_figures, moments)))
        found = found.reshape(len(LAYERS) + 1, -1, 3)[:, :4]
        covered += (found[..., 1] <= exact) & (exact <= found[..., 2])
        estimates.append(found[..., 0])
    assert (covered >= 90).all(), covered
    # No interval is so wide that it could not miss.
    assert covered.min() < 100
    # Unbiased, except for the ratio, whose bias is of order 1/N.
    error = np.std(estimates, 0) / 10
    assert (np.abs(np.mean(estimates, 0) - exact)[:, :3] < 4 * error[:, :3]).all()


def test_segments_in_one_batch(toy: Toy) -> None:
    """All three disjoint masks of a row together, against the 15 ways to divide six positions into three pairs."""
    assert len(PARTITIONS) == 15
    exact = toy.exact(PARTITIONS, 3)
    moments, _ = measure(toy.sample(0, 150), toy.sketcher, toy.masker(0, "fully_explored"), draws=6, copies=3)
    found = np.array(Resampling(150, seed=0, level=0.999).interval(partial(all_figures, moments)))
    found = found.reshape(len(LAYERS) + 1, -1, 3)[:, :3]
    assert (found[..., 1] <= exact[:, :3]).all()
    assert (exact[:, :3] <= found[..., 2]).all()
    np.testing.assert_allclose(found[3, :3, 0], exact[3, :3], rtol=0.2)


def test_whole_mask_oracle(toy: Toy) -> None:
    norms = sum(g.square().sum(2) for g in toy.gradients.values()).sqrt()
    mask = toy.exact([[i] for i in range(len(PAIRS))], 1)[3, 1]
    exact = mask - float(norms.var(1, correction=0).mean())
    moments, _ = measure(toy.sample(1, 150), toy.sketcher, toy.masker(1), draws=12, copies=1)
    [(_, low, high)] = Resampling(150, seed=0, level=0.999).interval(partial(whole_mask_variance, moments))
    assert low <= exact <= high < mask


def single_norms(toy: Toy, row: int, head: bool) -> torch.Tensor:
    """Mean over the 5 masks of each of the six positions of ‖∂ℓ_i/∂θ‖², or of ‖∂ℓ_i/∂h_i‖²: float64 [6]."""
    ids = read_rows(toy.corpus, toy.rows[row : row + 1], np.zeros(1, dtype=np.int64)).input_ids.long()
    model = toy.model.requires_grad_(True)
    total = torch.zeros(6, dtype=torch.float64)
    try:
        for pair in PAIRS:
            positions = torch.tensor([pair]) + 1
            corrupted, labels = ids.scatter(1, positions, MASK), ids.gather(1, positions)
            for slot, place in enumerate(pair):
                h = model.hidden(corrupted, positions)
                loss = torch.nn.functional.cross_entropy(model.mlm.cls(h)[0, slot][None], labels[0, slot][None])
                wanted = [h] if head else [p for p in model.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
                total[place] += sum(float(g.double().square().sum()) for g in gradients if g is not None)
    finally:
        model.requires_grad_(False)
    return total / 5


@pytest.mark.parametrize("head", [False, True])
def test_token_oracles_know_the_norms(toy: Toy, head: bool) -> None:
    norms = head_norms(toy.model) if head else gradient_norms(toy.sketcher, 32)
    oracle = TokenOracle(norms, toy.masker(9, "fully_explored"), rounds=60, floor=0.1)
    masker = toy.masker(2)
    for row in range(3):
        batch = read_rows(toy.corpus, np.repeat(toy.rows[row], 4), np.arange(4))
        maskable = masker.maskable(batch)
        found = oracle.mean_square(batch, maskable)
        assert (found[~maskable[0]] == 0).all()
        torch.testing.assert_close(found[maskable[0]], single_norms(toy, row, head), rtol=0.15, atol=0)
        inclusion = oracle.propose(batch, maskable, torch.full((4, 1), 1 / 3, dtype=torch.float64))
        torch.testing.assert_close((inclusion * maskable).sum(1), torch.full((4,), 2.0, dtype=torch.float64))
        order = inclusion[0][maskable[0]].argsort()
        assert (found[maskable[0]][order].diff() > -1e-12).all()
    assert oracle.predictions == 2 * 3 * 60 * 6


def test_covariance_of_two_masks_by_their_distance(toy: Toy) -> None:
    """Two positions: distance 0 is the same mask (and nothing is random but the mask), 2 shares one, 4 none."""
    variance, one, none = 0.0, 0.0, 0.0
    for g in toy.gradients.values():
        deviation = g - g.mean(1, keepdim=True)
        products = deviation @ deviation.transpose(1, 2)
        shared = torch.tensor([[len({*a} & {*b}) for a in PAIRS] for b in PAIRS])
        variance += float(products[:, shared == 2].mean())
        one += float(products[:, shared == 1].mean())
        none += float(products[:, shared == 0].mean())
    found = measure_covariance(toy.sample(2, 100), toy.sketcher, toy.masker(3), 6, Resampling(100, seed=0, level=0.999))
    exact = {0.0: 1.0, 2.0: one / variance, 4.0: none / variance}
    assert [x["distance"] for x in found] == [0, 0, 2, 2, 2, 4, 4][: WINDOWS - 1]
    for x in found:
        middle, low, high = x["correlation"]
        assert low - 1e-4 <= exact[x["distance"]] <= high + 1e-4
        assert abs(middle - exact[x["distance"]]) < 0.15


class Seen:
    """Replaces a sketcher; records which positions were predicted."""

    layers: ClassVar = ["all"]
    size = 3

    def __init__(self) -> None:
        self.masks: list[set[int]] = []

    def __call__(self, masked: MaskedBatch) -> torch.Tensor:
        for positions, weights in zip(masked.positions, masked.weights, strict=True):
            self.masks.append(set(positions[weights != 0].tolist()))
        return torch.rand(len(masked.positions), 1, self.size)


def test_variances_within_rows_by_definition(tmp_path: Path) -> None:
    """Of single masks and of means of the masks that share a batch, with divisor R − 1, per prediction; three draws, of
    which a wrong divisor would be seen."""
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=12, length=32, words=20, padded_last_row=True))
    masker = Masker.for_corpus(corpus.manifest, seed=3, strategy="fully_explored", rate=0.2)
    random, drawn, counts = np.random.default_rng(0), [], []

    class Recording(Seen):
        layers: ClassVar = ["lower", "upper"]

        def __call__(self, masked: MaskedBatch) -> torch.Tensor:
            drawn.append(random.normal(size=(len(masked.positions), 2, self.size)).astype(np.float32))
            counts.append(int((masked.weights != 0).sum()))
            return torch.from_numpy(drawn[-1])

    sample = Sample(corpus, np.arange(8, 12), seed=0, micro_size=64, device=CPU)
    found = measure_gradients(sample, Recording(), masker, draws=3, copies=2)  # type: ignore[arg-type]
    g = np.stack(drawn).reshape(4, 3, 2, 2, 3) / (mean := sum(counts) / (4 * 6))
    np.testing.assert_allclose(found.single, g.var(1, ddof=1).sum(3).mean(1), rtol=1e-5)
    means = g.mean(2)
    np.testing.assert_allclose(found.moments.within, means.var(1, ddof=1).sum(2), rtol=1e-5)
    norms = np.linalg.norm(means.reshape(4, 3, 6), axis=2)
    np.testing.assert_allclose(found.moments.norm_variance, norms.var(1, ddof=1), rtol=1e-5)
    assert (found.predictions, found.moments.segments, found.moments.draws) == (pytest.approx(mean), 2, 3)
    np.testing.assert_allclose(found.moments.relative_sizes, np.array(counts) / 6 / mean)


@pytest.mark.parametrize("rate", [0.15, 0.2])
def test_copies_of_a_draw_in_one_round_are_disjoint(tmp_path: Path, rate: float) -> None:
    """For many draws, some of which would start with a round's last segment otherwise; each draw in its own round."""
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=40, length=48, words=20, padded_last_row=True))
    masker = Masker.for_corpus(corpus.manifest, seed=3, strategy="fully_explored", rate=rate)
    sample = Sample(corpus, np.arange(30, 40), seed=0, micro_size=16, device=CPU)
    seen: dict[bool, Seen] = {}
    for one_round in (True, False):
        seen[one_round] = Seen()
        measure_segments(sample, seen[one_round], masker, draws=12, copies=2, one_round=one_round)  # type: ignore[arg-type]
    together = {kind: [a & b for a, b in zip(s.masks[::2], s.masks[1::2], strict=True)] for kind, s in seen.items()}
    assert len(together[True]) == 120
    assert not any(together[True])
    assert any(together[False]), "which is what the switch is for"
    first = [frozenset(mask) for mask in seen[True].masks[:24]]
    assert len(set(first)) == 24
