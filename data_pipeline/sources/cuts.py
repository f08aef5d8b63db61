"""Cutting of input files into units of work.

The cuts depend only on the inputs, not on the number of workers: a unit is a series of small files, one compressed
file, a byte range of a large plain file between documents, or a series of Parquet row groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.files import CorpusError, reading_input
from data_pipeline.sources.inputs import BLANK_LINE, BUILDER, Piece, Source, Unit
from data_pipeline.sources.tables import open_arrow, open_parquet

_CUTS = {"blank-line": re.compile(BLANK_LINE.encode()), "line": re.compile(b"\n")}
_WIKI_CUT = re.compile(rb"</doc>[ \t\r]*\n")
# The start of a separator at the end of a block, without blanks.
_STARTS = {
    _CUTS["blank-line"]: re.compile(rb"(\n)[ \t\r\f\v]*+\Z"),
    _CUTS["line"]: re.compile(rb"(?!)()"),
    _WIKI_CUT: re.compile(rb"(</doc>)[ \t\r]*+\Z|(<(?:/(?:d(?:oc?)?)?)?)\Z"),
}
_BLOCK = 1 << 16


def cut_units(sources: Sequence[Source], documents: str, text_field: str, unit_bytes: int) -> list[Unit]:
    """Split the sources into units of about `unit_bytes` bytes of text, in order and without gaps or overlaps.

    documents: unit of a document in text files ("blank-line", "line", "file"); text_field: column of Parquet and Arrow
    files. Raises CorpusError if such a file is corrupt or lacks the column.
    """
    units: list[Unit] = []
    small: list[Piece] = []
    weight = 0
    for i, source in enumerate(sources):
        for piece, size in _cut_source(i, source, documents, text_field, unit_bytes):
            if small and weight + size > unit_bytes:
                units.append(tuple(small))
                small, weight = [], 0
            small.append(piece)
            weight += size
    if small:
        units.append(tuple(small))
    return units


def _cut_source(
    i: int, source: Source, documents: str, text_field: str, unit_bytes: int
) -> Iterator[tuple[Piece, int]]:
    """Pieces of one source, with their sizes in bytes of text."""
    if source.format == ".parquet":
        yield from _cut_parquet(i, source, text_field, unit_bytes)
    elif source.format == ".arrow":
        yield from _cut_arrow(i, source, text_field, unit_bytes)
    elif source.format.startswith(BUILDER) or source.format in (".csv", ".tsv", ".json"):
        yield Piece(i, 0, source.bytes), source.bytes
    elif source.compression:
        yield Piece(i, 0, source.bytes), source.text_bytes
    else:
        rule = _WIKI_CUT if source.format == ".wiki" else _CUTS.get("line" if source.format == ".jsonl" else documents)
        start = 0
        with reading_input(source.path), Path(source.path).open("rb") as file:
            while source.bytes - start > unit_bytes and rule:
                stop = _next_cut(file, start + unit_bytes, rule, source.bytes)
                yield Piece(i, start, stop), stop - start
                start = stop
        if start < source.bytes or source.bytes == 0:
            yield Piece(i, start, source.bytes), source.bytes - start


def _next_cut(file: Any, position: int, rule: re.Pattern[bytes], size: int) -> int:
    """Offset of the first document that starts after `position`, or the end of the file. Reads each byte once."""
    file.seek(position)
    data, base = b"", position
    while block := file.read(_BLOCK):
        data += block
        if match := rule.search(data):
            return base + match.end()
        # Only the start of a separator is kept, without the blanks that may follow it, so that `data` stays short.
        base += len(data)
        start = _STARTS[rule].search(data)
        data = next(filter(None, start.groups())) if start else b""
        base -= len(data)
    return size


def _cut_parquet(i: int, source: Source, text_field: str, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    with open_parquet(source) as file:
        _check_column(source, file.schema_arrow, text_field)
        leaves = range(file.metadata.num_columns)
        index = next(j for j in leaves if file.metadata.schema.column(j).path == text_field)
        start = size = 0
        for group in range(file.num_row_groups):
            size += file.metadata.row_group(group).column(index).total_uncompressed_size
            if size >= unit_bytes or group == file.num_row_groups - 1:
                yield Piece(i, start, group + 1), size
                start, size = group + 1, 0
        if file.num_row_groups == 0:
            yield Piece(i, 0, 0), 0


def _check_column(source: Source, schema: pa.Schema, text_field: str) -> None:
    if (count := schema.names.count(text_field)) > 1:
        raise CorpusError(
            f"{source.path}: has {count} columns {text_field!r}. Write the file again with one, or rename the others"
        )
    if text_field not in schema.names:
        raise CorpusError(
            f"{source.path}: has no column {text_field!r}, only {', '.join(schema.names)}. "
            "Set --text-field to the column that holds the text"
        )
    kind = schema.field(text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise CorpusError(f"{source.path}: column {text_field!r} has type {kind}, must be string")


def _cut_arrow(i: int, source: Source, text_field: str, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    start = size = stop = 0
    with open_arrow(source) as batches:
        _check_column(source, batches.schema, text_field)
        for batch in batches:
            size += batch.column(text_field).nbytes
            stop += 1
            if size >= unit_bytes:
                yield Piece(i, start, stop), size
                start, size = stop, 0
    if stop > start or stop == 0:
        yield Piece(i, start, stop), size
