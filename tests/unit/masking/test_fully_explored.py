"""fully_explored: every token once per round, each mask uniform, and the first mask of a round that of `uniform`."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, RunConfig
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import Loader, read_rows
from maskvr_ds.masking.checks import (
    check_masking,
    effective_predictions,
    fewer_predictions,
    maskable_counts,
    predictions_lost,
    segments,
)
from maskvr_ds.masking.rates import masking_rate
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


def run_config(batch: int, **masking: object) -> RunConfig:
    values = {"output_dir": "x", "data": {"path": "x"}, "batch": {"global_size": batch, "micro_size": 1}}
    section = {"strategy": "fully_explored", **masking}
    return RunConfig.model_validate({**values, "training": {"steps": 40}, "masking": section})


@pytest.fixture(scope="module")
def rows_of_16(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("rates") / "corpus", rows=30, length=16, words=150))


@settings(max_examples=80, deadline=None)
@given(
    st.floats(0.05, 0.6),
    st.one_of(st.floats(0.05, 0.6), st.floats(0.9, 1.1)),
    st.sampled_from(["linear", "cosine", "step"]),
    st.booleans(),
)
def test_a_rate_schedule_keeps_rounds_or_is_refused(
    rows_of_16: Corpus, rate: float, final: float, decay: str, same_batch: bool
) -> None:
    """Whatever is accepted predicts every token of a row once per round, though the rate falls with every read; in one
    batch (a row's copies follow each other) no token twice."""
    final = rate * final if final >= 0.9 else final
    section = {"rate": rate, "final_rate": final, "rate_decay": decay}
    section |= {"fully_explored": {"placement": "same_batch"}} if same_batch else {}
    longest, copies = 14, segments(14, rate)
    if any(segments(n, rate) != segments(n, final) for n in range(1, longest + 1)):
        with pytest.raises(ConfigError, match=f"masking.final_rate {final:g}: with strategy fully_explored"):
            check_masking(run_config(copies * 2, **section), rows_of_16)
        return
    check_masking(run_config(copies * 2, **section), rows_of_16)
    reads, batch = 2 * copies, whole_rows(longest)
    draw = masker("fully_explored", longest + 2, rate=rate, final_rate=final)
    seen: list[Counter[int]] = [Counter() for _ in range(3)]
    for read in range(reads):
        draw.set_rate(masking_rate(read, rate, final, total_steps=reads, decay=decay))
        for count, positions in zip(seen, chosen(draw(replace(batch, epochs=torch.full((3,), read)))), strict=True):
            count.update(positions)
    # Count variance 0: every token once in each of the two rounds.
    assert all(count == Counter(dict.fromkeys(range(1, longest + 1), 2)) for count in seen)


@pytest.mark.parametrize(
    ("rate", "lost"),
    [(0.15, 0.05), (0.19, 0.12), (0.24, 0.16), (0.3, 0.17), (0.4, 0.16), (0.6, 0.17), (1 / 7, 0.0)],
)
def test_predictions_that_equal_segments_lose(rate: float, lost: float, tmp_path: Path) -> None:
    """126 tokens: n/S instead of k predictions, said before the first step, and warned of above 2%."""
    assert predictions_lost(126, rate) == pytest.approx(lost, abs=0.011)
    masking = run_config(6, rate=rate).masking
    parts = segments(126, rate)
    assert effective_predictions(masking, 126) == (
        f"{126 / parts:.4g} of 126 tokens of a full row on average, in {parts} disjoint masks"
    )
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=40, length=128, packed=False))
    warning = fewer_predictions(masking, corpus)
    assert (warning is None) == (lost == 0)
    if warning is not None:
        remedy = float(warning.split("at rate ")[1].split()[0])
        assert predictions_lost(126, remedy) <= 0.02
        assert f"{predictions_lost(126, rate):.1%} fewer predictions in the rows of {corpus.folder}" in warning
    assert fewer_predictions(masking.model_copy(update={"strategy": "uniform"}), corpus) is None


def test_rows_with_ends_of_documents_lose_more_than_full_ones(tmp_path: Path) -> None:
    """At 1/3 full rows lose nothing; but 124 tokens and their k = 41 are 4 segments of 31. What is warned of is what
    the masks of these rows lose, and at the rate that is named they do not."""
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=60, length=127, words=150, padded_last_row=True))
    batch = read_rows(corpus, np.arange(60), np.zeros(60, dtype=np.int64))

    def lost(rate: float) -> float:
        made, asked = (
            sum(len(c) for epoch in range(12) for c in chosen(draw(replace(batch, epochs=torch.full((60,), epoch)))))
            for draw in (masker(name, 127, rate=rate) for name in ("fully_explored", "uniform"))
        )
        return 1 - made / asked

    assert predictions_lost(125, 1 / 3) < 0.01
    assert maskable_counts(corpus).keys() == {125, 124, 61}
    assert predictions_lost(maskable_counts(corpus), 1 / 3) == pytest.approx(lost(1 / 3), abs=1e-9)
    warning = fewer_predictions(run_config(6, rate=1 / 3).masking, corpus)
    assert warning is not None
    assert f"{lost(1 / 3):.1%} fewer" in warning
    assert lost(float(warning.split("at rate ")[1].split()[0])) <= 0.02


@pytest.mark.parametrize(("name", "rate"), [("rate", 0.03), ("final_rate", 0.001)])
def test_less_than_one_prediction(rows_of_16: Corpus, name: str, rate: float) -> None:
    config = run_config(6, strategy="uniform", **{name: rate})
    with pytest.raises(ConfigError, match=rf"masking.{name} {rate:g}: less than one prediction in a row of 14 tokens"):
        check_masking(config, rows_of_16)
    check_masking(run_config(6, strategy="uniform", **{name: 0.0358}), rows_of_16)


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
