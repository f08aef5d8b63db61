"""Temporary folders of outputs: unique, and removed once the process that made them is dead."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from maskvr_ds.runtime import files
from maskvr_ds.runtime.files import folder_in_progress

HOLDER = """
import sys
from pathlib import Path
from maskvr_ds.runtime.files import folder_in_progress
with folder_in_progress(Path(sys.argv[1])) as folder:
    (folder / "data").write_text("half")
    print(folder.name, flush=True)
    input()
"""


def hold(target: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A process that is writing the target, and its temporary folder."""
    words = [sys.executable, "-c", HOLDER, str(target)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, target.with_name(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "a[1]*"
    killed, left = hold(target)
    working, used = hold(target)
    of_another, its = hold(tmp_path / "a1")
    for process in (killed, of_another):
        process.kill()
        process.wait()
    assert left.is_dir()
    with caplog.at_level(logging.INFO), folder_in_progress(target) as folder:
        assert folder not in (left, used)
        assert not left.exists()
        assert (used / "data").read_text() == "half", "in use"
        assert its.is_dir(), "of another target"
    assert [record.getMessage() for record in caplog.records] == [
        f"deleted {left}, which a process that was killed has left"
    ]
    assert not folder.exists()
    working.communicate("\n")
    assert sorted(tmp_path.iterdir()) == [its]


def test_what_cannot_be_judged_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (".model.other-01234567.partial", ".model.01234567.partial")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".model.json.partial").touch()
    with folder_in_progress(tmp_path / "model") as folder:
        folder.rename(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, ".model.json.partial", "model"])
    assert all(any(f"{tmp_path / name}: in use" in record.message for record in caplog.records) for name in names)
    caplog.clear()

    def fail(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    killed, left = hold(tmp_path / "mine")
    killed.kill()
    killed.wait()
    monkeypatch.setattr(files.fcntl, "flock", fail)
    with folder_in_progress(tmp_path / "mine"):
        assert left.is_dir()
    assert f"{left}: in use, or left by a process that was killed" in caplog.text


def test_a_folder_that_was_taken_for_a_killed_process_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its creation and its lock."""
    flock, taken = files.fcntl.flock, []

    def lock(handle: int, how: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir()
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", lock)
    with folder_in_progress(tmp_path / "model") as folder:
        assert folder.is_dir()
        assert folder != taken[0]
