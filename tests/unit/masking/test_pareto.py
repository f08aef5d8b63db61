"""The sampler and the probabilities that it is given: counting, and hypothesis against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds import hashing
from maskvr_ds.masking.pareto import pareto_sample, proposal_to_inclusion


@pytest.mark.parametrize(("n", "k", "seed"), [(128, 19, 0), (24, 6, 1)])
def test_inclusion_probabilities_over_a_million_draws(n: int, k: int, seed: int) -> None:
    """Empirical inclusion within 1% of π or 5 standard errors; exactly k different positions, none that is special."""
    draws, per_block = 1_000_000, 50_000
    generator = torch.Generator().manual_seed(seed)
    maskable = torch.ones(n + 2, dtype=torch.bool)
    maskable[[0, n // 2]] = False
    scores = torch.rand(n + 2, generator=generator, dtype=torch.float64)
    counts = torch.full((per_block,), k)
    inclusion = proposal_to_inclusion(scores[None], maskable[None], counts[:1], k, 0.1)
    hits = torch.zeros(n + 2, dtype=torch.int64)
    for block in range(0, draws, per_block):
        bits = hashing.stream(torch.arange(block, block + per_block)[:, None] * 977 + seed, torch.arange(n + 2))
        rows = maskable.expand(per_block, -1)
        positions, used = pareto_sample(inclusion.expand(per_block, -1), bits, rows, counts, k)
        assert used.all()
        if block == 0:
            assert (positions.sort(1).values.diff(dim=1) > 0).all()
        hits += torch.bincount(positions.flatten(), minlength=n + 2)
    assert hits[~maskable].sum() == 0
    assert hits.sum() == k * draws
    pi = inclusion[0]
    error = (hits / draws - pi).abs()
    assert (error <= torch.maximum(0.01 * pi, 5 * (pi * (1 - pi) / draws).sqrt())).all()


@pytest.mark.parametrize("padded", [False, True])
def test_a_single_position_is_drawn_exactly(padded: bool) -> None:
    """k = 1 with very unequal π: the drawn frequencies are π, so that the mean weight (1/n)/π is 1 (by Pareto's ranking
    it would be 0.9). Rows with more predictions in the same batch are drawn as they are without them."""
    draws, n = 200_000, 12
    maskable = torch.tensor([False, *[True] * n, False])
    scores = torch.tensor([0.0, *[100.0 ** (i / n) for i in range(n)], 0.0], dtype=torch.float64)
    counts = torch.ones(draws, dtype=torch.int64)
    width = 3
    if padded:
        counts[::2] = 3
    rows = maskable.expand(draws, -1)
    inclusion = proposal_to_inclusion(scores.expand(draws, -1), rows, counts, width, 0.05)
    bits = hashing.stream(torch.arange(draws)[:, None] * 977, torch.arange(n + 2))
    positions, used = pareto_sample(inclusion, bits, rows, counts, width)
    alone = counts == 1
    assert (used.sum(1) == counts).all()
    hits = torch.bincount(positions[alone, 0], minlength=n + 2)
    pi, number = inclusion[alone][0], int(alone.sum())
    assert ((hits / number - pi).abs() <= 5 * (pi * (1 - pi) / number).sqrt()).all()
    weights = 1 / n / inclusion[alone].gather(1, positions[alone, :1])
    assert abs(weights.mean() - 1) < 5 * weights.std() / number**0.5 < 0.03
    if padded:
        others = pareto_sample(inclusion[::2], bits[::2], rows[::2], counts[::2], width)[0]
        assert torch.equal(positions[::2], others)


def plain_inclusion(scores: list[float], k: int) -> list[float]:
    """Cap the largest value until none exceeds 1."""
    pi = [0.0] * len(scores)
    left = sorted(range(len(scores)), key=lambda i: -scores[i])
    room = k
    while left and room * scores[left[0]] > sum(scores[i] for i in left):
        pi[left.pop(0)] = 1.0
        room -= 1
    for i in left:
        pi[i] = room * scores[i] / sum(scores[j] for j in left)
    return pi


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.floats(1e-4, 1.0), st.sampled_from([0.5, 1.0, 1e-4])), min_size=1, max_size=40),
    st.data(),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.floats(1e-30, 1e30),
)
def test_proposals_become_probabilities(scores: list[float], data: st.DataObject, floor: float, scale: float) -> None:
    n = len(scores)
    k = data.draw(st.integers(1, n))
    width = data.draw(st.integers(k, n + 2))
    # Two special positions, whose scores must not matter.
    row = torch.tensor([[7.0, *(s * scale for s in scores), float("nan")]], dtype=torch.float64)
    maskable = torch.tensor([[False, *[True] * n, False]])
    found = proposal_to_inclusion(row, maskable, torch.tensor([k]), width, floor)[0]
    assert found[0] == found[-1] == 0
    pi = found[1:-1]
    assert abs(pi.sum().item() - k) < 1e-9
    assert (pi > 0).all()
    assert (pi <= 1).all()
    expected = torch.tensor(plain_inclusion(scores, k), dtype=torch.float64)
    assert torch.allclose(pi, (1 - floor) * expected + floor * k / n, rtol=1e-7, atol=1e-12)


def test_a_row_does_not_see_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (2 * torch.randn(61, 100, generator=generator)).exp()
    maskable = torch.rand(61, 100, generator=generator) < 0.9
    counts = torch.randint(1, 30, (61,), generator=generator)
    full = proposal_to_inclusion(scores, maskable, counts, 30, 0.2)
    for size in (1, 8):
        parts = [
            proposal_to_inclusion(s, m, c, 30, 0.2)
            for s, m, c in zip(scores.split(size), maskable.split(size), counts.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), full)
    assert torch.equal(proposal_to_inclusion(scores * 4096, maskable, counts, 30, 0.2), full), "only ratios matter"


def test_zeros_equal_scores_and_empty_rows() -> None:
    maskable = torch.tensor([[True] * 5, [True] * 5, [False] * 5, [True] * 5])
    scores = torch.tensor([[0.0] * 5, [3.0] * 5, [1.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]])
    found = proposal_to_inclusion(scores, maskable, torch.tensor([2, 2, 0, 2]), 2, 0.0)
    assert torch.allclose(found[:2], torch.full((2, 5), 0.4, dtype=torch.float64))
    assert (found[2] == 0).all()
    assert torch.allclose(found[3], torch.tensor([1.0, *[0.25] * 4], dtype=torch.float64))
