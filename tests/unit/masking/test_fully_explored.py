"""fully_explored: every token once per round, each mask uniform, and the first mask of a round that of `uniform`."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import Loader
from maskvr_ds.masking.checks import segments
from maskvr_ds.masking.strategies import prediction_counts
from tests.support.corpora import make_corpus
from tests.unit.masking.test_strategies import SPECIAL, chosen, masker


def whole_rows(n: int, rows: int = 3, extra: int = 2) -> TokenBatch:
    ids = torch.full((rows, n + extra), 3, dtype=torch.int64)
    ids[:, 1 : n + 1] = torch.arange(5, 5 + n)
    return TokenBatch(ids.to(torch.uint16), torch.arange(rows) * 31, torch.zeros(rows, dtype=torch.int64))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.floats(0.01, 0.99), st.integers(0, 3), st.integers(0, 50), st.integers(0, 2**40))
def test_every_token_is_predicted_once_per_round(n: int, rate: float, extra: int, first: int, seed: int) -> None:
    """Also with more special tokens in the row and from any round on; sizes differ by at most one and are at most k."""
    batch = whole_rows(n, extra=2 + extra)
    draw = masker("fully_explored", n + 2 + extra, rate=rate, seed=seed)
    s = segments(n, rate)
    k = int(prediction_counts(torch.tensor([n]), rate))
    assert s == -(-n // k)
    seen: list[Counter[int]] = [Counter() for _ in range(3)]
    for epoch in range(first * s, (first + 1) * s):
        masked = draw(replace(batch, epochs=torch.full((3,), epoch)))
        for count, positions in zip(seen, chosen(masked), strict=True):
            assert len(positions) in (n // s, -(-n // s))
            assert 0 < len(positions) <= k
            count.update(positions)
    assert all(count == Counter(range(1, n + 1)) for count in seen)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_placements_explore_the_corpus_fully(tmp_path: Path, copies: int) -> None:
    """Loader and masks together: 5 segments per row, 1, 2 or all of them in a global batch.

    After each round, every maskable token of every full row has been predicted equally often. Segments that share a
    batch are disjoint.
    """
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=30, length=32, words=150))
    batches = Loader(corpus, seed=1, global_size=30, copies=copies).batches()
    draw = masker("fully_explored", rate=0.2)
    seen = {row: Counter[int]() for row in range(30)}
    for _ in range(10):  # 10 reads of every row: two rounds of those with 30 maskable tokens
        batch = next(batches)
        masked = chosen(draw(batch))
        if copies == 5:
            assert len(set(batch.sample_ids.tolist())) == 6
        for row, positions in zip(batch.sample_ids.tolist(), masked, strict=True):
            seen[row].update(positions)
    full = 0
    for row, ids in enumerate(corpus.input_ids(0).tolist()):
        places = [i for i, t in enumerate(ids) if t not in SPECIAL]
        if 10 % segments(len(places), 0.2) == 0:
            full += 1
            assert seen[row] == Counter(places * (10 // segments(len(places), 0.2)))
    assert full >= 10


@pytest.mark.parametrize(("rate", "equal"), [(0.2, True), (0.15, True), (0.22, False)])
def test_a_round_starts_with_the_uniform_mask(rate: float, equal: bool) -> None:
    """Segment 0 is uniform's mask of that epoch, with its corruption, if ⌈n/S⌉ = k, otherwise its first ⌈n/S⌉ ranks."""
    batch = whole_rows(60, rows=20)
    s = segments(60, rate)
    for epoch in (0, s, 3 * s):
        now = replace(batch, epochs=torch.full((20,), epoch))
        ours, theirs = (masker(strategy, 62, rate=rate)(now) for strategy in ("fully_explored", "uniform"))
        used = ours.weights != 0
        assert used.sum(1).tolist() == [-(-60 // s)] * 20
        assert torch.equal(ours.positions[used], theirs.positions[used])
        assert torch.equal(ours.input_ids, theirs.input_ids) == equal
        assert torch.equal(ours.weights, theirs.weights) == equal
    later = replace(batch, epochs=torch.full((20,), 1))
    ours, theirs = (masker(strategy, 62, rate=rate)(later) for strategy in ("fully_explored", "uniform"))
    assert all(a != b for a, b in zip(chosen(ours), chosen(theirs), strict=True))


def test_rounds_rows_and_seeds_have_different_permutations() -> None:
    batch = whole_rows(60)
    one = chosen(masker("fully_explored", 62)(batch))
    assert one[0] != one[1] != one[2]
    assert chosen(masker("fully_explored", 62)(replace(batch, epochs=batch.epochs + 7)))[0] != one[0]
    assert chosen(masker("fully_explored", 62, seed=6)(batch))[0] != one[0]


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_every_segment_is_a_uniform_mask_of_its_size(segment: int) -> None:
    """n = 5, k = 2: over 15,000 rows each of the C(5, m) sets comes equally often, so for any function of the mask,
    ℓ with its context included, Σ w ℓ / m has the expectation that uniform masks of size m give it."""
    draws = 15_000
    batch = whole_rows(5, rows=draws)
    masked = masker("fully_explored", 7, rate=0.4)(replace(batch, epochs=torch.full((draws,), segment + 3 * 4)))
    counts = Counter(frozenset(c) for c in chosen(masked))
    m = len(next(iter(counts)))
    sets = math.comb(5, m)
    assert m == [2, 2, 1][segment]
    assert len(counts) == sets
    assert (
        sum((c - draws / sets) ** 2 / (draws / sets) for c in counts.values()) < sets - 1 + 6 * (2 * (sets - 1)) ** 0.5
    )


def test_expectation_over_the_round_is_the_mean_by_enumeration() -> None:
    """The mean over a round of Σ w ℓ, in units of predictions made, is the mean of ℓ: for every single permutation."""
    loss = torch.rand(25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = whole_rows(23, rows=50)
    s = segments(23, 0.3)
    total, made = torch.zeros(50, dtype=torch.float64), torch.zeros(50)
    for epoch in range(s):
        masked = masker("fully_explored", 25, rate=0.3)(replace(batch, epochs=batch.epochs + epoch))
        total += (masked.weights * loss[masked.positions]).sum(1)
        made += (masked.weights != 0).sum(1)
    assert torch.allclose(total / made, loss[1:24].mean().expand(50), rtol=1e-12)
