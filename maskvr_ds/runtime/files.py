"""Files that are complete or absent: atomic writes, fsync, SHA-256. Loads no torch.

`data_pipeline.files` has an atomic write of its own: it hashes what it writes, and the pipeline runs without this
package.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
_CHUNK = 16 << 20


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


def atomic_write(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def write_hashed(path: Path, content: memoryview | None = None) -> tuple[int, str]:
    """Write `content`, or take the existing file if None, and fsync it; returns size in bytes and SHA-256."""
    if content is None:
        fsync_path(path)
        return path.stat().st_size, sha256(path)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, len(content), _CHUNK):
            piece = content[start : start + _CHUNK]
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return len(content), digest.hexdigest()
