"""A launcher whose ranks another job's run refuses: it neither stops that job nor takes its end for its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskvr_ds.run_folder import fence, launched, status
from maskvr_ds.run_folder.launched import Launched, launch_token, seconds_since
from maskvr_ds.run_folder.layout import COMPLETED, OWNER, STOP_REQUEST, STOPPED
from maskvr_ds.run_folder.status import EXIT_STOPPED

# Ranks that end with the given status after they were told to, in a file; rank 0 may take the run first.
RANK = """
import os, pathlib, sys, time
from maskvr_ds.run_folder import fence
run, token = pathlib.Path(sys.argv[1]), sys.argv[-1]
said = pathlib.Path(sys.argv[2])
(said / os.environ["RANK"]).touch()
while not (said / "take").exists() and not (said / "end").exists():
    time.sleep(0.02)
if (said / "take").exists() and os.environ["RANK"] == "0":
    fence.take(run, 2, token=token)
while not (said / "end").exists():
    time.sleep(0.02)
sys.exit(int((said / "end").read_text()))
"""
LAUNCHER = """
import pathlib, sys
from maskvr_ds.reliability import launch
sys.exit(launch.launch_here("a_rank", sys.argv[1:], 2, pathlib.Path(sys.argv[1]), 10))
"""


class Started:
    """A launcher of two ranks of RANK on RUN; `tell` makes the ranks act."""

    def __init__(self, folder: Path) -> None:
        self.run, self.said = folder / "run", folder / "said"
        words = [sys.executable, "-c", LAUNCHER, str(self.run), str(self.said)]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        while len(list(self.said.iterdir())) < 2:
            assert self.process.poll() is None
            time.sleep(0.02)

    def tell(self, name: str, text: str = "") -> None:
        path = self.said / f".{name}"
        path.write_text(text)
        path.rename(self.said / name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a run that this process owns, and modules for the launcher."""
    (tmp_path / "a_rank.py").write_text(RANK)
    for name in ("said", "run"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    return tmp_path


def content(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_refused_job_is_not_completed_by_the_other_one(folder: Path) -> None:
    run = folder / "run"
    owner = fence.take(run, 1)
    started = Started(folder)
    status.write(run, COMPLETED, 10, owner.token)
    before = content(run)
    started.tell("end", "1")
    assert started.process.wait(60) == 1
    assert content(run) == before


def test_a_refused_job_leaves_requests_alone_and_makes_none(folder: Path) -> None:
    """A request that somebody has made of the owner stays, and SIGTERM to the second launcher does not stop the first
    one's ranks."""
    run = folder / "run"
    owner = fence.take(run, 1)
    (run / STOP_REQUEST).touch()
    before = content(run)
    started = Started(folder)
    assert content(run) == before, "nothing is touched at the start"
    started.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert content(run) == before
    (run / STOP_REQUEST).unlink()
    time.sleep(0.3)
    assert not status.stop_requested(run, owner.token)
    status.write(run, STOPPED, 5, owner.token)
    started.tell("end", "1")
    assert started.process.wait(60) == 1, "not 75: that is the other job's checkpoint"
    assert sorted(content(run)) == [OWNER, STOPPED]


def test_a_request_reaches_ranks_once_they_own_the_run(folder: Path) -> None:
    run = folder / "run"
    started = Started(folder)
    started.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert content(run) == {}, "nobody to ask yet"
    started.tell("take")
    deadline = time.monotonic() + 30
    while not (run / STOP_REQUEST).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    owner = fence.read(run)
    assert owner is not None
    assert status.stop_requested(run, owner.token)
    assert not status.stop_requested(run, "another job's")
    status.write(run, STOPPED, 5, owner.token)
    started.tell("end", str(EXIT_STOPPED))
    assert started.process.wait(60) == EXIT_STOPPED
    assert sorted(content(run)) == [OWNER, STOPPED]


def test_tokens_of_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Launched(tmp_path), Launched(tmp_path)
    assert one.token != two.token
    assert launch_token(one.token) == one.token
    assert 0 <= (seconds_since(one.token) or 0.0) < 60
    now = time.time()
    monkeypatch.setattr(launched.time, "time", lambda: now + 90)
    assert 90 <= (seconds_since(one.token) or 0.0) < 150
    assert seconds_since("0123456789abcdef") is None, "chosen by the rank itself"
    for text in ("", "a/b", "12", "12.", "12.a b", "../12.a", "12.a/../b"):
        with pytest.raises(ValueError, match="is not SECONDS"):
            launch_token(text)
