"""Estimators by enumeration of every mask: the estimand of each, and the bias of Hájek's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds import hashing
from maskvr_ds.masking.conditional_poisson import ConditionalPoisson, odds_for_inclusion
from maskvr_ds.masking.estimators import ESTIMATORS, Draw, hajek, horvitz_thompson, whole_mask
from maskvr_ds.masking.masker import prediction_counts
from tests.support.sets import Row, capped, rows

WIDTH = 5


def every_mask(row: Row) -> tuple[Draw, torch.Tensor]:
    """All masks of a row as one batch, and their probabilities q(M) by definition."""
    sets = torch.tensor(row.sets())
    times = len(sets)
    counts = torch.full((times,), row.k)
    design = ConditionalPoisson(torch.tensor(row.odds, dtype=torch.float64).expand(times, -1), counts, WIDTH)
    positions = torch.nn.functional.pad(sets, (0, WIDTH - row.k))
    used = (torch.arange(WIDTH) < row.k).expand(times, WIDTH)
    n = torch.full((times,), len(row.maskable))
    return (
        Draw(positions, used, n, counts, design.inclusion(), design.log_probability(positions, used)),
        row.probabilities(),
    )


def random_losses(draw: Draw, seed: int, *, of_context: bool) -> torch.Tensor:
    """ℓ_i(M) at the predictions, float64 [sets, K], 0 in unused slots: a function of i alone, or of i and the mask."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(1, draw.inclusion.shape[1], dtype=torch.float64, generator=generator) + 3
    losses = losses.expand(draw.inclusion.shape)
    if of_context:
        losses = losses + torch.randn(losses.shape, dtype=torch.float64, generator=generator)
    return torch.where(draw.used, losses.gather(1, draw.positions), 0.0)


def row_losses(weights: torch.Tensor, losses: torch.Tensor, draw: Draw) -> torch.Tensor:
    return (weights * losses).sum(1) / draw.counts


@settings(max_examples=100, deadline=None)
@given(rows(-3, 3), st.integers(0, 1000))
def test_whole_mask_is_unbiased_for_any_function_of_the_mask(row: Row, seed: int) -> None:
    draw, q = every_mask(row)
    losses = random_losses(draw, seed, of_context=True)
    under_uniform = (losses.sum(1) / draw.counts).mean()
    weights = whole_mask(draw)
    assert abs(q @ row_losses(weights, losses, draw) - under_uniform) < 1e-9
    assert torch.equal(weights, torch.where(draw.used, weights[:, :1], 0.0)), "one weight per row"
    inverse = Row([1 / o if o else 0.0 for o in row.odds], row.k)
    second_moment = row.normaliser() * inverse.normaliser() / math.comb(len(row.maskable), row.k) ** 2
    assert (q @ weights[:, 0] ** 2).item() == pytest.approx(second_moment, rel=1e-11)


@settings(max_examples=100, deadline=None)
@given(rows(-3, 3), st.integers(0, 1000))
def test_horvitz_thompson_is_unbiased_for_the_mean_over_positions(row: Row, seed: int) -> None:
    draw, q = every_mask(row)
    losses = random_losses(draw, seed, of_context=False)
    per_position = torch.zeros(len(row.odds), dtype=torch.float64)
    for positions, used, values in zip(draw.positions, draw.used, losses, strict=True):
        per_position[positions[used]] = values[used]
    mean = per_position[row.maskable].mean()
    assert abs(q @ row_losses(horvitz_thompson(draw), losses, draw) - mean) < 1e-9


@settings(max_examples=100, deadline=None)
@given(rows(-3, 3), st.integers(0, 1000))
def test_horvitz_thompson_sees_contexts_as_the_design_has_them(row: Row, seed: int) -> None:
    draw, q = every_mask(row)
    losses = random_losses(draw, seed, of_context=True)
    masses = torch.zeros(2, len(row.odds), dtype=torch.float64)  # q-mass of the loss at i, and of i
    for probability, positions, used, values in zip(q, draw.positions, draw.used, losses, strict=True):
        masses[0, positions[used]] += probability * values[used]
        masses[1, positions[used]] += probability
    conditional = masses[0, row.maskable] / masses[1, row.maskable]
    assert abs(q @ row_losses(horvitz_thompson(draw), losses, draw) - conditional.mean()) < 1e-9


def test_horvitz_thompson_is_not_unbiased_for_contexts_of_uniform_masks() -> None:
    """Positions 0 and 1 are masked together more often than uniform masks would; a loss that sees this is biased."""
    draw, q = every_mask(Row([8.0, 8.0, 1.0, 1.0, 1.0], 2))
    together = (draw.positions[:, :2] == torch.tensor([0, 1])).all(1)
    losses = torch.where(draw.used & together[:, None], 1.0, 0.0).double()
    under_uniform = (losses.sum(1) / 2).mean()
    assert abs(q @ row_losses(horvitz_thompson(draw), losses, draw) - under_uniform) > 0.05
    assert abs(q @ row_losses(whole_mask(draw), losses, draw) - under_uniform) < 1e-12


@settings(max_examples=100, deadline=None)
@given(rows(-3, 3), st.integers(0, 1000))
def test_bias_of_hajek_is_minus_a_covariance(row: Row, seed: int) -> None:
    draw, q = every_mask(row)
    losses = random_losses(draw, seed, of_context=False)
    weights = hajek(draw)
    torch.testing.assert_close(weights.sum(1), draw.counts.double(), rtol=1e-14, atol=0)
    r = row_losses(weights, losses, draw)
    d = row_losses(horvitz_thompson(draw), torch.ones_like(losses), draw)
    mean = q @ row_losses(horvitz_thompson(draw), losses, draw)
    scale = 1 + d.max().item()
    assert abs(q @ d - 1) < 1e-9
    covariance = q @ (r * d) - (q @ r) * (q @ d)
    assert abs((q @ r - mean) + covariance) < 1e-9 * scale
    constant = row_losses(weights, torch.ones_like(losses), draw)
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=1e-14, atol=0)


def test_bias_of_hajek_falls_as_one_over_k() -> None:
    """A repeated population of two kinds of positions: the number j of the first kind in the mask is sufficient.

    P(j) is proportional to C(m, j) o^j C(m, k − j), exact by sums; losses 1 at the first kind, 0 at the second.
    """
    scaled = []
    for k in (2, 4, 8, 16, 32, 64, 128):
        m, odds = 2 * k, 4.0
        j = torch.arange(k + 1, dtype=torch.float64)
        log_p = sum(
            math.lgamma(m + 1) - torch.lgamma(x + 1) - torch.lgamma(m - x + 1) for x in (j, k - j)
        ) + j * math.log(odds)
        p = torch.softmax(log_p, 0)
        pi = (p @ j) / m, (p @ (k - j)) / m
        inverse = j / pi[0], (k - j) / pi[1]
        r = inverse[0] / (inverse[0] + inverse[1])
        scaled.append(k * ((p @ r) - 0.5).item())
        horvitz = inverse[0] / (2 * m)
        assert abs(p @ horvitz - 0.5) < 1e-12
    assert min(abs(s) for s in scaled) > 0.05, "a bias there is"
    assert abs(scaled[-1] / scaled[-2] - 1) < 0.02, f"k times the bias tends to a constant: {scaled}"


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_uniform_masks_have_weight_one(name: str) -> None:
    row = Row([0.0, *[2.5] * 9, 0.0], 4)
    weights = ESTIMATORS[name](every_mask(row)[0])
    torch.testing.assert_close(weights[:, :4], torch.ones(126, 4, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (weights[:, 4:] == 0).all()


def drawn(batch: int = 40, length: int = 32) -> Draw:
    """Rows with different n and k, the first without a maskable position."""
    generator = torch.Generator().manual_seed(0)
    maskable = torch.rand(batch, length, generator=generator) < torch.rand(batch, 1, generator=generator)
    maskable[0] = False
    n = maskable.sum(1)
    counts = prediction_counts(n, 0.15)
    scores = torch.where(maskable, torch.randn(batch, length, dtype=torch.float64, generator=generator), -math.inf)
    scores[0] = 0
    wanted = torch.cat([capped(scores[i : i + 1], max(int(counts[i]), 1)) for i in range(batch)])
    design = ConditionalPoisson(odds_for_inclusion(wanted, maskable, counts, WIDTH), counts, WIDTH)
    positions, used = design.sample(hashing.stream(torch.arange(batch)[:, None], torch.arange(length)))
    return Draw(positions, used, n, counts, design.inclusion(), design.log_probability(positions, used))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_weights_are_positive_where_used_and_zero_elsewhere(name: str) -> None:
    draw = drawn()
    weights = ESTIMATORS[name](draw)
    assert weights.shape == draw.positions.shape
    assert torch.equal(weights.float() > 0, draw.used)
    assert torch.isfinite(weights.float()).all()
    assert (weights[0] == 0).all(), "a row without maskable positions"


@pytest.mark.parametrize("name", ["horvitz_thompson", "hajek"])
def test_layout_does_not_matter(name: str) -> None:
    draw = drawn()
    full = ESTIMATORS[name](draw)
    for size in (1, 7):
        pieces = [
            Draw(*parts)
            for parts in zip(
                *(t.split(size) for t in (draw.positions, draw.used, draw.n, draw.counts, draw.inclusion)), strict=True
            )
        ]
        assert torch.equal(torch.cat([ESTIMATORS[name](piece) for piece in pieces]), full)


def test_one_inclusion_probability_per_row() -> None:
    draw = drawn()
    share = (draw.counts.double() / draw.n.clamp(min=1))[:, None]
    uniform = Draw(draw.positions, draw.used, draw.n, draw.counts, share)
    assert torch.equal(horvitz_thompson(uniform), draw.used.double())
    torch.testing.assert_close(hajek(uniform), draw.used.double(), rtol=1e-14, atol=0)


def test_an_improbable_uniform_mask_keeps_a_weight() -> None:
    """p/q below float32's range: the slot still counts as used."""
    draw = drawn()
    certain = Draw(
        draw.positions, draw.used, draw.n, draw.counts, draw.inclusion, torch.full((40,), 200.0, dtype=torch.float64)
    )
    assert torch.equal(whole_mask(certain).float() > 0, draw.used)


def test_whole_mask_needs_the_probability() -> None:
    draw = drawn()
    unknown = Draw(draw.positions, draw.used, draw.n, draw.counts, draw.inclusion)
    with pytest.raises(ValueError, match="'whole_mask' needs the probability of each mask"):
        whole_mask(unknown)
