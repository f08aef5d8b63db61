"""Corpus schema, shard writer and memory-mapped reader."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.shards import (
    Corpus,
    CorpusError,
    Manifest,
    ShardEntry,
    SpecialTokens,
    check_shard,
    id_dtype,
    read_manifest,
    write_manifest,
    write_shard,
)
from tests.support.corpora import change_manifest

LENGTH = 8


def make_corpus(folder: Path, shard_rows: tuple[int, ...] = (5, 1, 7), vocab_size: int = 1000) -> np.ndarray:
    """Write a corpus of random ids and return its rows."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    rows = rng.integers(5, vocab_size, (sum(shard_rows), LENGTH)).astype(id_dtype(vocab_size))
    parts = np.split(rows, np.cumsum(shard_rows)[:-1])
    shards = [
        write_shard(folder, f"shard-{i:05}.arrow", part, np.arange(len(part)) % 3 == 0) for i, part in enumerate(parts)
    ]
    write_manifest(folder, make_manifest(shards, vocab_size))
    return rows


def make_manifest(shards: list[ShardEntry], vocab_size: int = 1000) -> Manifest:
    rows = sum(shard.rows for shard in shards)
    return Manifest(
        schema_version=1,
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        vocab_size=vocab_size,
        special_tokens=SpecialTokens(cls=2, sep=3, pad=0, mask=4, unk=1, all=(0, 1, 2, 3, 4)),
        sequence_length=LENGTH,
        seed=0,
        packing="full_sequences",
        rows=rows,
        tokens=rows * LENGTH,
        documents=1,
        sources=(),
        shards=tuple(shards),
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    rows = make_corpus(tmp_path, vocab_size=vocab_size)
    corpus = Corpus(tmp_path)
    assert corpus.dtype == dtype
    assert (corpus.rows, corpus.sequence_length) == rows.shape
    np.testing.assert_array_equal(np.concatenate([corpus.input_ids(i) for i in range(3)]), rows)
    for i, n in enumerate((5, 1, 7)):
        assert corpus.document_end(i).tolist() == [row % 3 == 0 for row in range(n)]
    corpus.verify()


def test_views_are_memory_mapped_and_read_only(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    view = Corpus(tmp_path).input_ids(0)
    assert not view.flags.owndata
    assert not view.flags.writeable


@pytest.mark.parametrize("order", ["ascending", "shuffled", "repeated"])
def test_take_matches_naive_gather(tmp_path: Path, order: str) -> None:
    rows = make_corpus(tmp_path, (5, 1, 7, 30, 2, 2))
    corpus = Corpus(tmp_path)
    rng = np.random.default_rng(1)
    for size in (0, 1, 2, 13, 47):
        wanted = rng.choice(len(rows), size, replace=order == "repeated")
        wanted = np.sort(wanted) if order == "ascending" else wanted
        out = np.full((size, LENGTH), 7, corpus.dtype)
        corpus.take(wanted, out)
        assert out.tolist() == [rows[i].tolist() for i in wanted]


@pytest.mark.parametrize("wanted", [[-1], [13], [0, 13], [-1, 2]])
def test_take_refuses_rows_out_of_range(tmp_path: Path, wanted: list[int]) -> None:
    make_corpus(tmp_path)
    corpus = Corpus(tmp_path)
    with pytest.raises(IndexError, match="corpus has 13 rows"):
        corpus.take(np.array(wanted), np.empty((len(wanted), LENGTH), corpus.dtype))


@pytest.mark.parametrize("wanted", [[0, 1], np.array([True, False]), np.array([0.0, 1.0])])
def test_take_refuses_what_are_no_row_numbers(tmp_path: Path, wanted: Any) -> None:
    """A NumPy mask was taken for rows 1 and 0."""
    make_corpus(tmp_path)
    corpus = Corpus(tmp_path)
    with pytest.raises(TypeError, match=r"rows is .*; an int64 array of row numbers expected"):
        corpus.take(wanted, np.empty((2, LENGTH), corpus.dtype))
    with pytest.raises(TypeError, match="an int64 array of row numbers expected"):
        corpus.take_column("document_end", wanted)


@pytest.mark.parametrize("row", [-1, 13])
def test_locate_refuses_rows_out_of_range(tmp_path: Path, row: int) -> None:
    make_corpus(tmp_path)
    with pytest.raises(IndexError, match=f"row {row} requested, but the corpus has 13 rows"):
        Corpus(tmp_path).locate(row)


def test_a_pickle_holds_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data loaders send it to their workers."""
    rows = make_corpus(tmp_path / "corpus", (5000,))
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Corpus("corpus"))
    monkeypatch.chdir(tmp_path / "corpus")
    assert len(data) < 1000
    for copied in (pickle.loads(data), copy.deepcopy(Corpus(tmp_path / "corpus"))):
        assert np.array_equal(copied.input_ids(0), rows)
        assert not copied.input_ids(0).flags.owndata


@pytest.mark.parametrize(("shape", "dtype"), [((2, 8), "u2"), ((1, 9), "u2"), ((1, 8), "i2"), ((1, 8), "u4")])
def test_take_refuses_a_buffer_that_does_not_fit(tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
    make_corpus(tmp_path)
    with pytest.raises(ValueError, match="must be uint16"):
        Corpus(tmp_path).take(np.array([0]), np.empty(shape, dtype))


def test_size_is_two_bytes_per_token(tmp_path: Path) -> None:
    rows = np.zeros((20_000, 128), np.uint16)
    entry = write_shard(tmp_path, "shard-00000.arrow", rows, np.ones(20_000, np.bool_))
    assert entry.bytes == (tmp_path / entry.file).stat().st_size
    assert entry.bytes / rows.size <= 2.05
    assert entry.sha256 == hashlib.sha256((tmp_path / entry.file).read_bytes()).hexdigest()


def test_manifest_round_trip_and_frozen(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path / "tokenizer", manifest)
    assert read_manifest(tmp_path / "tokenizer") == manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.rows = 3  # type: ignore[misc]


Change = Callable[[dict], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0].update(file="../shard-00000.arrow"), "not a plain file name"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "not a plain file name"),
        (lambda m: m["shards"][0].update(file=".."), "not a plain file name"),
        (lambda m: m["shards"][0].update(file="a\\b"), "not a plain file name"),
        (lambda m: m["shards"][0].update(rows=4), "the shards have 12 rows in total"),
        (lambda m: m["shards"][1].update(m["shards"][0], rows=1), "listed twice"),
        (lambda m: m.update(schema_version=3), "schema_version is 3, this version reads 1 and 2"),
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m.pop("seed"), "seed: Field required"),
        (lambda m: m.update(tokens=10**9), "more than rows x sequence_length"),
        (lambda m: m.update(vocab_size=4), "must be below vocab_size 4"),
        (lambda m: m.update(vocab_size=2**32 + 1), "less than or equal to 4294967296"),
        (lambda m: m.update(packing="other"), "full_sequences"),
    ],
)
def test_bad_manifest(tmp_path: Path, change: Change, message: str) -> None:
    make_corpus(tmp_path)
    change_manifest(tmp_path, change)
    with pytest.raises(CorpusError, match=message) as caught:
        Corpus(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value)


def test_manifest_missing_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="rerun the build command"):
        Corpus(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorpusError, match="not JSON"):
        Corpus(tmp_path)


def test_link_to_outside_the_folder(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    shard = tmp_path / "corpus/shard-00001.arrow"
    shard.rename(tmp_path / "elsewhere.arrow")
    shard.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(CorpusError, match=r"shard-00001\.arrow: links to outside the corpus folder"):
        Corpus(tmp_path / "corpus")


def test_a_link_to_the_folder(tmp_path: Path) -> None:
    rows = make_corpus(tmp_path / "corpus")
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    corpus = Corpus(tmp_path / "link")
    np.testing.assert_array_equal(corpus.input_ids(0), rows[:5])


def test_short_rows_are_padded_with_the_corpus_own_id(tmp_path: Path) -> None:
    """RoBERTa's and others' [PAD] is not 0."""
    make_corpus(tmp_path, (4,))
    short = np.full((4, 5), 9, np.uint16)
    (tmp_path / "shard-00000.arrow").unlink()
    entry = write_shard(tmp_path, "shard-00000.arrow", short, np.ones(4, bool), binned=True)
    roles = SpecialTokens(cls=2, sep=3, pad=1, mask=4, unk=0, all=(0, 1, 2, 3, 4))
    changed = {"schema_version": 2, "special_tokens": roles, "packing": "documents", "tokens": 20, "shards": (entry,)}
    write_manifest(tmp_path, read_manifest(tmp_path).model_copy(update=changed))
    out = np.empty((2, LENGTH), np.uint16)
    Corpus(tmp_path).take(np.array([3, 0]), out)
    assert out.tolist() == [[9] * 5 + [1] * 3] * 2


def test_other_tokenizer(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    (tmp_path / "tokenizer/tokenizer.json").write_text("{ }")
    with pytest.raises(CorpusError, match=r"tokenizer\.json: sha256 .* Restore that tokenizer"):
        Corpus(tmp_path)


def test_missing_and_truncated_shard(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    shard = tmp_path / "shard-00001.arrow"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorpusError, match=rf"shard-00001\.arrow: {size:,} bytes expected, {size - 1:,} found"):
        Corpus(tmp_path)
    shard.unlink()
    with pytest.raises(CorpusError, match=r"shard-00001\.arrow: shard is missing"):
        Corpus(tmp_path)


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    manifest = read_manifest(tmp_path)
    shard = tmp_path / "shard-00001.arrow"
    good = shard.read_bytes()
    for i in range(0, len(good), 7):
        shard.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        with pytest.raises(CorpusError, match=r"shard-00001\.arrow: sha256 .* expected"):
            check_shard(tmp_path, manifest.shards[1], manifest)
        # Opening checks less, but for a damaged header it must raise no other error.
        with suppress(CorpusError):
            Corpus(tmp_path)


def test_verify_names_every_bad_shard(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    corpus = Corpus(tmp_path)
    for i in (0, 2):
        path = tmp_path / f"shard-0000{i}.arrow"
        data = bytearray(path.read_bytes())
        data[-200] ^= 4
        path.write_bytes(data)
    with pytest.raises(CorpusError) as caught:
        corpus.verify()
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        str(tmp_path / "shard-00000.arrow"),
        str(tmp_path / "shard-00002.arrow"),
    ]
    corpus.verify([1])


def replace_shard(folder: Path, table: pa.Table, compression: str | None = None, rows_per_batch: int = 5) -> None:
    """Replace the only shard by another Arrow file, and update size and SHA-256 in the manifest."""
    path = folder / "shard-00000.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    data = path.read_bytes()
    entry = ShardEntry(file=path.name, rows=5, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(folder, make_manifest([entry]))


def make_table(dtype: pa.DataType, nullable: bool = False, length: int = LENGTH, with_null: bool = False) -> pa.Table:
    kind = pa.list_(pa.field("item", dtype, nullable=False), length)
    rows = [list(range(length))] * 4 + [None if with_null else list(range(length))]
    schema = pa.schema([pa.field("input_ids", kind, nullable), pa.field("document_end", pa.bool_(), nullable=False)])
    return pa.Table.from_arrays([pa.array(rows, kind), pa.array([True] * 5)], schema=schema)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (make_table(pa.uint32()), "schema .* expected, found"),
        (make_table(pa.int16()), "schema .* expected, found"),
        (make_table(pa.uint16(), nullable=True), "schema .* expected, found"),
        (make_table(pa.uint16(), length=9), "schema .* expected, found"),
    ],
)
def test_shard_with_another_schema(tmp_path: Path, table: pa.Table, message: str) -> None:
    make_corpus(tmp_path, (5,))
    replace_shard(tmp_path, table)
    with pytest.raises(CorpusError, match=rf"shard-00000\.arrow: {message}"):
        Corpus(tmp_path)


def test_shard_in_two_batches_compressed_or_with_nulls(tmp_path: Path) -> None:
    make_corpus(tmp_path, (5,))
    replace_shard(tmp_path, make_table(pa.uint16()))
    Corpus(tmp_path).verify()
    replace_shard(tmp_path, make_table(pa.uint16()), rows_per_batch=3)
    with pytest.raises(CorpusError, match="exactly one record batch expected, found 2"):
        Corpus(tmp_path)
    replace_shard(tmp_path, make_table(pa.uint16()), compression="zstd")
    with pytest.raises(CorpusError, match="uncompressed data expected"):
        Corpus(tmp_path)
    replace_shard(tmp_path, make_table(pa.uint16(), with_null=True))
    with pytest.raises(CorpusError, match="no nulls expected"):
        Corpus(tmp_path)


def test_shard_that_is_not_an_arrow_file(tmp_path: Path) -> None:
    make_corpus(tmp_path, (5,))
    path = tmp_path / "shard-00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorpusError, match=r"shard-00000\.arrow: Arrow IPC file expected"):
        Corpus(tmp_path)


def test_vocabulary_larger_than_the_token_type() -> None:
    assert id_dtype(2**32) == np.uint32
    with pytest.raises(CorpusError, match=r"4,294,967,297 entries: token ids are at most 32 bits"):
        id_dtype(2**32 + 1)
