"""Signals to a rank, in a separate process each."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from maskvr_ds.reliability.signals import StopRequest


def in_a_fork(life: Callable[[StopRequest], None]) -> int:
    """Exit status of a process that runs `life`: 7 if it was asked to stop and exited normally."""
    if (child := os.fork()) == 0:
        try:
            request = StopRequest()
            life(request)
            deadline = time.monotonic() + 10
            while not request.requested(None) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            os._exit(7 if request.requested(None) else 8)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send(*signals: signal.Signals) -> None:
    for number in signals:
        os.kill(os.getpid(), number)
        # So that it is not merged with the previous one.
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGTERM], 7),
        ([signal.SIGUSR1], 7),
        ([signal.SIGHUP], 7),
        ([signal.SIGTERM, signal.SIGHUP], 7),
        ([signal.SIGTERM, signal.SIGTERM], 7),
        ([signal.SIGUSR1, signal.SIGTERM], 128 + signal.SIGTERM),
    ],
)
def test_signals(signals: list[signal.Signals], status: int) -> None:
    assert in_a_fork(lambda request: send(*signals)) == status


def test_later_second_signal_terminates_immediately() -> None:
    def life(request: StopRequest) -> None:
        send(signal.SIGTERM)
        time.sleep(1.2)
        send(signal.SIGTERM)

    assert in_a_fork(life) == 128 + signal.SIGTERM
