"""Files that are complete or absent: atomic writes, fsync, SHA-256. Loads no torch."""

import hashlib
import os
from pathlib import Path

_CHUNK = 16 << 20


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Have a file, or a folder's list of names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_hashed(path: Path, content: memoryview | None = None) -> tuple[int, str]:
    """Write a file, or take it as it stands (None), and have it on disk; → bytes, SHA-256."""
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
