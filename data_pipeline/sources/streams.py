"""Bytes of text files: ranges of plain files, and decompression with bounded memory.

gzip, xz and bzip2 are read by Python's libraries, member by member. zstd is read by Arrow; frames with a window above
its limit of 128 MB (`zstd --long=31`) by the package zstandard.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from data_pipeline.files import CorpusError
from data_pipeline.sources.inputs import Piece, Progress, Source
from data_pipeline.sources.reading import Limits
from data_pipeline.sources.signatures import HEAD, compression_of, why_not_text

_BLOCK = 1 << 18
# Windows and dictionaries of zstd and xz: the maximum of the command zstd.
_MAX_WINDOW = 1 << 31


class Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


@contextmanager
def open_bytes(source: Source, piece: Piece, progress: Progress, limits: Limits) -> Iterator[Readable]:
    """A reader of the (decompressed) bytes of a piece of a text or JSON lines file.

    Raises CorpusError if the file is not text by its first bytes, or if compressed data are corrupt, truncated, or
    expand beyond the limit.
    """
    with Path(source.path).open("rb", buffering=0) as file:
        if source.compression is None:
            stream: Readable = _Range(file, piece, progress)
        else:
            if source.bytes == 0:
                raise CorpusError(f"{source.path}: corrupt {source.compression} file (empty). Copy or create it again")
            stream = _Decompressed(source, file, progress, limits)
        yield _checked(source, stream) if piece.start == 0 else stream


def _checked(source: Source, stream: Readable) -> Readable:
    head = b""
    while len(head) < HEAD and (block := stream.read(HEAD - len(head))):
        head += block
    if why := why_not_text(head):
        within = f"the content of the {source.compression} file " if source.compression else ""
        raise CorpusError(f"{source.path}: {within}{why}")
    return _Rest(head, stream)


class _Rest:
    """`head`, then the rest of a stream."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head, self._stream = head, stream

    def read(self, n: int, /) -> bytes:
        if not self._head:
            return self._stream.read(n)
        data, self._head = self._head[:n], self._head[n:]
        return data


class _Range:
    def __init__(self, file: Any, piece: Piece, progress: Progress) -> None:
        file.seek(piece.start)
        self._file, self._left, self._progress = file, piece.stop - piece.start, progress

    def read(self, n: int, /) -> bytes:
        data: bytes = self._file.read(min(n, self._left))
        self._left -= len(data)
        self._progress(len(data), 0)
        return data


class _Gzip:
    """One member of a gzip file, with the interface of BZ2Decompressor."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    eof = property(lambda self: self._member.eof)
    unused_data = property(lambda self: self._member.unused_data)
    needs_input = property(lambda self: not self._member.unconsumed_tail)

    def decompress(self, data: bytes, n: int) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, n)


_MEMBERS: dict[str, Callable[[], Any]] = {
    "gzip": _Gzip,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_WINDOW),
    "bzip2": bz2.BZ2Decompressor,
}


class _Members:
    """Reader of a file of compressed members, with zero bytes between or after those of gzip and xz, as from tapes."""

    def __init__(self, file: Any, compression: str) -> None:
        self._file, self._compression, self._new = file, compression, _MEMBERS[compression]
        self._member = self._new()
        self._data = b""

    def read(self, n: int, /) -> bytes:
        while True:
            if self._member is None and not self._next_member():
                return b""
            ended = False
            if self._member.needs_input and not self._data:
                self._data = self._file.read(_BLOCK)
                ended = not self._data
            out: bytes = self._member.decompress(self._data, n)
            self._data = b""
            if self._member.eof:
                self._data, self._member = self._member.unused_data, None
            elif ended and not out:
                raise EOFError("Truncated: the data end before their end mark")
            if out:
                return out

    def _next_member(self) -> bool:
        padded = self._compression != "bzip2"
        while not (data := self._data.lstrip(b"\0") if padded else self._data):
            self._data = self._file.read(_BLOCK)
            if not self._data:
                return False
        self._data, self._member = data, self._new()
        return True


class _Decompressed:
    def __init__(self, source: Source, file: Any, progress: Progress, limits: Limits) -> None:
        self._source, self._file, self._progress, self._limits = source, file, progress, limits
        self._position = self._text = 0
        self._frames = source.compression == "zstd"
        self._stream: Any
        if self._frames:
            self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
        else:
            self._stream = _Members(file, source.compression or "")

    def read(self, n: int, /) -> bytes:
        try:
            data = self._read(n)
        except CorpusError:
            raise
        # The libraries raise errors of their own.
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, MemoryError) as error:
            raise self._corrupt(error) from error
        self._text += len(data)
        self._limits.check_expansion(self._source, self._text)
        position = self._file.tell()
        self._progress(position - self._position, 0)
        self._position = position
        return data

    def _read(self, n: int) -> bytes:
        try:
            data: bytes = self._stream.read(n)
        except OSError:
            if not self._frames or _max_window(self._source.path) <= 1 << 27:
                raise
            self._frames = False
            # The same file object, whose position is the progress; the text read so far is skipped.
            # Arrow's stream is kept, as it closes the file when it is deleted.
            self._file.seek(0)
            self._arrow = self._stream
            self._stream = _LongWindow(self._source.path, self._file, self._text)
            data = self._stream.read(n)
        return data

    def _corrupt(self, error: Exception) -> CorpusError:
        with Path(self._source.path).open("rb") as file:
            found = compression_of(file.read(16))
        hint = "" if found in (None, self._source.compression) else f"the content is {found}: rename the file; "
        return CorpusError(
            f"{self._source.path}: corrupt {self._source.compression} file ({hint}{error}). Copy or create it again"
        )


def _max_window(path: str) -> int:
    """The largest window of the frames of a zstd file, in bytes.

    Walks over the block headers. Raises EOFError if the file is truncated, ValueError if it is not zstd.
    """
    zstandard = _zstandard(path)
    largest = 0
    with Path(path).open("rb") as file:
        while head := file.read(18):
            start = file.tell() - len(head)
            if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a skippable frame
                file.seek(start + 8 + int.from_bytes(head[4:8], "little"))
                continue
            try:
                frame = zstandard.get_frame_parameters(head)
                file.seek(start + zstandard.frame_header_size(head))
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            largest = max(largest, frame.window_size)
            last = False
            while not last:
                if len(block := file.read(3)) < 3:
                    raise EOFError("Truncated: the data end before their last block")
                value = int.from_bytes(block, "little")
                last, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
                file.seek(1 if kind == 1 else size, 1)
            file.seek(4 if frame.has_checksum else 0, 1)
        if file.tell() > Path(path).stat().st_size:
            raise EOFError("Truncated: the data end within a block")
    return largest


class _LongWindow:
    """The text of a zstd file with long windows, from byte `skip`. The file must be complete: zstandard does not notice
    the end of a truncated one."""

    def __init__(self, path: str, file: Any, skip: int) -> None:
        self._library = _zstandard(path)
        decompressor = self._library.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._stream = decompressor.stream_reader(file, read_across_frames=True, closefd=False)
        while skip:
            if not (data := self.read(min(skip, _BLOCK))):
                raise EOFError("Truncated")
            skip -= len(data)

    def read(self, n: int, /) -> bytes:
        try:
            data: bytes = self._stream.read(n)
        except self._library.ZstdError as error:
            raise ValueError(str(error)) from None
        return data


def _zstandard(path: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(
            f"{path}: may have a window above 128 MB (zstd --long), which requires the package zstandard. Install it"
        ) from None
    return zstandard
