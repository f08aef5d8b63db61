"""Full-sequence packing, compared with a token-by-token implementation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.packing.full_sequences import ShardLayout, closing_documents, pack_pieces, pack_rows
from tests.support.documents import CLS, PAD, SEP, reference_pack, unpack

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def make_stream(lengths: list[int]) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    # Distinct ids, so that any lost, repeated or moved token is detected.
    ids = iter(range(100, 100 + sum(lengths)))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    stream = np.array([token for document in documents for token in [*document, SEP]], np.uint16)
    return stream, np.cumsum(np.array(lengths) + 1) - 1, documents


@given(Lengths, st.integers(8, 24))
@example([6], 8)
@example([5, 1], 8)
@example([6, 6, 6], 8)
@example([12, 5, 30], 8)
@example([5], 8)
def test_rows_match_reference(lengths: list[int], length: int) -> None:
    stream, ends, documents = make_stream(lengths)
    input_ids, document_end = pack_rows(stream, ends, length, CLS, SEP, PAD)
    rows, row_ends = reference_pack(documents, length)
    assert input_ids.tolist() == rows
    assert document_end.tolist() == row_ends
    assert input_ids.dtype == stream.dtype


@given(Lengths, st.integers(8, 24))
def test_rows_keep_the_rules(lengths: list[int], length: int) -> None:
    stream, ends, documents = make_stream(lengths)
    input_ids, document_end = pack_rows(stream, ends, length, CLS, SEP, PAD)
    assert list(unpack(input_ids, document_end)) == documents
    assert (input_ids[:, 0] == CLS).all()
    assert (input_ids[:-1] != PAD).all()
    assert (input_ids[:-1, -1] == SEP).all()
    assert (input_ids[:, 1] != SEP).all()
    double = (input_ids[:, :-1] == SEP) & (input_ids[:, 1:] == SEP)
    # Only if a document ends one position before the end of its row.
    assert not double[:, :-1].any()
    assert not document_end[double[:, -1]].any()


@settings(max_examples=200)
@given(Lengths, st.integers(8, 16), st.integers(1, 7), st.integers(1, 9))
def test_shards_concatenate_to_all_rows(lengths: list[int], length: int, rows_per_shard: int, chunk: int) -> None:
    stream, ends, _ = make_stream(lengths)
    full, full_ends = pack_rows(stream, ends, length, CLS, SEP, PAD)
    layout = ShardLayout(length - 2, rows_per_shard)
    for i in range(0, len(ends), chunk):
        layout.add(ends[i : i + chunk])
    layout.finish()
    assert layout.rows == len(full)
    assert layout.padding == (full == PAD).sum()
    parts = []
    stops = [*layout.starts[1:], len(stream)]
    for k, (start, stop) in enumerate(zip(layout.starts, stops, strict=True)):
        inside = ends[(ends >= start) & (ends < stop)] - start
        last = k == len(stops) - 1
        parts.append(pack_rows(stream[start:stop], inside, length, CLS, SEP, PAD, last=last))
        assert len(parts[-1][0]) == rows_per_shard or last
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), full)
    np.testing.assert_array_equal(np.concatenate([bits for _, bits in parts]), full_ends)


@settings(max_examples=300)
@given(Lengths, st.integers(8, 16), st.lists(st.floats(0, 1), max_size=6), st.booleans())
def test_pieces_match_single_call(lengths: list[int], length: int, cuts: list[float], last: bool) -> None:
    stream, ends, _ = make_stream(lengths)
    if not last:  # the part must end at the end of a row
        start = int(closing_documents(ends, 0, length - 2)[1][-1])
        stop = start + (len(stream) - start) // (length - 2) * (length - 2)
        stream, ends = stream[:stop], ends[ends < stop]
    bounds = sorted({0, *(int(cut * len(stream)) for cut in cuts), len(stream)})
    pieces = [(stream[a:b], ends[(ends >= a) & (ends < b)] - a) for a, b in pairwise(bounds)]
    special = (CLS, SEP, PAD, last)
    found = pack_pieces(pieces, len(stream), stream.dtype, length, *special)
    for mine, full in zip(found, pack_rows(stream, ends, length, *special), strict=True):
        np.testing.assert_array_equal(mine, full)


@pytest.mark.parametrize("length", [8, 128, 512])
def test_many_documents(length: int) -> None:
    lengths = np.random.default_rng(0).geometric(0.01, 5000).tolist()
    ids = np.arange(sum(lengths) + len(lengths), dtype=np.uint32) + 10
    ends = np.cumsum(np.array(lengths) + 1) - 1
    ids[ends] = SEP
    documents = [part.tolist() for part in np.split(ids, ends + 1)[:-1]]
    input_ids, document_end = pack_rows(ids, ends, length, CLS, SEP, PAD)
    assert [[*document, SEP] for document in unpack(input_ids, document_end)] == documents
