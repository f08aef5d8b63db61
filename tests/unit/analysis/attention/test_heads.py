"""Heads switched off against models whose head is zeroed by hand; maps, importance, pruning, for all architectures."""

import copy

import pytest
import torch

from maskvr_ds.analysis.attention.heads import Heads, attention_maps, listed_heads, output_projections, rank_correlation
from maskvr_ds.analysis.health.probe import mean_loss
from tests.support.architectures import INSTALLED
from tests.unit.analysis.health.test_probe import B, L, masked, model_of


@pytest.mark.parametrize("architecture", INSTALLED)
def test_heads_of_every_architecture(architecture: str) -> None:
    model = model_of(architecture)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    batch = masked()
    maps = attention_maps(model, batch)
    assert maps.shape == (3, B, 4, L, L)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, B, 4, L))
    heads = Heads(model, batch)
    assert heads.shape == (3, 4)
    plain = heads.loss()
    assert heads.loss(torch.zeros(3, 4, dtype=torch.bool)) == pytest.approx(plain, rel=1e-6)
    off = torch.zeros(3, 4, dtype=torch.bool)
    off[1, 2] = True
    without = heads.loss(off)
    assert without != pytest.approx(plain, rel=1e-7)
    assert heads.loss(off, "uniform") not in (plain, without)
    assert heads.loss() == pytest.approx(plain, rel=1e-6)  # nothing is left of the hooks
    if architecture == "albert":
        with pytest.raises(ValueError, match="its layers share their weights"):
            heads.switches.zero_columns([(1, 2)])
        return
    heads.switches.zero_columns([(1, 2)])
    assert heads.loss() == pytest.approx(without, rel=1e-5)


def test_a_head_off_is_a_head_whose_values_are_zero() -> None:
    """By hand: with value rows and biases of a head at zero, its output is zero."""
    model, batch = model_of("bert"), masked(padded=True)
    heads = Heads(model, batch)
    off = torch.zeros(3, 4, dtype=torch.bool)
    off[2, 1] = off[0, 3] = True
    found = heads.loss(off)
    other = copy.deepcopy(model)
    for n, h in ((2, 1), (0, 3)):
        value = other.mlm.get_submodule(f"bert.encoder.layer.{n}.attention.self.value")
        value.get_parameter("weight").data[8 * h : 8 * h + 8] = 0.0
        value.get_parameter("bias").data[8 * h : 8 * h + 8] = 0.0
    assert found == pytest.approx(mean_loss(other, batch).item(), rel=1e-6)


def test_uniform_attention_is_that_of_queries_without_content() -> None:
    """By hand: with queries at zero all logits are equal, also with padding."""
    model, batch = model_of("bert"), masked(padded=True)
    off = torch.zeros(3, 4, dtype=torch.bool)
    off[1, 0] = True
    found = Heads(model, batch).loss(off, "uniform")
    query = model.mlm.get_submodule("bert.encoder.layer.1.attention.self.query")
    query.get_parameter("weight").data[:8] = 0.0
    query.get_parameter("bias").data[:8] = 0.0
    assert found == pytest.approx(mean_loss(model, batch).item(), rel=1e-6)


def test_importance_is_the_slope_of_the_loss() -> None:
    """Against finite differences of the gates, row by row."""
    model, batch = model_of("bert").double(), masked()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    heads = Heads(model, batch)
    found = heads.importance()
    step = 1e-4
    for n, h in ((0, 0), (1, 3), (2, 2)):
        slopes = []
        for row in batch.split(1):
            losses = []
            for sign in (1, -1):
                gates = torch.ones(3, 4, dtype=torch.float64)
                gates[n, h] += sign * step
                with heads.switches.gated(gates), torch.no_grad():
                    losses.append(mean_loss(model, row).item())
            slopes.append(abs(losses[0] - losses[1]) / (2 * step))
        # The loss is formed in fp32.
        assert found[n, h].item() == pytest.approx(sum(slopes) / len(slopes), rel=0.05, abs=2e-3)


def test_pruning_takes_the_cheapest_head_first() -> None:
    model, batch = model_of("bert"), masked()
    heads = Heads(model, batch)
    single = heads.increases()
    curve = heads.prune(3)
    assert curve[0][2] == pytest.approx(heads.loss() + single.min().item(), rel=1e-5)
    assert len({(n, h) for n, h, _ in curve}) == 3
    heads.switches.zero_columns([(n, h) for n, h, _ in curve])
    assert heads.loss() == pytest.approx(curve[-1][2], rel=1e-5)


def test_rank_correlation() -> None:
    a = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(2, 2)) is None
    assert rank_correlation(a[:1], a[:1]) is None


def test_rank_correlation_with_ties_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(5, (4, 6), generator=random).double() for _ in range(2))
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a.flatten(), b.flatten()).statistic)


def test_a_model_without_an_output_projection() -> None:
    model = model_of("bert")
    for layer in model.mlm.get_submodule("bert.encoder.layer"):  # type: ignore[union-attr]
        layer.attention.output.dense = torch.nn.Identity()
    with pytest.raises(ValueError, match="output projection of its attention is not found"):
        output_projections(model.mlm)


def test_no_head_is_listed_as_missed_least_and_most() -> None:
    assert [listed_heads(heads) for heads in (1, 2, 4, 5, 6, 144)] == [1, 1, 2, 2, 3, 3]
