"""Data order: a permutation, independent of the number of ranks and resumable at any sample."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds.data.loader import Loader, RepeatSchedule, sample_rows
from maskvr_ds.data.mixture import Share
from maskvr_ds.data.permutation import KeyedPermutation
from tests.support.corpora import PAD, make_corpus

ROWS, LENGTH = 257, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return Corpus(make_corpus(folder, rows=ROWS, length=LENGTH, shard_rows=60, padded_last_row=True))


@pytest.fixture(scope="module")
def table(corpus: Corpus) -> np.ndarray:
    """All rows in one array: the naive reader."""
    return np.concatenate([corpus.input_ids(i) for i in range(len(corpus.manifest.shards))])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(-(1 << 62), 1 << 62))
def test_keyed_permutation_is_a_permutation(size: int, key: int) -> None:
    images = KeyedPermutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_keyed_permutation_of_a_huge_domain_is_injective() -> None:
    size = 10**12 + 39
    images = KeyedPermutation(size, 3)(np.arange(size - 200_000, size))
    assert len(np.unique(images)) == 200_000
    assert images.min() >= 0
    assert images.max() < size


def test_keyed_permutations_look_random() -> None:
    """The images of 12 elements over 6,000 keys are uniform (χ²); neighbours do not stay neighbours."""
    images = np.array([KeyedPermutation(12, key)(np.arange(12)) for key in range(6000)])
    for element in range(12):
        counts = np.bincount(images[:, element], minlength=12)
        assert ((counts - 500) ** 2 / 500).sum() < 11 + 6 * 22**0.5
    neighbours = (np.diff(images, axis=1) == 1).mean()
    assert abs(neighbours - 1 / 12) < 5 * (1 / 12 * 11 / 12 / (6000 * 11)) ** 0.5 * 2


def test_an_empty_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        KeyedPermutation(0, 1)


def test_every_epoch_reads_every_row_once_in_another_order() -> None:
    rows, epochs = sample_rows(np.arange(3 * ROWS), ROWS, seed=4)
    for epoch in range(3):
        assert np.array_equal(np.sort(rows[epochs == epoch]), np.arange(ROWS))
    assert not np.array_equal(rows[:ROWS], rows[ROWS : 2 * ROWS])


def identities(batch) -> list[tuple[int, int]]:
    return sorted(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_ranks_share_the_same_global_batches(corpus: Corpus, world_size: int) -> None:
    size, steps = 24, 30
    samples = np.arange(steps * size)
    rows, epochs = sample_rows(samples, corpus.rows, seed=9)
    parts = [
        list(islice(Loader(corpus, seed=9, global_size=size, rank=r, world_size=world_size).batches(), steps))
        for r in range(world_size)
    ]
    for step in range(steps):
        together = sorted(pair for part in parts for pair in identities(part[step]))
        here = slice(step * size, (step + 1) * size)
        assert together == sorted(zip(epochs[here].tolist(), rows[here].tolist(), strict=True))


def test_resume_at_any_step_reads_the_same_batches(corpus: Corpus) -> None:
    full = list(islice(Loader(corpus, seed=1, global_size=10).batches(), 60))
    for step in (0, 1, 25, 26, 59):
        again = next(Loader(corpus, seed=1, global_size=10, prefetch=1).batches(step * 10))
        assert torch.equal(again.input_ids, full[step].input_ids)
        assert torch.equal(again.epochs, full[step].epochs)


def test_rows_are_those_of_the_corpus(corpus: Corpus, table: np.ndarray) -> None:
    for batch in islice(Loader(corpus, seed=1, global_size=50).batches(), 12):
        assert np.array_equal(batch.input_ids.numpy(), table[batch.sample_ids.numpy()])
        padded = (batch.input_ids.numpy() == PAD).any()
        assert (batch.attention_mask is not None) == padded
        if batch.attention_mask is not None:
            assert np.array_equal(batch.attention_mask.numpy(), batch.input_ids.numpy() != PAD)


def test_a_batch_that_does_not_divide_among_ranks_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="10 sequences is not divisible by 3 ranks"):
        Loader(corpus, seed=0, global_size=10, world_size=3)


def test_a_failing_read_reaches_the_reader(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the file system went away")

    monkeypatch.setattr(Corpus, "take", fail)
    with pytest.raises(OSError, match="went away"):
        next(Loader(corpus, seed=0, global_size=10).batches())


def test_wide_ids(tmp_path: Path) -> None:
    corpus = Corpus(make_corpus(tmp_path / "wide", rows=20, length=8, words=70_000))
    batch = next(Loader(corpus, seed=0, global_size=20).batches())
    assert batch.input_ids.dtype == torch.uint32
    assert np.array_equal(batch.input_ids.numpy(), corpus.input_ids(0)[batch.sample_ids.numpy()])
    assert batch.input_ids.long().max() > 65_535


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_share_a_batch_and_count_as_reads(corpus: Corpus, copies: int) -> None:
    """J copies of a row share a global batch, with consecutive epoch numbers; the order is that without copies."""
    size, steps = 20, 3 * ROWS * copies // 20
    batches = list(islice(Loader(corpus, seed=2, global_size=size, copies=copies).batches(), steps))
    plain, epochs = sample_rows(np.arange(steps * size // copies), ROWS, seed=2)
    for step, batch in enumerate(batches):
        here = slice(step * size // copies, (step + 1) * size // copies)
        expected = [
            (epoch * copies + copy, row)
            for epoch, row in zip(epochs[here].tolist(), plain[here].tolist(), strict=True)
            for copy in range(copies)
        ]
        assert identities(batch) == sorted(expected)
    parts = [
        list(islice(Loader(corpus, seed=2, global_size=size, copies=copies, rank=r, world_size=4).batches(size * 7), 5))
        for r in range(4)
    ]
    for step in range(5):
        together = sorted(pair for part in parts for pair in identities(part[step]))
        assert together == identities(batches[7 + step])


def test_a_batch_that_is_not_a_multiple_of_copies_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="10 sequences is not divisible by 4 copies"):
        Loader(corpus, seed=0, global_size=10, copies=4)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([1, 2, 3, 5])), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90)), min_size=1, max_size=3),
    st.integers(0, 1000),
)
def test_copies_change_during_a_run(
    stretches: list[tuple[int, int]], mixture: list[tuple[int, int]], seed: int
) -> None:
    """The order of rows continues whatever the number of copies; no row has an epoch number twice, all copies of a row
    belong to one round of as many segments, and setting the same number changes nothing."""
    shares = [Share(rows, places) for rows, places in mixture]
    repeats, sample = RepeatSchedule(stretches[0][1]), 0
    found: list[tuple[int, int]] = []
    order: list[int] = []
    for number, (rows_long, copies) in enumerate(stretches):
        if number:
            repeats = repeats.change_copies(sample, copies, shares)
        rows, epochs = sample_rows(np.arange(sample, sample + rows_long * copies), shares, seed, repeats)
        sample += rows_long * copies
        by_row = list(zip(rows.tolist(), epochs.tolist(), strict=True))
        found += by_row
        for first in range(0, len(by_row), copies):
            group = by_row[first : first + copies]
            assert {row for row, _ in group} == {group[0][0]}
            assert [epoch for _, epoch in group] == list(range(group[0][1], group[0][1] + copies))
            assert group[0][1] % copies == 0
            order.append(group[0][0])
    assert len(set(found)) == len(found)
    plain, _ = sample_rows(np.arange(len(order)), shares, seed)
    assert order == plain.tolist()


def test_change_of_copies_discards_prefetched_batches(corpus: Corpus) -> None:
    """Also for a loader started after the change, and on several ranks."""
    loader = Loader(corpus, seed=3, global_size=12, prefetch=4)
    reader = loader.batches()
    before = [next(reader) for _ in range(7)]
    loader.change_copies(7 * 12, 3)
    after = [next(reader) for _ in range(5)]
    again = islice(loader.batches(9 * 12), 3)
    assert all(torch.equal(a.epochs, b.epochs) for a, b in zip(after[2:], again, strict=True))
    rows, epochs = sample_rows(np.arange(7 * 12, 12 * 12), ROWS, 3, loader.repeats)
    read = [(int(e), int(s)) for batch in after for e, s in zip(batch.epochs, batch.sample_ids, strict=True)]
    assert sorted(read) == sorted(zip(epochs.tolist(), rows.tolist(), strict=True))
    plain, _ = sample_rows(np.arange(7 * 12 + 5 * 4), ROWS, 3)
    assert sorted(int(s) for batch in before for s in batch.sample_ids) == sorted(plain[:84].tolist())
    assert sorted({s for _, s in read}) == sorted(set(plain[84:].tolist()))
