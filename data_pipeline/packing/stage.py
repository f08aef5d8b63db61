"""Packing stage: token shards to a corpus of rows, parallel and resumable.

The documents of a side form one stream of parts: all token shards in order, then again those whose source has a weight
above 1, and so on, which keeps copies of a document far apart. The fractional part of a weight selects documents by
their hash. Held-out documents are used once, whatever the weights.

`full_sequences`: the layout of all rows is computed from the document lengths, then shards are written independently.
The other packings (packing/pairs.py) first write the rows of each part to temporary files, then join these to shards.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.execution.file_checks import check_files
from data_pipeline.execution.progress import ProgressBar
from data_pipeline.execution.tasks import Task
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError, atomic_file, fsync_path, write_json
from data_pipeline.manifest import LATEST_VERSION, SCHEMA_VERSION, TOKENIZER
from data_pipeline.packing.full_sequences import ShardLayout, pack_pieces
from data_pipeline.packing.pairs import PairOptions, Rows, document_rows, pair_rows
from data_pipeline.packing.parts import PackOptions, Part, make_parts, open_part
from data_pipeline.packing.source_counts import mixture_entries
from data_pipeline.shards import Manifest, ShardEntry, write_manifest, write_shard
from data_pipeline.sources.inputs import Progress
from data_pipeline.tokenization.stage import REBUILD
from data_pipeline.tokenization.token_shards import SideReader, TokenManifest, read_tokens
from data_pipeline.tokenization.tokenizer import copy_tokenizer, pair_separators

_BLOCK = 1 << 20
_logger = logging.getLogger(__name__)
_OPEN_PARTS = 64  # open readers per process, for random segments from the neighbourhood


@dataclass(frozen=True)
class _Side:
    """Settings shared by the tasks of one side. tokens: folder of the token shards; work: folder for temporary rows;
    separators: number of [SEP] between the segments of a pair."""

    tokens: str
    work: str
    side: str
    options: PackOptions
    separators: int = 1


@lru_cache(maxsize=1)
def _tokens(folder: str) -> TokenManifest:
    # The command has compared sizes and hashes: each process of a job would ask the file system for every file again.
    return read_tokens(folder, sizes=False)


@lru_cache(maxsize=_OPEN_PARTS)
def _open(side: _Side, part: Part) -> SideReader:
    return open_part(side.tokens, _tokens(side.tokens), side.side, part, side.options.weights)


def pack_side(
    tokens: Path,
    manifest: TokenManifest,
    side: str,
    folder: Path,
    work: Path,
    tokenizer: Path,
    options: PackOptions,
    pool: Pool,
    bar: ProgressBar,
) -> Manifest:
    """Write the corpus of one side to `folder`, resuming from `work`; returns its manifest, which is written last.

    Raises CorpusError if there would be no rows.
    """
    folder.mkdir(exist_ok=True)
    separators = pair_separators(tokenizer) if options.packing in ("nsp", "sop") else 1
    shared = _Side(str(tokens), str(work), side, options, separators)
    _tokens.cache_clear()
    _open.cache_clear()
    parts = make_parts(manifest, side, options.weights)
    documents, lengths = [0] * len(manifest.names), [0] * len(manifest.names)
    sizes: list[tuple[int, int]] = []  # documents and ids of each part
    for part in parts:
        reader = open_part(tokens, manifest, side, part, options.weights)
        sizes.append((reader.documents, reader.length))
        source = manifest.shards[part.shard].source
        documents[source] += reader.documents
        lengths[source] += reader.length - reader.documents
    if not any(documents):
        raise CorpusError(f"side {side}: the weights select no documents; increase them")
    if options.packing == "full_sequences":
        found = _pack_full(shared, manifest, folder, parts, sizes, pool, bar)
    else:
        found = _pack_rows_of_parts(shared, manifest, folder, parts, sizes, pool, bar)
    if not found["shards"]:
        raise CorpusError(f"packing {options.packing} gives no rows for side {side}: no document has two sentences")
    copy_tokenizer(tokenizer, folder / TOKENIZER, built=True)
    result = Manifest(
        schema_version=LATEST_VERSION,
        tokenizer_sha256=manifest.tokenizer_sha256,
        vocab_size=manifest.vocab_size,
        special_tokens=manifest.special_tokens,
        sequence_length=options.sequence_length,
        seed=options.seed,
        packing=cast(Any, options.packing),
        documents=sum(documents),
        sources=manifest.sources,
        columns=cast(Any, options.all_columns),
        mixture=mixture_entries(tokens, manifest, side, options.weights, documents, lengths),
        dropped=manifest.dropped,
        replaced=manifest.replaced,
        pair_probability=options.probability if options.packing in ("nsp", "sop") else None,
        **found,
    )
    if not result.needs_version_2:
        result = result.model_copy(update={"schema_version": SCHEMA_VERSION})
    write_manifest(folder, result)
    return result


def _pack_full(
    shared: _Side,
    manifest: TokenManifest,
    folder: Path,
    parts: Sequence[Part],
    sizes: Sequence[tuple[int, int]],
    pool: Pool,
    bar: ProgressBar,
) -> dict[str, Any]:
    options = shared.options
    length = options.sequence_length
    layout = lay_out(shared, parts, options.rows_per_shard(length, manifest.dtype))
    offsets = [0, *accumulate(size for _, size in sizes)]
    stops = [*layout.starts[1:], offsets[-1]]
    tasks = []
    unit = 0
    for k, (start, stop) in enumerate(zip(layout.starts, stops, strict=True)):
        while offsets[unit + 1] <= start:
            unit += 1
        pieces = []
        last = unit
        while last < len(parts) and offsets[last] < stop:
            low, high = max(start, offsets[last]), min(stop, offsets[last + 1])
            if high > low:
                pieces.append((parts[last], low - offsets[last], high - offsets[last]))
            last += 1
        name = f"shard-{k:05}"
        arguments = (shared, str(folder), f"{name}.arrow", pieces, k == len(stops) - 1)
        size = (stop - start) * manifest.dtype.itemsize
        tasks.append(Task(f"{shared.side}.{name}", f"{folder / name}.arrow", pack_shard, arguments, size))
    shards = pool.run(tasks, Path(shared.work) / "results", bar.update)
    return {
        "rows": layout.rows,
        "tokens": layout.rows * length - layout.padding,
        "shards": tuple(ShardEntry(**shard) for shard in shards),
    }


def lay_out(shared: _Side, parts: Sequence[Part], rows_per_shard: int) -> ShardLayout:
    """Compute the stream position of the first row of every shard, with one block of document ends in memory."""
    layout = ShardLayout(shared.options.sequence_length - 2, rows_per_shard)
    manifest = _tokens(shared.tokens)
    offset = 0
    for part in parts:
        reader = open_part(shared.tokens, manifest, shared.side, part, shared.options.weights)
        for i in range(0, reader.documents, _BLOCK):
            layout.add(reader.ends[i : i + _BLOCK] + offset)
        offset += reader.length
    layout.finish()
    return layout


def pack_shard(
    shared: _Side, folder: str, file_name: str, pieces: Sequence[tuple[Part, int, int]], last: bool, progress: Progress
) -> dict[str, Any]:
    """Write one shard of full sequences from pieces (part, start, stop) of the stream; returns its manifest entry."""
    manifest = _tokens(shared.tokens)
    length = shared.options.sequence_length
    total = sum(stop - start for _, start, stop in pieces)

    def read(name: str) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        for part, start, stop in pieces:
            reader = _open(shared, part)
            # Search in the memory map: the file of a large unit has more ends than a shard needs.
            first, after = np.searchsorted(reader.ends, (start, stop))
            ends = reader.ends[first:after] - start
            if name == "input_ids":
                yield reader.ids(start, stop), ends
            else:
                yield reader.plane(name, start, stop).view(np.uint8), ends

    def packed(name: str, dtype: Any, cls: int, sep: int, pad: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        return pack_pieces(read(name), total, dtype, length, cls, sep, pad, last)

    tokens = manifest.special_tokens
    input_ids, document_end = packed("input_ids", manifest.dtype, tokens.cls, tokens.sep, tokens.pad)
    # Planes are packed like the ids, with bits cleared at special tokens.
    columns = {plane: packed(plane, np.uint8, 0, 0, 0)[0].view(np.bool_) for plane in shared.options.columns}
    entry = write_shard(folder, file_name, input_ids, document_end, columns)
    progress(total * input_ids.itemsize, 0)
    return entry.model_dump()


def _pack_rows_of_parts(
    shared: _Side,
    manifest: TokenManifest,
    folder: Path,
    parts: Sequence[Part],
    sizes: Sequence[tuple[int, int]],
    pool: Pool,
    bar: ProgressBar,
) -> dict[str, Any]:
    options, item = shared.options, manifest.dtype.itemsize
    firsts = [0, *accumulate(n for n, _ in sizes)]
    if options.packing == "nsp" and firsts[-1] < 2:
        raise CorpusError(f"packing nsp needs at least two documents, side {shared.side} has {firsts[-1]}. Add text")
    # In a file, because sending it with each task would be quadratic in the number of parts.
    write_json(_firsts_path(shared), firsts)
    _firsts.cache_clear()
    tasks = []
    for i, (part, (_, size)) in enumerate(zip(parts, sizes, strict=True)):
        what = f"rows of token shard {part.shard}"
        tasks.append(Task(f"{shared.side}.rows-{i:05}", what, make_rows, (shared, i), size * item))
    results = pool.run(tasks, Path(shared.work) / "results", bar.update)
    _check_rows(shared, results, pool)
    tasks = []
    for index, length in enumerate(options.bins):
        offsets = [0, *accumulate(result["rows"][index] for result in results)]
        per_shard = options.rows_per_shard(length, manifest.dtype)
        for start in range(0, offsets[-1], per_shard):
            stop = min(start + per_shard, offsets[-1])
            pieces = [
                (i, max(start - offsets[i], 0), min(stop, offsets[i + 1]) - offsets[i])
                for i in range(len(parts))
                if offsets[i] < stop and offsets[i + 1] > start
            ]
            name = f"shard-{len(tasks):05}"
            arguments = (shared, str(folder), f"{name}.arrow", index, pieces)
            tasks.append(Task(f"{shared.side}.{name}", f"{folder / name}.arrow", join_rows, arguments))
    shards = pool.run(tasks, Path(shared.work) / "results", bar.update)
    return {
        "rows": sum(sum(result["rows"]) for result in results),
        "tokens": sum(result["tokens"] for result in results),
        "unused": sum(result["unused"] for result in results),
        "labelled": sum(result["labelled"] for result in results),
        "shards": tuple(ShardEntry(**shard) for shard in shards),
    }


def _check_rows(shared: _Side, results: Sequence[dict[str, Any]], pool: Pool) -> None:
    """Compare the rows of all parts with their SHA-256 before they are joined to shards."""
    if any("sha256" not in result for result in results):
        _logger.warning(
            "%s: rows of this build were written by an earlier version and are not hashed, so damage to them would not "
            "be noticed. To exclude it, remove the output folder and build again",
            shared.work,
        )
    hashes = [
        {str(Path(shared.work) / name): sha256 for name, sha256 in result.get("sha256", {}).items()}
        for result in results
    ]
    check_files(hashes, Path(shared.work), pool, lambda *_: None, REBUILD)


def _row_path(shared: _Side, part: int, index: int, column: str) -> Path:
    return Path(shared.work) / f"rows-{part:05}.{shared.side}.{index}.{column}"


def _firsts_path(shared: _Side) -> Path:
    return Path(shared.work) / f"firsts.{shared.side}.json"


@lru_cache(maxsize=1)
def _firsts(shared: _Side) -> tuple[list[Part], list[int]]:
    """The parts of the stream, and the index of the first document of each, plus the total number of documents."""
    parts = make_parts(_tokens(shared.tokens), shared.side, shared.options.weights)
    return parts, json.loads(_firsts_path(shared).read_bytes())


def make_rows(shared: _Side, i: int, progress: Progress) -> dict[str, Any]:
    """Write the rows of part i, in one file per bin and column."""
    options = shared.options
    manifest = _tokens(shared.tokens)
    parts, _ = _firsts(shared)
    reader = _open(shared, parts[i])
    columns = ("input_ids", "document_end", *options.all_columns)
    rows = [0] * len(options.bins)
    tokens = unused = labelled = 0
    with ExitStack() as stack:
        files = {
            (index, column): stack.enter_context(atomic_file(_row_path(shared, i, index, column), fsync_folder=False))
            for index in range(len(options.bins))
            for column in columns
        }
        for block in _blocks(shared, manifest, reader, i):
            values = {"input_ids": block.input_ids, "document_end": block.document_end, **block.columns}
            for column in columns:
                files[block.bin, column].write(np.ascontiguousarray(values[column]).data)
            rows[block.bin] += len(block.input_ids)
            tokens += int((block.input_ids != manifest.special_tokens.pad).sum())
            unused += block.unused
            labelled += int(block.columns["pair_label"].sum()) if "pair_label" in block.columns else 0
    fsync_path(Path(shared.work))
    progress(reader.length * manifest.dtype.itemsize, 0)
    hashes = {_row_path(shared, i, index, column).name: file.sha256() for (index, column), file in files.items()}
    return {"rows": rows, "tokens": tokens, "unused": unused, "labelled": labelled, "sha256": hashes}


def _blocks(shared: _Side, manifest: TokenManifest, reader: SideReader, i: int) -> Iterator[Rows]:
    options = shared.options
    parts, firsts = _firsts(shared)
    special, dtype, planes = manifest.special_tokens, manifest.dtype, options.columns
    if options.packing == "documents":
        return document_rows(reader, options.bins, special, dtype, planes)
    # A second cache, by index: the key of _open is slow to hash.
    opened = lru_cache(maxsize=_OPEN_PARTS)(lambda part: _open(shared, parts[part]))

    def other(number: int) -> tuple[SideReader, int]:
        part = bisect_right(firsts, number) - 1
        return opened(part), number - firsts[part]

    length = options.sequence_length
    pairs = PairOptions(options.packing, options.probability, length, options.seed, shared.separators)
    return pair_rows(reader, firsts[i], firsts[-1], other, pairs, special, dtype, planes)


def join_rows(
    shared: _Side, folder: str, file_name: str, index: int, pieces: Sequence[tuple[int, int, int]], progress: Progress
) -> dict[str, Any]:
    """Write one shard from pieces (part, start, stop) of the rows of one length bin; returns its manifest entry."""
    options = shared.options
    length = options.bins[index]
    kinds: dict[str, Any] = {"input_ids": _tokens(shared.tokens).dtype, "segment_start": np.dtype(np.uint16)}
    widths = {"input_ids": length, "word_start": length, "sentence_start": length}
    values: dict[str, NDArray[Any]] = {}
    for column in ("input_ids", "document_end", *options.all_columns):
        kind, width = kinds.get(column, np.dtype(np.bool_)), widths.get(column, 1)
        found = [
            np.fromfile(
                _row_path(shared, part, index, column),
                kind,
                (stop - start) * width,
                offset=start * width * kind.itemsize,
            )
            for part, start, stop in pieces
        ]
        joined = np.concatenate(found)
        values[column] = joined.reshape(-1, width) if column in widths else joined
    input_ids, document_end = values.pop("input_ids"), values.pop("document_end")
    entry = write_shard(folder, file_name, input_ids, document_end, values, length < options.sequence_length)
    return entry.model_dump()
