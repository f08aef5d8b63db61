"""Signals to a rank, in a separate process each."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from maskvr_ds.reliability.signals import DEBOUNCE_SECONDS, DEBOUNCE_SECONDS_OF_SIGINT, StopRequest


def in_a_fork(life: Callable[[StopRequest], None], wait: float = 10) -> int:
    """Exit status of a process that runs `life`: 7 if it was asked to stop and exited normally, 8 if not within `wait`
    seconds."""
    if (child := os.fork()) == 0:
        try:
            request = StopRequest()
            life(request)
            deadline = time.monotonic() + wait
            while not request.requested(None, "") and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            os._exit(7 if request.requested(None, "") else 8)
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
        ([signal.SIGINT], 7),
        ([signal.SIGTERM, signal.SIGHUP], 7),
        ([signal.SIGTERM, signal.SIGTERM], 7),
        # As a launcher that forwards Ctrl-C.
        ([signal.SIGINT, signal.SIGINT], 7),
        ([signal.SIGINT, signal.SIGTERM], 7),
        ([signal.SIGUSR1, signal.SIGTERM], 128 + signal.SIGTERM),
    ],
)
def test_signals(signals: list[signal.Signals], status: int) -> None:
    assert in_a_fork(lambda request: send(*signals)) == status


@pytest.mark.parametrize(
    ("number", "wait"),
    [(signal.SIGTERM, DEBOUNCE_SECONDS), (signal.SIGINT, DEBOUNCE_SECONDS_OF_SIGINT)],
)
def test_later_second_signal_terminates_immediately(number: signal.Signals, wait: float) -> None:
    def life(request: StopRequest) -> None:
        send(number)
        time.sleep(wait + 0.2)
        send(number)

    assert in_a_fork(life) == 128 + number


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell script starts jobs with & that way: Ctrl-C is meant for the script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        request_made = in_a_fork(lambda request: send(signal.SIGINT), wait=0.5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert request_made == 8
