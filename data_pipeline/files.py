"""Files that appear under their final name only when whole, and the pipeline's error type."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

# EFBIG: the limit of the process (ulimit -f) or of the file system; to the user it is the same trouble.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = ".partial"


class CorpusError(ValueError):
    """A fault in what the user gave: input, arguments, corpus, disk. The message names the remedy."""


class HashingFile:
    """Write-only binary file that keeps the SHA-256 and the length of what went through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        if view.nbytes == 0:  # cannot be cast
            return 0
        view = view.cast("B")
        self._raw.write(view)
        self._sha256.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._raw.flush()

    def close(self) -> None:
        """pyarrow closes its sink; the file itself stays open until it is synchronised and renamed."""

    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def atomic_file(path: Path, needed: int | None = None) -> Iterator[HashingFile]:
    """Write `path` so that a reader sees either the whole new file or none of it.

    The bytes go to a hidden temporary file beside it; leaving the block synchronises, renames, and
    synchronises the folder. What a killed process leaves goes with `remove_partials`. `needed` is the
    expected size in bytes, for the message only.

    Raises CorpusError where the disk (or the quota, or the file size limit) is full.
    """
    # A name of its own: a worker that outlives its killed parent never writes into a file of the next build.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    out: HashingFile | None = None
    try:
        with temporary.open("wb") as raw:
            out = HashingFile(raw)
            yield out
            raw.flush()
            os.fsync(raw.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _no_space(path, error, needed, out.bytes if out else 0) from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` (new, or an empty folder) when the block ends without
    error.

    Raises CorpusError where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _no_space(path, error, None, 0) from error
        raise


def _no_space(path: Path, error: OSError, needed: int | None, written: int) -> CorpusError:
    free = shutil.disk_usage(path.parent).free
    size = f"{needed:,} bytes" if needed else f"more than {written:,} bytes"
    return CorpusError(
        f"{path}: cannot write ({os.strerror(error.errno or 0)}): the file needs {size}, "
        f"{free:,} bytes are free now. "
        "Free space or raise the quota, then run the same command again: it goes on where it stopped"
    )


def remove_partials(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder` (if that exists)."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all. Raises CorpusError where the disk is full."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename alone may be lost when the machine goes down)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hexadecimal SHA-256 of a file; `progress` is called with the bytes read by each step."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            if progress:
                progress(n)
    return digest.hexdigest()


class _Mapping:
    """What a mapped buffer keeps alive; the memory is unmapped with it."""

    def __init__(self, descriptor: int, size: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self.address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {size:,} bytes: {os.strerror(ctypes.get_errno())}")
        weakref.finalize(self, libc.munmap, self.address, size).atexit = False


def map_file(descriptor: int, size: int) -> pa.Buffer:
    """The first `size` > 0 bytes of an open file, mapped for reading; the descriptor may then be closed.

    Python's own mmap keeps a descriptor open for each map (until `trackfd` of 3.13), and a corpus may have more shards
    than a process may have files. Raises OSError.
    """
    mapping = _Mapping(descriptor, size)
    return pa.foreign_buffer(mapping.address, size, base=mapping)
