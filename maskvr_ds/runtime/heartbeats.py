"""Heartbeat files: one JSON record of fixed size per rank, rewritten in place. Loads no torch.

Files are seen even if the network hangs. A record rewritten in place needs no free space, so a full disk does not look
like a dead rank. Readers compare successive records and measure ages by their own clock: clocks of nodes may differ.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskvr_ds.runtime.files import read_json

RECORD_BYTES = 256
# Heartbeats written within a timeout for silent ranks; a slow file system may delay some.
BEATS_PER_TIMEOUT = 8
# Pattern of the files in a folder, see `rank_path`.
RANK_FILES = "rank-*"


def rank_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"


def rank_of(path: Path) -> int:
    """Inverse of `rank_path`. Raises ValueError if the name is not one of its."""
    return int(path.name.removeprefix("rank-"))


class HeartbeatWriter:
    """Writes the record of one rank.

    fsync: flush every record to disk; NFS clients may otherwise hold it back for half a minute.
    """

    def __init__(self, path: Path, fsync: bool = False) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._fsync = fsync

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record. Failed writes are ignored: readers notice the missing heartbeat."""
        data = json.dumps(record).encode()
        assert len(data) <= RECORD_BYTES
        with contextlib.suppress(OSError):
            os.pwrite(self._file, data.ljust(RECORD_BYTES), 0)
            if self._fsync:
                os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_record(path: Path) -> dict[str, Any] | None:
    """The latest record; None if the file is missing or damaged, or was read while it was being rewritten."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
