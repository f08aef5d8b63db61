"""The corpus on disk: manifest, shards, reader and writer. The only module that training imports.

A corpus is a folder:

    manifest.json                what it is: tokenizer, counts, sources, and size and SHA-256 of every shard
    shard-00000.arrow ...        rows of token ids, unmasked
    tokenizer/                   the tokenizer that made the ids
    held_out/                    a corpus of its own, where the build was asked to hold documents out

A shard is an uncompressed Arrow IPC file of exactly one record batch, so that a column is one run of memory
in the map and NumPy reads it in place. Columns, both without nulls:

    input_ids      FixedSizeList<uint16>[L] (uint32 where the vocabulary exceeds 65,536)
    document_end   bool, one bit a row: the final [SEP] of the row ends a document

Every [SEP] inside a row ends a document, text never yields a [SEP], so ids and bits record all boundaries.

Shapes: R rows of a shard, B rows of a batch, L positions of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from data_pipeline.files import CorpusError, atomic_file, sha256_file

__all__ = [
    "SCHEMA_VERSION",
    "Corpus",
    "CorpusError",
    "Manifest",
    "ShardEntry",
    "SourceEntry",
    "SpecialTokens",
    "check_shard",
    "check_tokenizer",
    "id_dtype",
    "read_manifest",
    "verify_shards",
    "write_manifest",
    "write_shard",
]

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
HELD_OUT = "held_out"


def _plain_name(name: str) -> str:
    """A manifest may come from anywhere: what it names must lie in its own folder."""
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name: a corpus only has shards in its own folder")
    return name


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceEntry(_Frozen):
    """One input file: name relative to the folder common to all inputs, size and SHA-256 as it lay on
    disk."""

    name: str
    bytes: NonNegativeInt
    sha256: Sha256


class ShardEntry(_Frozen):
    """One shard: plain file name, rows, file size in bytes, SHA-256 of the file."""

    file: Annotated[str, AfterValidator(_plain_name)]
    rows: PositiveInt
    bytes: PositiveInt
    sha256: Sha256


class SpecialTokens(_Frozen):
    """Ids of the five roles, and `all`: every special id of the tokenizer, ascending."""

    cls: NonNegativeInt
    sep: NonNegativeInt
    pad: NonNegativeInt
    mask: NonNegativeInt
    unk: NonNegativeInt
    all: tuple[NonNegativeInt, ...]


class Manifest(_Frozen):
    """What a corpus is. `tokens` counts all ids that are not [PAD], so with [CLS] and [SEP]."""

    schema_version: Literal[1]
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    special_tokens: SpecialTokens
    sequence_length: PositiveInt
    seed: NonNegativeInt
    packing: Literal["full_sequences"]
    rows: PositiveInt
    tokens: PositiveInt
    documents: PositiveInt
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if (found := sum(shard.rows for shard in self.shards)) != self.rows:
            raise ValueError(f"rows is {self.rows}, but the shards' rows add up to {found}")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        if not self.tokens <= self.rows * self.sequence_length:
            raise ValueError(f"tokens is {self.tokens}, more than rows x sequence_length")
        roles = self.special_tokens
        if max(roles.cls, roles.sep, roles.pad, roles.mask, roles.unk, *roles.all) >= self.vocab_size:
            raise ValueError(f"a special token's id is not below vocab_size {self.vocab_size}")
        return self


def id_dtype(vocab_size: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds ids below `vocab_size`. Raises CorpusError where none does."""
    if vocab_size > 2**32:
        raise CorpusError(f"vocabulary of {vocab_size:,} entries: token ids are at most 32 bits wide")
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _schema(sequence_length: int, dtype: np.dtype) -> pa.Schema:
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema(
        [
            pa.field("input_ids", pa.list_(item, sequence_length), nullable=False),
            pa.field("document_end", pa.bool_(), nullable=False),
        ]
    )


def read_manifest(folder: str | Path) -> Manifest:
    """Read and validate `folder/manifest.json`. Raises CorpusError where it is missing or not valid."""
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(
            f"{path}: not found. Either this is no corpus, or its build has not finished: "
            "run the same build command again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not JSON ({error}). Build the corpus again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise CorpusError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}. Build the corpus again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise CorpusError(f"{path}: {faults}") from None


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, whole or not at all. Its presence says that the corpus is complete."""
    data = (manifest.model_dump_json(indent=2) + "\n").encode()
    with atomic_file(Path(folder) / MANIFEST, len(data)) as file:
        file.write(data)


def write_shard(
    folder: str | Path,
    file_name: str,
    input_ids: NDArray[np.unsignedinteger],
    document_end: NDArray[np.bool_],
) -> ShardEntry:
    """Write one shard, whole or not at all, and return its manifest entry.

    input_ids: uint16 or uint32 [R, L]; document_end: bool [R]. R must be at least 1.
    Raises CorpusError where the disk is full.
    """
    rows, length = input_ids.shape
    assert input_ids.dtype in (np.uint16, np.uint32), input_ids.dtype
    assert document_end.dtype == np.bool_, document_end.dtype
    assert document_end.shape == (rows,), document_end.shape
    assert rows > 0
    schema = _schema(length, input_ids.dtype)
    # From buffers, here and in the reader: Arrow's own conversions from and to NumPy import pandas, a quarter second.
    item, data = pa.from_numpy_dtype(input_ids.dtype), pa.py_buffer(np.ascontiguousarray(input_ids))
    flat = pa.Array.from_buffers(item, input_ids.size, [None, data], null_count=0)
    ids = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("input_ids").type)
    # packbits zeroes the bits behind the last row: equal corpora must be equal bytes.
    bits = pa.py_buffer(np.packbits(document_end, bitorder="little"))
    ends = pa.Array.from_buffers(pa.bool_(), rows, [None, bits], null_count=0)
    batch = pa.record_batch([ids, ends], schema=schema)
    path = Path(folder) / _plain_name(file_name)
    with atomic_file(path, needed=batch.nbytes) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)
    return ShardEntry(file=file_name, rows=rows, bytes=file.bytes, sha256=file.sha256())


def _shard_path(folder: Path, entry: ShardEntry) -> Path:
    """Path of a shard that exists, lies in `folder` also after symbolic links, and has the right size."""
    path = folder / entry.file
    if not path.is_file():
        raise CorpusError(f"{path}: shard is missing. Copy it again or build the corpus again")
    if path.resolve().parent != folder.resolve():
        raise CorpusError(f"{path}: is a link that leaves the corpus folder (to {path.resolve()}). Copy the file in")
    if (size := path.stat().st_size) != entry.bytes:
        raise CorpusError(
            f"{path}: {entry.bytes:,} bytes expected, {size:,} found. Copy it again or build the corpus again"
        )
    return path


def _map_shard(path: Path, entry: ShardEntry, manifest: Manifest) -> pa.RecordBatch:
    """Map a shard's record batch, reading no data. Raises CorpusError where it is not as in the manifest."""
    expected = _schema(manifest.sequence_length, id_dtype(manifest.vocab_size))

    def refuse(rule: str, found: object) -> CorpusError:
        return CorpusError(f"{path}: {rule}, found {found}. Copy the shard again or build the corpus again")

    try:
        memory = pa.memory_map(str(path)).read_buffer()
        reader = pa.ipc.open_file(memory)
        if reader.num_record_batches != 1:
            raise refuse("exactly one record batch expected", reader.num_record_batches)
        if not reader.schema.equals(expected):
            raise refuse(f"schema {expected.to_string()!r} expected", repr(reader.schema.to_string()))
        batch = reader.get_batch(0)
        batch.validate()
    except (pa.ArrowException, OSError) as error:
        raise refuse("Arrow IPC file expected", error) from None
    if batch.num_rows != entry.rows:
        raise refuse(f"{entry.rows:,} rows expected", f"{batch.num_rows:,}")
    ids = batch.column(0).values
    if any(column.null_count for column in (batch.column(0), batch.column(1), ids)):
        raise refuse("no nulls expected", "some")
    # A compressed batch is decompressed into fresh memory: it would fill the machine instead of the map.
    if not memory.address <= ids.buffers()[1].address < memory.address + memory.size:
        raise refuse("uncompressed data expected", "compressed")
    return batch


def check_shard(
    folder: str | Path,
    entry: ShardEntry,
    manifest: Manifest,
    full: bool = True,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Check one shard: exists, size, schema and rows; with `full` also the SHA-256 of the whole file.

    `progress` is called with the bytes read by each step of the full check.
    Raises CorpusError naming the shard, what was expected, what was found, and the remedy.
    """
    path = _shard_path(Path(folder), entry)
    # The hash first: a flipped byte in the Arrow header is a broken file, not a matter of schema.
    if full and (found := sha256_file(path, progress)) != entry.sha256:
        raise CorpusError(
            f"{path}: sha256 {entry.sha256} expected, {found} found: the file was changed or damaged. "
            "Copy it again or build the corpus again"
        )
    _map_shard(path, entry, manifest)


def verify_shards(
    folder: str | Path,
    manifest: Manifest,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Check shards in full (all, or `indices`). Raises one CorpusError with a line for each bad one."""
    faults = []
    for i in range(len(manifest.shards)) if indices is None else indices:
        try:
            check_shard(folder, manifest.shards[i], manifest, progress=progress)
        except CorpusError as error:
            faults.append(str(error))
    if faults:
        raise CorpusError("\n".join(faults))


def check_tokenizer(folder: str | Path, manifest: Manifest) -> None:
    """Raise CorpusError where `folder/tokenizer/tokenizer.json` is not the one that the manifest names."""
    path = Path(folder) / TOKENIZER / "tokenizer.json"
    if not path.is_file():
        raise CorpusError(f"{path}: missing. Copy the corpus again, with its tokenizer folder")
    if (found := sha256_file(path)) != manifest.tokenizer_sha256:
        raise CorpusError(
            f"{path}: sha256 {found} found, but the manifest was made with the tokenizer "
            f"{manifest.tokenizer_sha256}: the ids would mean other words. "
            "Restore that tokenizer or build again"
        )


class Corpus:
    """Memory-mapped reader of a corpus folder.

    Opening checks the manifest, the tokenizer's fingerprint, and existence, size, schema and rows of every
    shard; it reads no token data (`verify` does). Raises CorpusError where something is not as it should be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_tokenizer(self.folder, self.manifest)
        self.rows: int = self.manifest.rows
        self.sequence_length: int = self.manifest.sequence_length
        self.dtype = id_dtype(self.manifest.vocab_size)
        self.tokenizer_folder = self.folder / TOKENIZER
        shards = self.manifest.shards
        self._batches = [_map_shard(_shard_path(self.folder, s), s, self.manifest) for s in shards]
        self._views = [
            np.frombuffer(batch.column(0).values.buffers()[1], self.dtype, shard.rows * self.sequence_length).reshape(
                shard.rows, self.sequence_length
            )
            for batch, shard in zip(self._batches, shards, strict=True)
        ]
        # Row i lies in the shard s with bounds[s] <= i < bounds[s + 1]; int64 [S + 1].
        self._bounds = np.concatenate([[0], np.cumsum([s.rows for s in shards])]).astype(np.int64)

    def take(self, rows: NDArray[np.int64], out: NDArray[np.unsignedinteger]) -> None:
        """Copy rows into a buffer: out[i] = row rows[i].

        rows: int64 [B], ascending (other orders are right too, but slower). out: self.dtype [B, L],
        C-ordered. Raises IndexError where a row is outside of [0, self.rows), ValueError where out does not
        fit.
        """
        if out.shape != (len(rows), self.sequence_length) or out.dtype != self.dtype:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, must be {self.dtype} {(len(rows), self.sequence_length)}"
            )
        if len(rows) == 0:
            return
        if rows.min() < 0 or rows.max() >= self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked of a corpus of {self.rows} rows")
        shard_of = self._bounds.searchsorted(rows, side="right") - 1
        cuts = np.flatnonzero(shard_of[1:] != shard_of[:-1]) + 1
        start = 0
        for stop in [*cuts.tolist(), len(rows)]:
            shard = shard_of[start]
            # "clip" writes straight into out, the default "raise" through a buffer. Checked above.
            np.take(
                self._views[shard],
                rows[start:stop] - self._bounds[shard],
                axis=0,
                out=out[start:stop],
                mode="clip",
            )
            start = stop

    def input_ids(self, i: int) -> NDArray[np.unsignedinteger]:
        """Ids of shard i: self.dtype [R, L], a read-only view of the memory map."""
        return self._views[i]

    def document_end(self, i: int) -> NDArray[np.bool_]:
        """Whether the final [SEP] of each row of shard i ends a document: bool [R], a copy."""
        bits = np.frombuffer(self._batches[i].column(1).buffers()[1], np.uint8)
        return np.unpackbits(bits, count=self.manifest.shards[i].rows, bitorder="little").astype(bool)

    def verify(self, indices: Sequence[int] | None = None, progress: Callable[[int], object] | None = None) -> None:
        """Read shards in full and compare their SHA-256 (all, or those in `indices`).

        `progress` is called with the bytes read by each step. Raises one CorpusError naming every bad shard.
        """
        verify_shards(self.folder, self.manifest, indices, progress)
