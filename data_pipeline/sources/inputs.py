"""Input files: listing, opening, and splitting them into units of work.

The split depends only on the inputs, not on the number of workers: a unit is a series of small files, one compressed
file, a byte range of a large plain file between documents, or a series of Parquet row groups.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from data_pipeline.files import CorpusError

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# Approximate compression ratio of text, so that units of compressed files take about as long as others.
_EXPANSION = 4

# A line of only white space ends a document. The same rule for bytes and text: units are cut where the reader splits.
BLANK_LINE = r"\n[ \t\r\f\v]*\n"
# WikiExtractor's end of an article; it cannot occur in the text, where "<" is escaped.
WIKI_END = r"</doc>[ \t\r]*(?:\n|$)"
BUILDER = "builder:"
_CUTS = {"blank-line": re.compile(BLANK_LINE.encode()), "line": re.compile(b"\n")}
_WIKI_CUT = re.compile(rb"</doc>[ \t\r]*\n")

Progress = Callable[[int, int], object]
"""Progress callback, called with (bytes read from disk, tokens produced) since the last call."""


class Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


@dataclass(frozen=True)
class Source:
    """An input file. name: relative to the common parent folder of all inputs; bytes: size; kind: format, if it is not
    given by the file name suffix."""

    path: str
    name: str
    bytes: int
    mtime_ns: int
    kind: str = ""

    @property
    def compression(self) -> str | None:
        return None if self.kind.startswith(BUILDER) else _COMPRESSIONS.get(Path(self.path).suffix.lower())

    @property
    def format(self) -> str:
        """One of ".txt", ".jsonl", ".parquet", ".wiki", ".arrow", "builder:NAME"."""
        if self.kind:
            return self.kind
        path = Path(self.path)
        return Path(path.stem if self.compression else path.name).suffix.lower()

    @property
    def text_bytes(self) -> int:
        """Approximate number of bytes of text in the file."""
        return self.bytes * (_EXPANSION if self.compression else 1)

    def check_unchanged(self) -> None:
        """Raise CorpusError if the file has been modified or removed since the build started."""
        try:
            stat = Path(self.path).stat()
        except FileNotFoundError:
            raise CorpusError(f"{self.path}: disappeared during the build. Restore it and rerun") from None
        if (stat.st_size, stat.st_mtime_ns) != (self.bytes, self.mtime_ns):
            raise CorpusError(
                f"{self.path}: changed since the build started ({self.bytes:,} bytes then, {stat.st_size:,} now). "
                "Restore it, or build into another folder"
            )


@dataclass(frozen=True)
class Piece:
    """Part of a source: bytes, Parquet row groups or Arrow record batches [start, stop) of the file."""

    source: int
    start: int
    stop: int


Unit = tuple[Piece, ...]


def find_sources(inputs: Sequence[str | Path], exclude: Sequence[Path] = (), kind: str = "") -> list[Source]:
    """List the files that match `inputs` (files, folders, globs), sorted by name.

    Folders are searched recursively, except those in `exclude`, skipping hidden files and files without a suffix in
    SUFFIXES; explicitly named files must have one of these. kind: format of all non-hidden files, whatever their names.
    The number of files skipped for their suffix is printed to stderr.
    Raises CorpusError if an input is missing, no file is found, a file is found twice, or a name is not UTF-8.
    """
    paths: list[Path] = []
    others: Counter[str] = Counter()
    for item in map(str, inputs):
        # Path.glob() takes no absolute patterns.
        matches = [item] if Path(item).exists() else sorted(glob.glob(item, recursive=True))  # noqa: PTH207
        if not matches:
            raise CorpusError(f"{item}: no such file or folder, and no file matches it")
        for match in map(Path, matches):
            if match.is_dir():
                excluded = {os.path.realpath(folder) for folder in exclude}
                paths += _walk(match, excluded, "" if kind else SUFFIXES, others)
            elif kind or match.name.lower().endswith(SUFFIXES):
                paths.append(match)
            else:
                raise CorpusError(f"{match}: unknown file type. Supported: {', '.join(SUFFIXES)}")
    if not paths:
        rule = "no file in it" if kind else f"no file ends in {', '.join(SUFFIXES)}"
        raise CorpusError(f"{', '.join(map(str, inputs))}: the corpus is empty: {rule}")
    seen: dict[Path, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise CorpusError(f"{path}: is listed twice (same file as {other}). List every input once")
    # Symbolic links keep their names: the names of the blobs they may point to mean nothing.
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100
    common = os.path.commonpath([path.parent for path in absolute])
    sources = []
    for path in absolute:
        stat = path.stat()
        sources.append(Source(str(path), path.relative_to(common).as_posix(), stat.st_size, stat.st_mtime_ns, kind))
        # Names are stored in the manifest, which is UTF-8.
        if not _is_utf8(sources[-1].name):
            raise CorpusError(f"{str(path)!a}: file name is not UTF-8; rename it")
    if others:
        counts = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(others.items()))
        print(f"skipped {others.total():,} files: {counts}", file=sys.stderr)
    return sorted(sources, key=lambda source: source.name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: Path, exclude: set[str], suffixes: str | tuple[str, ...], others: Counter[str]) -> Iterator[Path]:
    """Files below a folder; counts the suffixes of skipped files, except hidden ones, in `others`."""
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in exclude
        ]
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(suffixes):
                yield Path(parent, name)
            else:
                others[ascii(Path(name).suffix.lower())[1:-1] or "without suffix"] += 1


def _raise(error: OSError) -> None:
    raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})") from error


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
    elif source.format.startswith(BUILDER):
        yield Piece(i, 0, source.bytes), source.bytes
    elif source.compression:
        yield Piece(i, 0, source.bytes), source.text_bytes
    else:
        rule = _WIKI_CUT if source.format == ".wiki" else _CUTS.get("line" if source.format == ".jsonl" else documents)
        start = 0
        with Path(source.path).open("rb") as file:
            while source.bytes - start > unit_bytes and rule:
                stop = _next_cut(file, start + unit_bytes, rule, source.bytes)
                yield Piece(i, start, stop), stop - start
                start = stop
        if start < source.bytes or source.bytes == 0:
            yield Piece(i, start, source.bytes), source.bytes - start


def _next_cut(file: Any, position: int, rule: re.Pattern[bytes], size: int) -> int:
    """Offset of the first document that starts after `position`, or the end of the file."""
    file.seek(position)
    data, base = b"", position
    while block := file.read(1 << 16):
        data += block
        if match := rule.search(data):
            return base + match.end()
        # A separator may still start at the last line end, but not before it.
        keep = max(data.rfind(b"\n"), 0) if b"\n" in data else len(data)
        base, data = base + keep, data[keep:]
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


@contextmanager
def open_arrow(source: Source) -> Iterator[Any]:
    """The record batches of a memory-mapped Arrow stream file, as saved by `datasets`.

    Raises CorpusError if the file is corrupt, also while it is being read.
    """
    try:
        with pa.memory_map(source.path) as file, pa.ipc.open_stream(file) as reader:
            yield reader
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{source.path}: corrupt Arrow file ({error}). Save the dataset again") from error


@contextmanager
def open_builder(source: Source, text_field: str) -> Iterator[Iterator[str]]:
    """Stream the texts of one local file through a builder of `datasets`.

    Raises CorpusError if the library is missing, the builder fails, or a record has no such text.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"{source.path}: format {source.format} requires the package datasets. Install it") from None
    name = source.format.removeprefix(BUILDER)
    place = f"{source.path} (builder {name})"

    def texts() -> Iterator[str]:
        data = datasets.load_dataset(name, data_files=[glob.escape(source.path)], split="train", streaming=True)
        for row, record in enumerate(data):
            text = record.get(text_field)
            if not isinstance(text, str):
                found = f"only {', '.join(map(str, record))}" if text_field not in record else type(text).__name__
                raise CorpusError(f"{place}: record {row:,} has no text in {text_field!r}, {found}. Set text_field")
            yield text

    try:
        yield texts()
    except CorpusError:
        raise
    except Exception as error:  # the parser of a builder may raise anything
        raise CorpusError(f"{place}: cannot be read ({type(error).__name__}: {error}). Correct the file") from error


@contextmanager
def open_parquet(source: Source) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises CorpusError if the file is corrupt, also while it is being read."""
    import pyarrow.parquet as pq

    try:
        # Buffered, so that only some pages of a column chunk are in memory, whatever its size.
        with pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{source.path}: corrupt Parquet file ({error}). Copy or create it again") from error


@contextmanager
def open_bytes(source: Source, piece: Piece, progress: Progress) -> Iterator[Readable]:
    """A reader of the (decompressed) bytes of a piece of a text or JSON lines file.

    Raises CorpusError if compressed data are corrupt or truncated.
    """
    if source.compression is None:
        with Path(source.path).open("rb", buffering=0) as file:
            yield _Range(file, piece, progress)
        return
    if source.bytes == 0:
        raise CorpusError(f"{source.path}: corrupt {source.compression} file (empty). Copy or create it again")
    with pa.OSFile(source.path, "rb") as raw, pa.CompressedInputStream(raw, source.compression) as stream:
        yield _Decompressed(source, raw, stream, progress)


class _Range:
    def __init__(self, file: Any, piece: Piece, progress: Progress) -> None:
        file.seek(piece.start)
        self._file, self._left, self._progress = file, piece.stop - piece.start, progress

    def read(self, n: int, /) -> bytes:
        data = self._file.read(min(n, self._left))
        self._left -= len(data)
        self._progress(len(data), 0)
        return data


class _Decompressed:
    def __init__(self, source: Source, raw: Any, stream: Any, progress: Progress) -> None:
        self._source, self._raw, self._stream, self._progress = source, raw, stream, progress
        self._position = 0

    def read(self, n: int, /) -> bytes:
        try:
            data = self._stream.read(n)
        except OSError as error:
            raise CorpusError(
                f"{self._source.path}: corrupt {self._source.compression} file ({error}). Copy or create it again"
            ) from error
        position = self._raw.tell()
        self._progress(position - self._position, 0)
        self._position = position
        return data
