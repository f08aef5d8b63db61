"""Atomic and memory-mapped file I/O, and the pipeline's error type."""

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

# EFBIG: file size limit of the process (ulimit -f) or the file system; for the user it amounts to a full disk.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = ".partial"


class CorpusError(ValueError):
    """Invalid input or arguments, a damaged corpus, or a full disk. The message states the remedy."""


class HashingFile:
    """Write-only binary file that tracks the SHA-256 and the number of bytes written."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        if view.nbytes == 0:  # an empty view cannot be cast
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
        """Do nothing: pyarrow closes its sink, but the file must stay open until it is fsynced and renamed."""

    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def atomic_file(path: Path, needed: int | None = None) -> Iterator[HashingFile]:
    """Write `path` atomically: readers see the complete new file or nothing.

    Data goes to a hidden temporary file in the same folder; on exit the file is fsynced and renamed, and the folder
    fsynced. `remove_partials` cleans up after a killed process. needed: expected size in bytes, for the error
    message only.

    Raises CorpusError if the disk, the quota or the file size limit is exhausted.
    """
    # Unique name: a worker that outlives its killed parent never writes into a file of the next build.
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
    """Yield a temporary folder that is renamed to `path` (new or an empty folder) if the block succeeds.

    Raises CorpusError if the disk is full.
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
        "Free space or raise the quota, then rerun the same command: it resumes where it stopped"
    )


def remove_partials(folder: Path) -> None:
    """Remove temporary files and folders of killed processes from `folder`, if it exists."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically. Raises CorpusError if the disk is full."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Fsync a folder: without it, a rename may be lost in a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hexadecimal SHA-256 of a file; `progress` is called with the number of bytes of each read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            if progress:
                progress(n)
    return digest.hexdigest()


class _Mapping:
    """Owner of a memory map; unmaps it when garbage-collected."""

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
    """Map the first `size` > 0 bytes of an open file read-only; the descriptor may be closed afterwards.

    Python's mmap keeps one descriptor open per map (`trackfd` arrives in 3.13), and a corpus may have more shards than
    a process may have open files. Raises OSError.
    """
    mapping = _Mapping(descriptor, size)
    return pa.foreign_buffer(mapping.address, size, base=mapping)
