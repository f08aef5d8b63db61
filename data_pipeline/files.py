"""Atomic file writes, fsync and SHA-256, for the whole project; the pipeline's error type.

Imports only the standard library, so that login nodes and command-line help stay fast.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pyarrow as pa

# EFBIG is the limit of the process (ulimit -f) or of the file system: to the user, one more full disk.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# File systems without fsync of directories (CIFS, some FUSE) and directories that may not be opened for reading.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}
# Some network file systems have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
# Of a rename onto a folder with files, or onto a file.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_PARTIAL = ".partial"
# In a folder about whose owner a command is deciding, see `locked_folder`.
LOCK = ".lock"
_LOCK_SECONDS = 10.0


class CorpusError(ValueError):
    """Invalid user input: arguments, text files, corpus, or a full disk. The message names the remedy."""


class DiskFullError(CorpusError, OSError):
    """The disk, the quota or the file size limit is full. `errno` says which."""


class HashingFile:
    """Write-only binary file that keeps the SHA-256 and the length in bytes of what is written."""

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
        """No-op: pyarrow closes its sink, but the file must stay open until fsync and rename."""

    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def atomic_file(path: Path, needed: int | None = None, *, fsync_folder: bool = True) -> Iterator[HashingFile]:
    """Open `path` for an atomic, durable write: readers see the old file or the complete new one.

    Bytes go to a hidden temporary file in the same folder. When the block ends, the file is fsynced and renamed,
    and its folder fsynced; if the block raises, `path` is untouched and the temporary file removed. A killed process
    leaves its temporary file behind: see `remove_partials`.

    needed: expected size in bytes, for the error message only. fsync_folder: False if the caller writes several files
    and calls `fsync_path` on their folder once, or can do without the file after a power failure.
    Raises DiskFullError if the disk, the quota or the file size limit is full, and OSError.
    """
    # Random name: a worker that outlives its killed parent must not write into a file of the next build.
    temporary = _temporary(path)
    out: HashingFile | None = None
    try:
        with temporary.open("wb") as raw:
            out = HashingFile(raw)
            yield out
            raw.flush()
            os.fsync(raw.fileno())
        temporary.rename(path)
        if fsync_folder:
            fsync_path(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _disk_full(path, error, needed, out.bytes if out else 0) from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder (files only, no subfolders) that becomes `path` when the block ends without error.

    `path` must be absent or an empty folder. All files are fsynced before the rename.
    Raises DiskFullError if the disk, the quota or the file size limit is full, CorpusError if another command has
    written `path` meanwhile, and OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            fsync_path(file)
        fsync_path(temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise CorpusError(
                f"{path}: another command has written it meanwhile. Use what is there, or choose another folder"
            ) from error
        fsync_path(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _disk_full(path, error, None, 0) from error
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")


def _disk_full(path: Path, error: OSError, needed: int | None, written: int) -> DiskFullError:
    free = shutil.disk_usage(path.parent).free
    size = f"{needed:,} bytes" if needed else f"more than {written:,} bytes"
    full = DiskFullError(
        f"{path}: cannot write ({os.strerror(error.errno or 0)}): the file needs {size}, "
        f"{free:,} bytes are free now. "
        "Free space or raise the quota, then rerun the same command: it resumes where it stopped"
    )
    full.errno = error.errno
    return full


def lock_file(path: Path) -> BinaryIO:
    """Create the file `path` if it is absent and lock it, until the returned file is closed or the process ends.

    Raises BlockingIOError if another process, or another open file of this one, holds the lock. On a file system
    without locks nothing is locked.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file
            file.close()
            raise
        # The former holder may have deleted the file between the opening and the locking: that lock excludes nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Create `folder` if it is absent and lock it while the block decides whose it is and marks it: every command that
    claims an output folder does so, so that of two which start together one sees the other's mark.

    Yields whether the folder was created here. The block should take milliseconds. Raises CorpusError if the lock is
    not free within 10 s, and OSError.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    new = not folder.exists()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = lock_file(folder / LOCK)
            break
        except FileNotFoundError:  # another command has removed the folder that it had created
            continue
        except FileExistsError:  # the same, while mkdir looked whether what exists is a folder
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CorpusError(f"{folder}: another command is starting there. Wait for it or stop it") from None
        time.sleep(0.01)
    with file:
        try:
            yield new
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes left in `folder` (which may be absent)."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, fsync_folder: bool = True) -> None:
    """Write `value` as JSON (indent 1, final newline), atomically and durably. Raises like `atomic_file`."""
    with atomic_file(path, fsync_folder=fsync_folder) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def fsync_path(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to disk.

    A rename survives a power failure only if the folder is flushed too. Folders are best effort: a file system that
    does not support it, or forbids it, is ignored. Raises OSError for files, and for I/O errors of folders.
    """
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDER_FSYNC:
            raise


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `progress` is called with the number of bytes of each read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            if progress:
                progress(n)
    return digest.hexdigest()


class _Mapping:
    """Owner of a memory map; the memory is unmapped when this object is collected."""

    def __init__(self, descriptor: int, size: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self.address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {size:,} bytes: {os.strerror(ctypes.get_errno())}")
        weakref.finalize(self, libc.munmap, self.address, size).atexit = False


@contextmanager
def reading_input(path: str | Path) -> Iterator[None]:
    """Raise an OSError of the block, which reads the input file `path`, as CorpusError that names it: the error of a
    failed read names no file."""
    try:
        yield
    except CorpusError:  # a full disk is both
        raise
    except OSError as error:
        raise CorpusError(
            f"{path}: cannot be read ({error.strerror or error}). Correct its permissions, restore it from a copy, or "
            "remove it"
        ) from error


def map_file(descriptor: int, size: int) -> pa.Buffer:
    """Map the first `size` > 0 bytes of an open file for reading; the descriptor may be closed afterwards.

    Python's mmap keeps one descriptor open per map (before `trackfd` in 3.13), and a corpus may have more shards than
    a process may open files. Raises OSError.
    """
    import pyarrow as pa

    mapping = _Mapping(descriptor, size)
    return pa.foreign_buffer(mapping.address, size, base=mapping)
