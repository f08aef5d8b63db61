"""Atomic writes: complete or absent, durable, and one error type for a full disk."""

import errno
import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.files import (
    CorpusError,
    DiskFullError,
    atomic_file,
    atomic_folder,
    fsync_path,
    remove_partials,
    sha256_file,
    write_json,
)


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


@pytest.fixture
def fsyncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "file" or "folder" for each fsync, and "rename", in order."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def record_rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", record_rename)
    return calls


def test_file_is_durable_before_its_name_and_name_before_return(tmp_path: Path, fsyncs: list[str]) -> None:
    with atomic_file(tmp_path / "file") as file:
        file.write(b"abc")
    assert fsyncs == ["file", "rename", "folder"]
    assert (file.bytes, file.sha256()) == (3, hashlib.sha256(b"abc").hexdigest())
    assert sha256_file(tmp_path / "file") == file.sha256()


def test_folder_fsync_left_to_the_caller(tmp_path: Path, fsyncs: list[str]) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name, {}, fsync_folder=False)
    fsync_path(tmp_path)
    assert fsyncs == ["file", "rename", "file", "rename", "folder"]


def test_folder_is_durable_before_its_name(tmp_path: Path, fsyncs: list[str]) -> None:
    with atomic_folder(tmp_path / "new" / "folder") as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    assert fsyncs == ["file", "file", "folder", "rename", "folder"]
    assert sorted(p.name for p in (tmp_path / "new").rglob("*")) == ["a", "b", "folder"]


@pytest.mark.parametrize("other", ["folder", "file"])
def test_a_folder_that_another_command_writes_meanwhile_is_kept(tmp_path: Path, other: str) -> None:
    path = tmp_path / "folder"
    theirs = path if other == "file" else path / "a"

    def write() -> None:
        with atomic_folder(path) as folder:
            (folder / "a").write_text("mine")
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("theirs")

    with pytest.raises(CorpusError, match="folder: another command has written it meanwhile"):
        write()
    assert theirs.read_text() == "theirs"
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "json", {"a": [1, 0.5]})
    text = (tmp_path / "json").read_text()
    assert json.loads(text) == {"a": [1, 0.5]}
    assert text.endswith("}\n")


def test_sha256_reports_progress(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "file").write_bytes(data)
    read: list[int] = []
    assert sha256_file(tmp_path / "file", read.append) == hashlib.sha256(data).hexdigest()
    assert sum(read) == len(data)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_without_folder_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_file(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_other_errors_of_fsync_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_path(tmp_path)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    write_file(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DiskFullError, match=r"file: cannot write .*needs more than 3 bytes, [\d,]+ bytes are free"
    ) as info:
        write_file(tmp_path / "file", "new")
    error = pickle.loads(pickle.dumps(info.value))  # as a worker sends it
    assert isinstance(error, CorpusError)
    assert isinstance(error, OSError)
    assert str(error) == str(info.value)
    assert info.value.errno == code
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


def test_partials_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.0123.partial").write_text("")
    (tmp_path / ".b.0123.partial").mkdir()
    (tmp_path / ".b.0123.partial" / "file").write_text("")
    (tmp_path / "kept").write_text("")
    remove_partials(tmp_path)
    remove_partials(tmp_path / "absent")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_module_loads_without_arrow() -> None:
    script = "import sys, data_pipeline.files; print('pyarrow' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )
