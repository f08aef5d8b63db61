"""Texts of JSON files and of CSV and TSV tables, from decoded text.

A JSON file holds an array of objects or of strings, or one object. It is parsed in memory: its length is limited like
that of a record; JSON lines have no such limit. A table has a header. CSV cells may be quoted (RFC 4180); in TSV a line
is a row, and quotes are ordinary characters. Cells are text as written; only an empty cell is no text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

from data_pipeline.files import CorpusError
from data_pipeline.sources.inputs import Source
from data_pipeline.sources.reading import Reading


def json_texts(source: Source, blocks: Iterator[str], field: str, reading: Reading) -> Iterator[str]:
    """The texts of a JSON file. Raises CorpusError, also for what `reading` does not skip."""
    parts: list[str] = []
    size = 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size > reading.limits.record:
            reading.too_long(f"{source.path} (for large files, use JSON lines, .jsonl)")
    if not (text := "".join(parts)).strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = "Extra data" in str(error)
        remedy = "If every line is a JSON object, rename the file to .jsonl" if lines else "Correct the file"
        raise CorpusError(f"{source.path}: not JSON ({error}). {remedy}") from None
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        found = record if isinstance(record, str) else record.get(field) if isinstance(record, dict) else None
        place = f"{source.path}: record {number:,}"
        if not isinstance(found, str):
            fault = f"{place}: {why_no_text(record, field)}"
            if isinstance(record, dict) and found is None:
                reading.no_text_at(fault)
            else:
                reading.bad_record_at(fault)
        elif not reading.lenient and not _is_unicode(found):
            reading.bad_record_at(f"{place}: field {field!r} is not Unicode text. Correct or remove the record")
        else:
            yield found


def table_texts(source: Source, blocks: Iterator[str], column: str, reading: Reading) -> Iterator[str]:
    """The cells of a column. Raises CorpusError, also for what `reading` does not skip."""
    rows = _rows(source, _lines(source, blocks, reading), reading)
    number, header = next(rows, (0, []))
    if not number:
        return
    header = [name.strip() for name in header]
    if header.count(column) != 1:
        what = f"has no column {column!r}" if column not in header else f"has column {column!r} more than once"
        raise CorpusError(
            f"{source.path}: {what}; its first line has {', '.join(map(repr, header))}. Set --text-field to the "
            "column that holds the text; the first line must name the columns"
        )
    index = header.index(column)
    for number, row in rows:
        if not row:
            continue
        place = f"{source.path}:{number}"
        if len(row) != len(header):
            reading.bad_record_at(f"{place}: has {len(row)} cells, the header {len(header)}")
        elif not row[index]:
            reading.no_text_at(f"{place}: cell {column!r} is empty")
        else:
            reading.check_length(row[index], place)
            yield row[index]


def _rows(source: Source, lines: Iterator[str], reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line of each row, and its cells; none for an empty line. Raises CorpusError."""
    if source.format == ".tsv":
        for number, line in enumerate(lines, 1):
            line = line.removesuffix("\n").removesuffix("\r")
            yield number, line.split("\t") if line else []
        return
    # The limit is global in the csv module.
    csv.field_size_limit(reading.limits.record)
    rows = csv.reader(lines, strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise CorpusError(f"{source.path}:{rows.line_num}: not a table ({error}). Correct the file") from None


def _lines(source: Source, blocks: Iterator[str], reading: Reading) -> Iterator[str]:
    """Lines with their line ends, which may lie within a quoted cell."""
    rest = ""
    for block in blocks:
        *complete, rest = (rest + block).split("\n")
        yield from (f"{line}\n" for line in complete)
        if len(rest) > reading.limits.record:
            reading.too_long(source.path)
    if rest:
        yield rest


def why_no_text(record: Any, field: str) -> str:
    """Why a JSON record has no text in `field`, as the end of a message."""
    if not isinstance(record, dict):
        return f"must be a JSON object, found {type(record).__name__}"
    if field in record:
        return f"field {field!r} must be a string, found {type(record[field]).__name__}"
    return f"has no field {field!r}, only {', '.join(record) or 'nothing'}. Set --text-field"


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogate, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
