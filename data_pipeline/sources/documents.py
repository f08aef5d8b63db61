"""Document readers for text, WikiExtractor, JSON lines, JSON, CSV, TSV, Parquet, Arrow and builders of `datasets`.

Memory is bounded, by the limit of a record for JSON.

White space around documents is stripped, and empty documents are skipped. Documents longer than PIECE characters are
split into pieces before a line end, else before a space, else anywhere. The cuts depend only on the document, and
tokenizers that split at white space, such as BERT's, give the same ids as for the complete document.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.files import CorpusError, reading_input
from data_pipeline.sources.inputs import BLANK_LINE, BUILDER, WIKI_END, Piece, Progress, Source
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.records import json_texts, table_texts, why_no_text
from data_pipeline.sources.streams import Readable, open_bytes
from data_pipeline.sources.tables import open_arrow, open_builder, open_parquet

PIECE = 1 << 20
_BLOCK = 1 << 20
_SEPARATORS = {"blank-line": re.compile(BLANK_LINE), "line": re.compile("\n"), "file": None}
DOCUMENTS = tuple(_SEPARATORS)
_WIKI = re.compile(WIKI_END)
# What WikiExtractor escapes; "&amp;lt;" stands for "&lt;", so they are replaced in one pass.
_ENTITY = re.compile("&(amp|lt|gt);")
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">"}
_ENTITY_START = re.compile("&(?:a|am|amp|l|lt|g|gt)?$")
# Bytes of decoded text that a batch of Parquet rows may have in memory.
_BATCH_BYTES = 1 << 28
_WIKI_HEAD = re.compile(r"\s*<doc [^\n]*>[ \t]*(?:\n|$)")

Text = tuple[str, bool]
"""A document or a piece of one, and whether the document ends with it."""


def read_documents(
    source: Source, piece: Piece, documents: str, text_field: str, progress: Progress, reading: Reading | None = None
) -> Iterator[Text]:
    """Yield the documents of a piece of a source, in order.

    documents: one of DOCUMENTS, for text files; text_field: JSON field or column; reading: None for the defaults.
    Raises CorpusError naming file and position for files that cannot be read or are not text, invalid UTF-8, corrupt
    compression, records that `reading` does not skip, and what exceeds its limits.
    """
    with reading_input(source.path):
        yield from _documents(source, piece, documents, text_field, progress, reading or Reading())


def _documents(
    source: Source, piece: Piece, documents: str, text_field: str, progress: Progress, reading: Reading
) -> Iterator[Text]:
    if source.format == ".parquet":
        yield from _parquet(source, piece, text_field, progress, reading)
    elif source.format == ".arrow":
        yield from _arrow(source, piece, text_field, progress, reading)
    elif source.format.startswith(BUILDER):
        with open_builder(source, text_field, reading) as texts:
            for text in texts:
                yield from _pieces(text)
        progress(source.bytes, 0)
    else:
        with open_bytes(source, piece, progress, reading.limits) as stream:
            blocks = _decode(source, piece.start, stream, reading.lenient)
            if source.format in (".csv", ".tsv"):
                for text in table_texts(source, blocks, text_field, reading):
                    yield from _pieces(text)
            elif source.format == ".json":
                for text in json_texts(source, blocks, text_field, reading):
                    yield from _pieces(text)
            elif source.format == ".jsonl":
                yield from _json_lines(source, piece.start, blocks, text_field, reading)
            elif source.format == ".wiki":
                closing = f"{source.path}: ends within an article"
                yield from _wiki(source, _text(source, blocks, _WIKI, reading, closing))
            else:
                yield from _text(source, blocks, _SEPARATORS[documents], reading)


def _wiki(source: Source, texts: Iterator[Text]) -> Iterator[Text]:
    """Remove the line `<doc id=… url=… title=…>` from articles, and unescape them; the title below the line is kept."""
    started, fresh, tail = False, True, ""
    for text, end in texts:
        if not started:
            head = _WIKI_HEAD.match(text)
            if head is None:
                raise CorpusError(
                    f"{source.path}: an article starts with {text[:40]!r}, not with <doc …>. "
                    "Not an output file of WikiExtractor: use another format for the source (text, jsonl)"
                )
            text, fresh = text[head.end() :], True
        text = text.lstrip() if fresh else text
        text, tail = tail + text, ""
        # An entity may be cut between two pieces.
        if not end and (begun := _ENTITY_START.search(text)):
            text, tail = text[: begun.start()], begun[0]
        text = _ENTITY.sub(lambda match: _ENTITIES[match[1]], text)
        fresh = fresh and not text
        if not fresh:
            yield text, end
        started = not end


def batches(texts: Iterator[Text], size: int) -> Iterator[tuple[list[str], list[bool]]]:
    """Group texts into batches of at least `size` characters (the last one may be smaller)."""
    batch: list[str] = []
    ends: list[bool] = []
    total = 0
    for text, end in texts:
        batch.append(text)
        ends.append(end)
        total += len(text)
        if total >= size:
            yield batch, ends
            batch, ends, total = [], [], 0
    if batch:
        yield batch, ends


def _decode(source: Source, start: int, stream: Readable, lenient: bool = False) -> Iterator[str]:
    tail, offset, final = b"", start, False
    while not final:
        block = stream.read(_BLOCK)
        final = not block
        data = tail + block
        try:
            text, used = codecs.utf_8_decode(data, "surrogateescape" if lenient else "strict", final)
        except UnicodeDecodeError as error:
            within = " of the decompressed text" if source.compression else ""
            where = f"byte {offset + error.start:,}{within}"
            raise CorpusError(
                f"{source.path}: not UTF-8 at {where} (0x{data[error.start]:02x}: {error.reason}). "
                "Convert the file to UTF-8, for example with iconv"
            ) from None
        if offset == 0:
            text = text.removeprefix("\ufeff")
        tail, offset = data[used:], offset + used
        if text:
            yield text


def _text(
    source: Source, blocks: Iterator[str], separator: re.Pattern[str] | None, reading: Reading, closing: str = ""
) -> Iterator[Text]:
    """Split text at separators. closing: error message if the last document must end with a separator but does not."""
    rest, started = "", False
    for block in blocks:
        rest += block
        if separator:
            *complete, rest = separator.split(rest)
            for text in complete:
                yield from _pieces(text, started)
                started = False
        if not started and rest.isspace():
            rest = ""  # before a document
        # Trailing white space may belong to the separator, and must not make the document a long one.
        while len(rest) > PIECE and len(rest.rstrip() if started else rest.strip()) > PIECE:
            rest = rest if started else rest.lstrip()
            cut = _cut(rest, 0)
            yield rest[:cut], False
            rest, started = rest[cut:], True
        if len(rest) > reading.limits.record:
            reading.too_long(f"{source.path}: white space within a document")
    yield from _pieces(rest, started)
    if closing and (started or rest.strip()):
        raise CorpusError(f"{closing}, without its </doc>: the file is truncated. Copy or extract it again")


def _pieces(text: str, started: bool = False) -> Iterator[Text]:
    """Yield a document, or the rest of one that has `started`, in pieces of at most PIECE characters."""
    text = text.rstrip() if started else text.strip()
    if not text and not started:
        return
    start = 0
    while len(text) - start > PIECE:
        cut = _cut(text, start)
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def _cut(text: str, start: int) -> int:
    """End of the piece that starts at `start`. The line end goes to the next piece, as it may be part of a blank line
    with text that has not been read yet; CR LF stays together."""
    cut = start + PIECE
    # Behind the line end that the piece starts with.
    first = start + 2 if text.startswith("\r\n", start) else start + 1
    for sign in "\n", " ":
        if (found := text.rfind(sign, first, start + PIECE)) > 0:
            cut = found
            break
    return cut - 1 if cut - 1 > start and text.startswith("\r\n", cut - 1) else cut


def _json_lines(source: Source, start: int, blocks: Iterator[str], field: str, reading: Reading) -> Iterator[Text]:
    def too_long(number: int) -> None:
        reading.too_long(_line(source, start, number))

    for number, line in enumerate(_lines(blocks, reading.limits.record, too_long), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            fault = f"not JSON ({error}). Every line must be a JSON object"
            reading.bad_record_at(f"{_line(source, start, number)}: {fault}")
            continue
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fault = f"{_line(source, start, number)}: {why_no_text(record, field)}"
            if isinstance(record, dict) and text is None:
                reading.no_text_at(fault)
            else:
                reading.bad_record_at(fault)
            continue
        try:
            text.encode("utf-8", "surrogatepass" if reading.lenient else "strict")
        except UnicodeEncodeError as error:
            fault = f"field {field!r} is not Unicode text ({error.reason} at character {error.start:,})"
            reading.bad_record_at(f"{_line(source, start, number)}: {fault}. Correct or remove the line")
            continue
        yield from _pieces(text)


def _lines(blocks: Iterator[str], limit: int, too_long: Callable[[int], None]) -> Iterator[str]:
    """The lines of a text. too_long: called with the number, from 1, of a line of more than `limit` characters."""
    parts: list[str] = []  # of the current line
    number, size = 1, 0
    for block in blocks:
        first, *others = block.split("\n")
        parts.append(first)
        size += len(first)
        if size > limit:
            too_long(number)
        if others:
            yield "".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
            number += len(others)
            size = len(others[-1])
    yield "".join(parts)


def _line(source: Source, start: int, number: int) -> str:
    """`path:line` of a line in the piece that starts at byte `start`; counts the lines before it."""
    with Path(source.path).open("rb") as file:
        while start > 0 and (block := file.read(min(start, _BLOCK))):
            number += block.count(b"\n")
            start -= len(block)
    return f"{source.path}:{number}"


def _parquet(source: Source, piece: Piece, column: str, progress: Progress, reading: Reading) -> Iterator[Text]:
    with open_parquet(source) as file:
        total = 0
        for group in range(piece.start, piece.stop):
            row = 0
            found = file.metadata.row_group(group)
            batches_ = file.iter_batches(_batch_rows(found, column), row_groups=[group], columns=[column])
            for batch in batches_:
                for text, end in _column(source, batch.column(0), column, row, f"row group {group}", reading):
                    total += len(text)
                    reading.limits.check_expansion(source, total, f"row group {group}, from row {row:,}: ")
                    yield text, end
                row += batch.num_rows
            # Approximate progress: the file size, divided equally among row groups.
            groups = file.num_row_groups
            progress(source.bytes * (group + 1) // groups - source.bytes * group // groups, 0)


def _batch_rows(group: Any, column: str) -> int:
    """Rows per batch of a row group. A value of a dictionary can be as large as the column, and be that of each row: a
    small file would fill the memory."""
    found = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    if not found.has_dictionary_page:
        return 1024
    return min(max(_BATCH_BYTES // max(found.total_uncompressed_size, 1), 1), 1024)


def _arrow(source: Source, piece: Piece, column: str, progress: Progress, reading: Reading) -> Iterator[Text]:
    with open_arrow(source) as batches_:
        for i, batch in enumerate(batches_):
            if i >= piece.stop:
                break
            if i >= piece.start:
                yield from _column(source, batch.column(column), column, 0, f"record batch {i}", reading)
                progress(batch.nbytes, 0)


def _column(source: Source, values: Any, column: str, first: int, where: str, reading: Reading) -> Iterator[Text]:
    """The documents of an Arrow string array whose first row is row `first` of `where`."""
    try:
        values.validate(full=True)
        texts = (value.as_py() for value in values)
    except ValueError as error:
        if not reading.lenient:
            raise CorpusError(
                f"{source.path}: rows {first:,} to {first + len(values) - 1:,} of {where}: "
                f"{column!r} is not UTF-8 ({error}). Write the file again with valid text"
            ) from None
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        # A string view array cannot be reinterpreted as another type without a copy.
        values = values.cast(pa.large_string()) if pa.types.is_string_view(values.type) else values
        values = values.view(pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary())
        raw = (value.as_py() for value in values)
        texts = (None if text is None else text.decode("utf-8", "surrogateescape") for text in raw)
    # One value at a time: the texts of equal values of a dictionary would not fit into memory together.
    for row, text in enumerate(texts, first):
        place = f"{source.path}: row {row:,} of {where}"
        if text is None:
            reading.no_text_at(f"{place} has no {column!r} (null). Remove such rows or replace null by an empty string")
            continue
        reading.check_length(text, place)
        yield from _pieces(text)
