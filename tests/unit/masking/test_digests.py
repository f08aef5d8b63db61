"""Digests against their definition in plain integers, and what they notice: any single change."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import read_rows, row_digests
from maskvr_ds.masking.masker import Masker, data_digest, mask_digest
from maskvr_ds.masking.strategies import Parameters
from tests.support.corpora import MASK, PAD, make_corpus

VOCABULARY, L, ALL = 90, 24, (1 << 64) - 1
SCORES = (torch.arange(VOCABULARY) + 1.0).double() ** -0.5
RELATIVE = 2.0**-16


def batch_of(rows: int, seed: int) -> TokenBatch:
    """Rows of ordinary tokens with special ones at both ends, as the loader reads them; the last ends in padding."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, VOCABULARY, (rows, L)).astype(np.uint16)
    ids[:, 0], ids[:, -1] = 2, 3
    ids[-1, L // 2 :] = PAD
    numbers, epochs = random.permutation(1000)[:rows].astype(np.int64), random.integers(0, 3, rows)
    columns = (ids, numbers, epochs, ids != PAD, row_digests(ids, numbers, epochs, PAD))
    return TokenBatch(*map(torch.from_numpy, columns))


def masked_of(batch: TokenBatch, strategy: str) -> MaskedBatch:
    masker = Masker(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        special_ids=range(5),
        sequence_length=L,
        seed=3,
        strategy=strategy,
        parameters=Parameters(token_scores=SCORES, floor=0.3),
        rate=0.3,
    )
    return masker(batch)


def mix(z: int) -> int:
    z &= ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


def draw(key: int, counter: int) -> int:
    return mix(key + (counter + 1) * 0x9E3779B97F4A7C15)


def plain_row(batch: TokenBatch, row: int) -> int:
    key = draw(hashing.fold(0), (int(batch.epochs[row]) << 40) + int(batch.sample_ids[row]))
    content = sum(x * (draw(0, i) | 1) for i, x in enumerate([*batch.input_ids[row].tolist(), PAD]))
    return mix(key ^ (content & ALL))


def plain_mask_digest(batch: TokenBatch, masked: MaskedBatch) -> int:
    total = 0
    for row, ids in enumerate(masked.input_ids.tolist()):
        content = sum(x * (draw(0, i) | 1) for i, x in enumerate(ids))
        for position, weight in zip(masked.positions[row].tolist(), masked.weights[row].tolist(), strict=True):
            if weight:
                (bits,) = struct.unpack("<i", struct.pack("<f", weight))
                content += draw(0, (position << 32) + ((bits + 64) >> 7))
        total += mix(plain_row(batch, row) ^ (content & ALL))
    return total & ALL


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1 << 20), st.sampled_from(["uniform", "frequency", "fully_explored"]))
def test_digests_are_as_defined(rows: int, seed: int, strategy: str) -> None:
    batch = batch_of(rows, seed)
    masked = masked_of(batch, strategy)
    assert int(data_digest(batch)) & ALL == sum(plain_row(batch, row) for row in range(len(batch.sample_ids))) & ALL
    assert int(mask_digest(batch, masked)) & ALL == plain_mask_digest(batch, masked)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1 << 20), st.integers(1, 11), st.sampled_from(["uniform", "frequency"]))
def test_digests_do_not_depend_on_the_layout(rows: int, seed: int, size: int, strategy: str) -> None:
    batch = batch_of(rows, seed)
    whole = data_digest(batch), mask_digest(batch, masked_of(batch, strategy))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
    pieces = list(batch.map(lambda column: column[order]).split(size))
    assert sum(data_digest(piece) for piece in pieces) == whole[0]
    assert sum(mask_digest(piece, masked_of(piece, strategy)) for piece in pieces) == whole[1]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["uniform", "frequency"]))
def test_mask_digest_sees_every_single_change(data: st.DataObject, strategy: str) -> None:
    batch = batch_of(6, data.draw(st.integers(0, 100)))
    masked = masked_of(batch, strategy)
    before = mask_digest(batch, masked)
    row = data.draw(st.integers(0, 5))
    slots = torch.nonzero(masked.weights[row]).squeeze(1).tolist()
    slot = data.draw(st.sampled_from(slots))
    what = data.draw(st.sampled_from(["position", "input", "weight", "unused"]))
    changed = masked.map(torch.clone)
    if what == "position":
        free = sorted(set(range(L)) - set(masked.positions[row].tolist()))
        changed.positions[row, slot] = data.draw(st.sampled_from(free))
    elif what == "input":
        place = data.draw(st.integers(0, L - 1))
        other = data.draw(st.integers(0, VOCABULARY - 1).filter(lambda x: x != int(masked.input_ids[row, place])))
        changed.input_ids[row, place] = other
    elif what == "weight":
        factor = data.draw(st.floats(1 + 2 * RELATIVE, 4) | st.floats(0.25, 1 - 2 * RELATIVE))
        changed.weights[row, slot] *= factor
    else:
        changed.weights[row, slot] = 0
    assert mask_digest(batch, changed) != before, what


def test_mask_digest_ignores_unused_slots_and_the_last_bits_of_weights() -> None:
    batch = batch_of(6, 0)
    masked = masked_of(batch, "fully_explored")
    unused = torch.nonzero(masked.weights == 0)
    assert len(unused)
    changed = masked.map(torch.clone)
    row, slot = unused[0].tolist()
    changed.positions[row, slot] = (changed.positions[row, slot] + 1) % L
    assert mask_digest(batch, changed) == mask_digest(batch, masked)
    ones = replace(masked, weights=torch.where(masked.weights != 0, 1.0, 0.0))
    rounded = replace(ones, weights=torch.where(masked.weights != 0, 1.0 + 2.0**-23, 0.0))
    assert mask_digest(batch, rounded) == mask_digest(batch, ones)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_data_digest_sees_every_single_change(data: st.DataObject) -> None:
    """Token, row, epoch and the id of [PAD]."""
    batch = batch_of(6, data.draw(st.integers(0, 100)))
    before = data_digest(batch)
    row, place = data.draw(st.integers(0, 5)), data.draw(st.integers(0, L - 1))
    what = data.draw(st.sampled_from(["token", "pad", "epoch", "sample"]))
    ids, numbers, epochs = (c.numpy().copy() for c in (batch.input_ids, batch.sample_ids, batch.epochs))
    if what == "token":
        ids[row, place] = data.draw(st.integers(0, VOCABULARY - 1).filter(lambda x: x != int(ids[row, place])))
    elif what != "pad":
        {"epoch": epochs, "sample": numbers}[what][row] += data.draw(st.integers(1, 1000))
    digests = row_digests(ids, numbers, epochs, PAD + (what == "pad"))
    assert data_digest(replace(batch, row_digests=torch.from_numpy(digests))) != before, what


def test_rows_are_hashed_as_they_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    corpus = Corpus(make_corpus(tmp_path_factory.mktemp("corpus"), rows=50, padded_last_row=True))
    rows = np.array([49, 3, 3, 0])
    batch = read_rows(corpus, rows, np.arange(4))
    assert int(data_digest(batch)) & ALL == sum(plain_row(batch, row) for row in range(4)) & ALL
