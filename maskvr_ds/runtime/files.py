"""Files that are complete or absent: atomic writes, fsync, SHA-256. Loads no torch.

`data_pipeline.files` has an atomic write of its own: it hashes what it writes, and the pipeline runs without this
package.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
_CHUNK = 16 << 20
# Paths that could not be deleted: each is reported once per process.
_kept: set[Path] = set()


def check_output_file(path: str | Path, option: str) -> None:
    """Raise ValueError if no file can be written at `path`, given as `option`: before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder, a file expected; choose another")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: {path.parent} is no folder; create it, or choose another")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on leaving the block it is fsynced and renamed to `path`.

    A reader sees the previous file or the complete new one, also after a crash of the machine. If the block raises,
    the temporary file is removed and `path` is unchanged.
    """
    # Unique: two processes that write the same file must not share a temporary one.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def folder_in_progress(target: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `target`, to be renamed to it; on leaving the block it is gone.

    No other process has the same one. What processes of this host that were killed have left there for the same
    target is deleted, and reported; of what others have left, only the path is reported.
    """
    _remove_killed(target)
    partial, handle = _locked_partial(target)
    try:
        yield partial
    finally:
        # Renamed, or of no use.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def _partial_name(target: Path, unique: str) -> str:
    # Locks of folders are those of one host, also on a file system that several share.
    return f".{target.name}.{socket.gethostname()}-{unique}{PARTIAL}"


def _locked_partial(target: Path) -> tuple[Path, int]:
    """A new folder and a descriptor that holds its lock for as long as the process lives."""
    while True:
        partial = target.with_name(_partial_name(target, secrets.token_hex(4)))
        partial.mkdir(parents=True)
        handle = os.open(partial, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        if partial.exists():
            return partial, handle
        # Another process took it, unlocked, for what a killed one has left.
        os.close(handle)


def _remove_killed(target: Path) -> None:
    here = _partial_name(target, "").removesuffix(PARTIAL)
    for path in target.parent.glob(f"{glob.escape(f'.{target.name}.')}*{PARTIAL}"):
        if not path.is_dir() or path.is_symlink():
            continue
        if not path.name.startswith(here):
            logger.warning("%s: in use on another host, or left by a process killed there; then delete it", path)
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            discard(path)
            logger.info("deleted %s, which a process that was killed has left", path)
        except BlockingIOError:
            pass  # in use
        except OSError as error:
            logger.warning("%s: in use, or left by a process that was killed (%s); then delete it", path, error)
        finally:
            os.close(handle)


def atomic_write(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, which is made if it is missing, and fsync it. What a kill or a full disk has left
    of a line before it stays a line of its own."""
    with path.open("a+b") as file:
        file.seek(-1 if file.seek(0, os.SEEK_END) else 0, os.SEEK_END)
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, or ValueError if it is not JSON or nested too deeply."""
    return parse_json(path.read_bytes())


def parse_json(text: bytes) -> Any:
    """Raises ValueError if `text` is not JSON or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def discard(path: Path) -> None:
    """Delete a file, a folder, or a link (never what it leads to), if it exists.

    For housekeeping: a deletion that fails is reported as a warning with the path, once, and raises nothing.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        # First whatever can be deleted, to free its space; what remains raises.
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        warn_of(path, error)


def warn_of(path: Path, error: OSError) -> None:
    """Report once per process that `path` could not be deleted."""
    if path not in _kept:
        _kept.add(path)
        logger.warning("%s could not be deleted (%s): delete it yourself; nothing else depends on it", path, error)


def keep_copy(path: Path) -> Path:
    """Copy a damaged file, before it is replaced, to a free name next to it; returns the copy's path."""
    copy = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    shutil.copyfile(path, copy)
    return copy


def set_aside(path: Path, prefix: str) -> Path:
    """Rename a file, folder or link within its folder to a free name that starts with `prefix`; returns it."""
    target = path.with_name(f"{prefix}{path.name}.{secrets.token_hex(4)}")
    return path.rename(target)


def remove_partials(folder: Path, now: float, seconds: float) -> None:
    """Delete temporary files that killed processes left in `folder`: those older than `seconds` at time `now`."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{PARTIAL}"):
            with contextlib.suppress(OSError):
                if now - path.lstat().st_mtime > seconds:
                    discard(path)


def _read_back(path: Path) -> str:
    """SHA-256 of a file that was fsynced: from the disk, not from the kernel's cache, where the system permits it."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashed(path: Path, content: memoryview | None = None) -> tuple[int, str]:
    """Write `content`, or take the existing file if None, fsync it and read it back; returns size and SHA-256.

    Raises OSError if writing fails or another content than `content` is read back.
    """
    if content is None:
        fsync_path(path)
        return path.stat().st_size, _read_back(path)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, len(content), _CHUNK):
            piece = content[start : start + _CHUNK]
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    if _read_back(path) != (written := digest.hexdigest()):
        raise OSError(errno.EIO, "other bytes are read back than were written", str(path))
    return len(content), written
