"""Ranks that watch each other by heartbeat files, in forks with patched rank numbers."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maskvr_ds.reliability import watchdog
from maskvr_ds.reliability.watchdog import Watchdog
from maskvr_ds.run_folder import fence
from maskvr_ds.run_folder.layout import HEARTBEATS
from maskvr_ds.runtime import distributed

# Far longer than any test takes.
TIMEOUT = 120.0
Life = Callable[[Watchdog], object]


class OrderlyError(Exception):
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_GRACE", 0.5)
    monkeypatch.setattr(watchdog, "LONGEST_BEAT", 0.1)


def start(run: Path, number: int, ranks: int, life: Life) -> int:
    """Fork a rank that runs `life`; its exit status is 0, 7 after an exception, 1 if another rank ended it."""
    if child := os.fork():
        return child
    try:
        distributed.rank, distributed.world_size = lambda: number, lambda: ranks
        distributed.broadcast_object = lambda value, source=0: "job"

        def on_rank0(action: Callable[[], object]) -> None:
            while number != 0 and not (run / HEARTBEATS / "job").exists():
                time.sleep(0.01)
            if number == 0:
                action()

        distributed.run_on_rank0 = on_rank0  # type: ignore[assignment]
        try:
            with Watchdog(run, TIMEOUT, orderly=(OrderlyError,)) as dog:
                life(dog)
        except (RuntimeError, OrderlyError):
            os._exit(7)
        os._exit(0)
    finally:
        os._exit(9)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def waits(dog: Watchdog) -> None:
    dog.mark(12, "step")
    time.sleep(30)


def fails(dog: Watchdog) -> None:
    dog.mark(12, "step")
    time.sleep(0.5)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("failing", [0, 2])
def test_one_failing_rank_ends_the_others(failing: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    children = [start(tmp_path, number, 3, fails if number == failing else waits) for number in range(3)]
    assert [status(child) for child in children] == [7 if number == failing else 1 for number in range(3)]
    assert time.monotonic() - started < 15
    output = capfd.readouterr().err
    assert output.count("error: ") == 1
    assert f"error: rank {failing} on " in output
    assert "(last step 12, failed) has failed while the others wait" in output
    assert fence.heartbeat_ages(tmp_path).keys() == {0, 1, 2} - {failing}


def test_error_on_all_ranks_is_reported_by_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    children = [start(tmp_path, number, 2, fails) for number in range(2)]
    assert [status(child) for child in children] == [7, 7]
    assert capfd.readouterr().err == ""


def test_orderly_exit_does_not_end_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def leaves(dog: Watchdog) -> None:
        raise OrderlyError

    children = [start(tmp_path, 0, 2, lambda dog: time.sleep(2)), start(tmp_path, 1, 2, leaves)]
    assert [status(child) for child in children] == [0, 7]
    assert capfd.readouterr().err == ""
    assert fence.heartbeat_ages(tmp_path) == {}


def test_single_rank_writes_heartbeats(tmp_path: Path) -> None:
    """A second job on another host detects the run by them."""

    def looks(dog: Watchdog) -> None:
        deadline = time.monotonic() + 10
        while list(fence.heartbeat_ages(tmp_path)) != [0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    assert status(start(tmp_path, 0, 1, looks)) == 0
