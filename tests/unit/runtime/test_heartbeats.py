"""Heartbeat files: written in place, torn reads, failing disks."""

import json
import os
from pathlib import Path

import pytest

from maskvr_ds.runtime import heartbeats
from maskvr_ds.runtime.heartbeats import RANK_FILES, RECORD_BYTES, HeartbeatWriter, rank_of, rank_path, read_record


@pytest.mark.parametrize("fsync", [False, True])
def test_records_replace_each_other_in_place(tmp_path: Path, fsync: bool) -> None:
    path = rank_path(tmp_path, 7)
    writer = HeartbeatWriter(path, fsync)
    assert read_record(path) is None, "nothing written yet"
    inode = path.stat().st_ino
    for record in ({"beat": 1, "host": "x" * 200}, {"beat": 2}):
        writer.write(record)
        assert read_record(path) == record
        assert (path.stat().st_size, path.stat().st_ino) == (RECORD_BYTES, inode)
    writer.close()
    assert list(tmp_path.glob(RANK_FILES)) == [path]
    assert rank_of(path) == 7


def test_file_format(tmp_path: Path) -> None:
    path = rank_path(tmp_path, 0)
    writer = HeartbeatWriter(path)
    writer.write({"beat": 1, "host": "ä"})
    writer.close()
    assert path.name == "rank-00000"
    assert path.read_bytes() == json.dumps({"beat": 1, "host": "ä"}).encode().ljust(256)


def test_torn_and_missing_records_read_as_none(tmp_path: Path) -> None:
    path = rank_path(tmp_path, 0)
    assert read_record(path) is None
    assert read_record(tmp_path) is None
    for torn in (b"", b'{"beat": 1, "st', b'{"beat": 12, "ste {"beat": 1}', b"\xff\xfe"):
        path.write_bytes(torn)
        assert read_record(path) is None


def test_a_failing_disk_does_not_stop_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, os.strerror(28))

    writer = HeartbeatWriter(rank_path(tmp_path, 0))
    writer.write({"beat": 1})
    monkeypatch.setattr(heartbeats.os, "pwrite", full)
    writer.write({"beat": 2})
    assert read_record(rank_path(tmp_path, 0)) == {"beat": 1}
    writer.close()


def test_a_record_over_the_limit_is_a_programming_error(tmp_path: Path) -> None:
    writer = HeartbeatWriter(rank_path(tmp_path, 0))
    with pytest.raises(AssertionError):
        writer.write({"host": "x" * RECORD_BYTES})
    writer.close()
