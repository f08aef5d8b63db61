"""Signals to `launch`, and terminals that hang up: the ranks save a checkpoint before they end."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.hosts import launch, remote, supervisor
from maskvr_ds.reliability.signals import DEBOUNCE_SECONDS
from maskvr_ds.run_folder.launched import Launched
from maskvr_ds.run_folder.layout import CONFIG, STOP_REQUEST, STOPPED
from maskvr_ds.run_folder.status import EXIT_STOPPED
from tests.unit.cluster.test_launch import make_plan

ROOT = Path(__file__).parents[3]
# Replaces DeepSpeed's runner and its only rank: prints continuously; stops 3 s after a stop request.
RANK = """
import json, sys, time
from pathlib import Path
from maskvr_ds.run_folder import fence, layout, status
run, asked, beat = Path(sys.argv[1]), 0, 0
fence.take(run, 1, token=sys.argv[2])
while asked < 30:
    with (run / "rank-00000.log").open("a") as log:
        log.write(f"step {beat}\\n")
    beat += 1
    (run / "rank-00000.json").write_text(json.dumps({"beat": beat, "state": "R"}))
    time.sleep(0.1)
    asked += (run / layout.STOP_REQUEST).exists()
status.write(run, layout.STOPPED, 5, sys.argv[2])
(run / "rank-00000.json").write_text(json.dumps({"beat": beat + 1, "state": "R", "status": 75}))
"""


def drive(run: Path) -> int:
    """Run `launch` from the point where it has a plan."""
    (run / CONFIG).write_text("schema: 1\n")  # a run's folder
    ranks = Launched(run)
    supervisor.runner_command = lambda plan: [sys.executable, "-c", RANK, str(run), ranks.token]
    remote.ask = lambda *arguments, **more: {}
    plan = make_plan(run, {"h1": 1}, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    return launch.watch(plan, ranks, steps=10)


@contextmanager
def launched(run: Path, stdin: int, out: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `drive` in a new session, with `stdin` as its terminal if it is one; yields once the rank is running."""

    def take_terminal() -> None:
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    code = f"import sys; from {__name__} import *; sys.exit(drive(Path({str(run)!r})))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=stdin,
        stdout=out,
        stderr=out,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "rank-00000.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2 * supervisor.POLL)
        yield process
    finally:
        process.kill()
        process.wait()
        (run / STOP_REQUEST).touch()  # ends a rank that is still running


def test_terminal_that_hangs_up(tmp_path: Path) -> None:
    """Neither the signal handler nor the output of rank 0 can be printed then."""
    ours, theirs = pty.openpty()
    with launched(tmp_path, theirs, theirs) as process:
        os.close(theirs)
        assert b"step 0" in os.read(ours, 1000)
        os.close(ours)
        assert process.wait(60) == EXIT_STOPPED
    assert (tmp_path / STOPPED).exists()


def test_broken_pipe(tmp_path: Path) -> None:
    """As in `launch … | head`."""
    ours, theirs = os.pipe()
    with launched(tmp_path, subprocess.DEVNULL, theirs) as process:
        os.close(theirs)
        os.close(ours)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_STOPPED


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGHUP), (signal.SIGINT, signal.SIGINT)],
)
def test_repeated_signal_is_ignored(tmp_path: Path, first: signal.Signals, second: signal.Signals) -> None:
    with launched(tmp_path, subprocess.DEVNULL, subprocess.DEVNULL) as process:
        process.send_signal(first)
        time.sleep(0.2)
        process.send_signal(second)
        assert process.wait(60) == EXIT_STOPPED
    assert (tmp_path / STOPPED).exists()


@pytest.mark.parametrize(
    ("number", "wait"),
    [(signal.SIGTERM, DEBOUNCE_SECONDS + 0.2), (signal.SIGUSR1, 0.2), (signal.SIGINT, DEBOUNCE_SECONDS + 0.2)],
)
def test_second_signal_kills_the_ranks(tmp_path: Path, number: signal.Signals, wait: float) -> None:
    with launched(tmp_path, subprocess.DEVNULL, subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(wait)
        assert (tmp_path / STOP_REQUEST).exists()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert not (tmp_path / STOPPED).exists()
