"""Corpus format: shards, their reader and writer. The interface that training uses.

A corpus is a folder:

    manifest.json                tokenizer, counts, sources, and size and SHA-256 of every shard
    shard-00000.arrow ...        rows of token ids, unmasked
    tokenizer/                   the tokenizer that produced the ids
    held_out/                    corpus of the held-out documents, if the build was asked for one

A shard is an uncompressed Arrow IPC file with exactly one record batch, so that each column is contiguous in the memory
map and NumPy reads it in place. Columns, without nulls:

    input_ids       FixedSizeList<uint16>[L] (uint32 if the vocabulary exceeds 65,536)
    document_end    bool, one bit per row: the final [SEP] of the row ends a document

and, if listed in `columns` of the manifest:

    word_start      FixedSizeList<bool>[L], one bit per position: the token starts a word of the pre-tokenizer
    sentence_start  FixedSizeList<bool>[L]: the token starts a sentence
    segment_start   uint16: position of the first token of the second segment of a pair
    pair_label      bool: the second segment is a random one (nsp), or the segments are swapped (sop)

In full sequences, every [SEP] inside a row ends a document, and text never encodes to [SEP], so ids and bits record all
boundaries. In the packing `documents`, a row holds one document, or one part of a long one. With length bins, the rows
of a shard may be stored shorter than L; `Corpus.take` pads them.

Shapes: R rows of a shard, B rows of a batch, L positions of a row.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.checksums import is_hashed, not_hashed
from data_pipeline.files import CorpusError, map_file, sha256_file
from data_pipeline.manifest import (
    HELD_OUT,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    Manifest,
    MixtureEntry,
    Sha256,
    ShardEntry,
    SourceEntry,
    SpecialTokens,
    id_dtype,
    read_manifest,
    write_manifest,
)
from data_pipeline.shard_files import shard_schema, write_shard

__all__ = [
    "HELD_OUT",
    "MANIFEST",
    "SCHEMA_VERSION",
    "TOKENIZER",
    "Corpus",
    "CorpusError",
    "Manifest",
    "MixtureEntry",
    "OpenFiles",
    "Sha256",
    "ShardEntry",
    "SourceEntry",
    "SpecialTokens",
    "beyond_vocabulary",
    "check_shard",
    "check_tokenizer",
    "id_dtype",
    "open_here",
    "read_manifest",
    "verify_shards",
    "write_manifest",
    "write_shard",
]

_BLOCK = 1 << 20


def _shard_path(folder: Path, entry: ShardEntry) -> Path:
    """Path of a shard. Raises CorpusError if it is missing, resolves to outside `folder`, or has the wrong size."""
    path = folder / entry.file
    if not path.is_file():
        raise CorpusError(f"{path}: shard is missing. Copy it again or build the corpus again")
    if path.resolve().parent != folder.resolve():
        raise CorpusError(f"{path}: links to outside the corpus folder (to {path.resolve()}). Copy the file instead")
    if (size := path.stat().st_size) != entry.bytes:
        raise CorpusError(
            f"{path}: {entry.bytes:,} bytes expected, {size:,} found. Copy it again or build the corpus again"
        )
    return path


OpenFiles = Callable[[Callable[[int], int], int], Iterable[int]]
"""Called with (open, n); returns the descriptors open(0) … open(n − 1), possibly opened by another process."""


def open_here(open_one: Callable[[int], int], number: int) -> Iterable[int]:
    """Open all files in this process (the default OpenFiles)."""
    return map(open_one, range(number))


def _open_shard(folder: Path, entry: ShardEntry) -> int:
    return os.open(_shard_path(folder, entry), os.O_RDONLY | os.O_CLOEXEC)


def _map_shard(descriptor: int, path: Path, entry: ShardEntry, manifest: Manifest) -> tuple[pa.Buffer, pa.RecordBatch]:
    """Memory-map a shard without reading its data; closes the descriptor. Returns the map and the record batch.

    Raises CorpusError if the file does not match the manifest.
    """
    length = entry.length or manifest.sequence_length
    expected = shard_schema(length, id_dtype(manifest.vocab_size), manifest.columns)

    def refuse(rule: str, found: object) -> CorpusError:
        return CorpusError(f"{path}: {rule}, found {found}. Copy the shard again or build the corpus again")

    try:
        try:
            # Reading a map beyond the end of its file is a SIGBUS.
            if (size := os.fstat(descriptor).st_size) != entry.bytes:
                raise refuse(f"{entry.bytes:,} bytes expected", f"{size:,}")
            memory = map_file(descriptor, size)
        finally:
            os.close(descriptor)
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
    if any(column.null_count for column in (*batch.columns, ids)):
        raise refuse("no nulls expected", "some")
    # A compressed batch would be decompressed into RAM.
    if not memory.address <= ids.buffers()[1].address < memory.address + memory.size:
        raise refuse("uncompressed data expected", "compressed")
    return memory, batch


def check_shard(
    folder: str | Path,
    entry: ShardEntry,
    manifest: Manifest,
    full: bool = True,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Check existence, size, schema and number of rows of a shard; full: also its SHA-256.

    progress: called with the bytes read for the SHA-256.
    Raises CorpusError naming the shard, the expected and actual values, and the remedy.
    """
    path = _shard_path(Path(folder), entry)
    # Hash first: report a flipped byte in the Arrow header as damage, not as a wrong schema.
    if full and (found := sha256_file(path, progress)) != entry.sha256:
        raise _damaged(path, entry, found)
    _map_shard(_open_shard(Path(folder), entry), path, entry, manifest)


def _damaged(path: Path, entry: ShardEntry, found: str) -> CorpusError:
    return CorpusError(
        f"{path}: sha256 {entry.sha256} expected, {found} found: the file was modified or damaged. "
        "Copy it again or build the corpus again"
    )


def beyond_vocabulary(path: Path, first: int, ids: NDArray[np.unsignedinteger], vocab_size: int) -> str | None:
    """The first row of a block with an id that the vocabulary does not have, in words; None if there is none.

    path: of the shard; first: its row that ids[0] is; ids: [R, L].
    """
    if ids.max() < vocab_size:
        return None
    row = int((ids >= vocab_size).any(axis=1).argmax())
    return (
        f"{path}: row {first + row:,} has id {ids[row].max()}, must be below the vocabulary size {vocab_size:,}. "
        "Build the corpus again"
    )


def verify_shards(
    folder: str | Path,
    manifest: Manifest,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Check shards (all, or `indices`) including their SHA-256. Raises one CorpusError with one line per bad shard."""
    faults = []
    for i in range(len(manifest.shards)) if indices is None else indices:
        try:
            check_shard(folder, manifest.shards[i], manifest, progress=progress)
        except CorpusError as error:
            faults.append(str(error))
    if faults:
        raise CorpusError("\n".join(faults))


def check_tokenizer(folder: str | Path, manifest: Manifest) -> None:
    """Raise CorpusError if `folder/tokenizer/tokenizer.json` does not match the manifest."""
    path = Path(folder) / TOKENIZER / "tokenizer.json"
    if not path.is_file():
        raise CorpusError(f"{path}: missing. Copy the corpus again, with its tokenizer folder")
    if (found := sha256_file(path)) != manifest.tokenizer_sha256:
        raise CorpusError(
            f"{path}: sha256 {found} found, but the corpus was built with the tokenizer "
            f"{manifest.tokenizer_sha256}: ids would have another meaning. Restore that tokenizer or build again"
        )


def _row_numbers(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows as int64. Raises TypeError for what is no array of integers: True and False would be rows 1 and 0."""
    if not isinstance(rows, np.ndarray) or (rows.size and rows.dtype.kind not in "iu"):
        found = f"{rows.dtype} array" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise TypeError(f"rows is {found}; an int64 array of row numbers expected, as np.array([0, 1])")
    return rows.astype(np.int64, copy=False)


class Corpus:
    """Memory-mapped reader of a corpus folder.

    Opening checks the manifest, the SHA-256 of the tokenizer, and existence, size, schema and number of rows of every
    shard, but reads no token data (`verify` does). Each shard is opened once, and stays mapped without a descriptor.
    open_files: opens the shards, possibly through another process. Raises CorpusError if any check fails.
    `remarks`: sentences about what is not wrong, but should be known. A copy or pickle holds the folder only, which is
    opened again.
    """

    def __init__(self, folder: str | Path, open_files: OpenFiles = open_here) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        manifest = self.folder / MANIFEST
        self.remarks: tuple[str, ...] = () if is_hashed(manifest) else (not_hashed([manifest]),)
        check_tokenizer(self.folder, self.manifest)
        self.rows: int = self.manifest.rows
        self.sequence_length: int = self.manifest.sequence_length
        self.dtype = id_dtype(self.manifest.vocab_size)
        self.tokenizer_folder = self.folder / TOKENIZER
        shards = self.manifest.shards
        descriptors = open_files(lambda i: _open_shard(self.folder, shards[i]), len(shards))
        mapped = [
            _map_shard(descriptor, self.folder / shard.file, shard, self.manifest)
            for descriptor, shard in zip(descriptors, shards, strict=True)
        ]
        self._memory, self._batches = [memory for memory, _ in mapped], [batch for _, batch in mapped]
        self._views = [
            np.frombuffer(batch.column(0).values.buffers()[1], self.dtype, shard.rows * length).reshape(
                shard.rows, length
            )
            for batch, shard in zip(self._batches, shards, strict=True)
            for length in [shard.length or self.sequence_length]
        ]
        # Row i is in shard s if bounds[s] <= i < bounds[s + 1]; int64 [S + 1].
        self._bounds = np.concatenate([[0], np.cumsum([s.rows for s in shards])]).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        # Else Arrow would copy all tokens.
        return type(self), (self.folder.absolute(),)

    def take(self, rows: NDArray[np.int64], out: NDArray[np.unsignedinteger]) -> None:
        """Copy rows into a buffer: out[i] = row rows[i].

        rows: int64 [B], in any order, but fastest if ascending; out: self.dtype [B, L], C-contiguous. Raises IndexError
        if a row is outside [0, self.rows), ValueError if out has another shape or dtype, TypeError if rows is no array
        of integers.
        """
        rows = _row_numbers(rows)
        if out.shape != (len(rows), self.sequence_length) or out.dtype != self.dtype:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, must be {self.dtype} {(len(rows), self.sequence_length)}"
            )
        if len(rows) == 0:
            return
        if rows.min() < 0 or rows.max() >= self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} requested, but the corpus has {self.rows} rows")
        for shard, start, stop in self._runs(rows):
            view = self._views[shard]
            here = rows[start:stop] - self._bounds[shard]
            if view.shape[1] == self.sequence_length:
                # "clip" writes to out directly, the default "raise" through a buffer. Bounds are checked above.
                np.take(view, here, axis=0, out=out[start:stop], mode="clip")
            else:
                out[start:stop, : view.shape[1]] = view[here]
                out[start:stop, view.shape[1] :] = self.manifest.special_tokens.pad

    def _runs(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, start, stop) such that rows[start:stop] are in this shard."""
        shard_of = self._bounds.searchsorted(rows, side="right") - 1
        cuts = np.flatnonzero(shard_of[1:] != shard_of[:-1]) + 1
        start = 0
        for stop in [*cuts.tolist(), len(rows)]:
            yield int(shard_of[start]), start, stop
            start = stop

    def take_column(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A column of the given rows, int64 [B]: word_start and sentence_start bool [B, L], segment_start uint16 [B],
        pair_label and document_end bool [B]. Raises ValueError if the corpus has no such column, IndexError if a row is
        outside [0, self.rows), TypeError if rows is no array of integers.
        """
        rows = _row_numbers(rows)
        names = ("document_end", *self.manifest.columns)
        if name not in names:
            raise ValueError(f"{self.folder}: has no column {name!r}, only {', '.join(names)}. Pack the corpus with it")
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} requested, but the corpus has {self.rows} rows")
        by_position = name in ("word_start", "sentence_start")
        shape = (len(rows), self.sequence_length) if by_position else (len(rows),)
        out: NDArray[Any] = np.zeros(shape, np.uint16 if name == "segment_start" else np.bool_)
        for shard, start, stop in self._runs(rows) if len(rows) else ():
            here = rows[start:stop] - self._bounds[shard]
            column = self._batches[shard].column(name)
            if name == "segment_start":
                out[start:stop] = np.frombuffer(column.buffers()[1], np.uint16, len(column))[here]
                continue
            width = self._views[shard].shape[1] if by_position else 1
            data = np.frombuffer((column.values if by_position else column).buffers()[1], np.uint8)
            bits = here[:, None] * width + np.arange(width)
            found = (data[bits >> 3] >> (bits & 7).astype(np.uint8) & 1).astype(np.bool_)
            if by_position:
                out[start:stop, :width] = found
            else:
                out[start:stop] = found[:, 0]
        return out

    @property
    def bins(self) -> list[tuple[int, int, int]]:
        """(length, first row, row behind the last) of each run of shards with rows of one stored length."""
        found: list[tuple[int, int, int]] = []
        for shard, (start, stop) in zip(self._views, itertools.pairwise(self._bounds.tolist()), strict=True):
            if found and found[-1][0] == shard.shape[1]:
                found[-1] = (found[-1][0], found[-1][1], stop)
            else:
                found.append((shard.shape[1], start, stop))
        return found

    def input_ids(self, i: int) -> NDArray[np.unsignedinteger]:
        """Ids of shard i: a read-only view of the memory map, self.dtype [R, L] (with length bins, the length of the
        shard)."""
        return self._views[i]

    def document_end(self, i: int) -> NDArray[np.bool_]:
        """Whether the final [SEP] of each row of shard i ends a document: a copy, bool [R]."""
        bits = np.frombuffer(self._batches[i].column(1).buffers()[1], np.uint8)
        return np.unpackbits(bits, count=self.manifest.shards[i].rows, bitorder="little").astype(bool)

    def verify(self, indices: Sequence[int] | None = None, progress: Callable[[int], object] | None = None) -> None:
        """Read shards (all, or `indices`) through the memory map and check their SHA-256, and that ids are below the
        vocabulary size.

        progress: called with the number of bytes of each read. Raises one CorpusError with one line per bad shard.
        """
        faults = []
        for i in range(len(self._memory)) if indices is None else indices:
            digest, data = hashlib.sha256(), memoryview(self._memory[i])
            for start in range(0, len(data), _BLOCK):
                digest.update(block := data[start : start + _BLOCK])
                if progress:
                    progress(len(block))
            entry = self.manifest.shards[i]
            if (found := digest.hexdigest()) != entry.sha256:
                faults.append(str(_damaged(self._path(i), entry, found)))
            elif (fault := self._beyond_vocabulary(i)) is not None:
                faults.append(fault)
        if faults:
            raise CorpusError("\n".join(faults))

    def _beyond_vocabulary(self, i: int) -> str | None:
        """The first row of shard i with an id that the vocabulary does not have, in words; None if there is none."""
        ids = self._views[i]
        rows = max(_BLOCK // ids.shape[1], 1)
        for first in range(0, len(ids), rows):
            if fault := beyond_vocabulary(self._path(i), first, ids[first : first + rows], self.manifest.vocab_size):
                return fault
        return None

    def locate(self, row: int) -> tuple[Path, int]:
        """The shard's file that a row is stored in, and the row's number there. Raises IndexError as `take`."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} requested, but the corpus has {self.rows} rows")
        shard = int(self._bounds.searchsorted(row, side="right")) - 1
        return self._path(shard), row - int(self._bounds[shard])

    def _path(self, i: int) -> Path:
        return self.folder / self.manifest.shards[i].file
