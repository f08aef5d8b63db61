"""Stopping on SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP: at a step boundary, with a checkpoint and exit status 75.

A scheduler may signal one rank or all of them. Requests are summed in the all-reduce of every step (training/step.py)
and read one step later, so that nothing waits for the device and all ranks decide the same. A second signal terminates
the process immediately; Slurm sends SIGTERM twice within milliseconds, which counts as one (`SignalDebouncer`).

`maskvr train` forwards the signals it receives by a file in the run's folder, which rank 0 checks: that reaches ranks
on any node without looking for processes.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from maskvr_ds.run_folder.status import EXIT_STOPPED, stop_requested
from maskvr_ds.runtime import terminal

if TYPE_CHECKING:
    from maskvr_ds.runtime.deferred import DeferredTensor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Stay ignored if the process was started with them ignored.
MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)


class StoppedError(Exception):
    """The run was asked to stop and has saved a checkpoint. Raised on all ranks."""


class StopRequest:
    """Stop requests by signal or file, and the common decision of all ranks. Create it in the main thread.

    A thread counts signals, woken by the interpreter through a pipe: Python runs handlers only in the main thread,
    which may be stuck in a collective.
    """

    def __init__(self) -> None:
        self._requested = False
        self._flag: DeferredTensor | None = None
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # Ranks started by launch.py ignore SIGUSR1 until here; under nohup SIGHUP stays ignored, and SIGINT in a
            # job that a shell script starts with &.
            if number not in MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        debouncer = SignalDebouncer()
        while received := os.read(self._read, 1):
            if received[0] not in SIGNALS:
                continue
            if debouncer.is_duplicate(received[0]):
                continue
            name = signal.Signals(received[0]).name
            if self._requested:
                terminal.alert(f"{name}: second signal; terminating immediately")
                os._exit(128 + received[0])
            self._requested = True
            terminal.alert(f"{name}: saving a checkpoint at the next step boundary, then exit status {EXIT_STOPPED}")

    def requested(self, run: Path | None, owner: str) -> bool:
        """Whether this process was asked to stop: by a signal or, if `run` is given, by a file in the run's folder.

        owner: the token of this job, see `status.stop_requested`.
        """
        return self._requested or (run is not None and stop_requested(run, owner))

    def requested_on_any_rank(self, flag: "DeferredTensor") -> bool:
        """Whether any rank was asked to stop as of the previous step; the same on all ranks. Call once per step.

        flag: int64 [1], number of ranks asked to stop as of this step, all-reduced.
        """
        before, self._flag = self._flag, flag
        return before is not None and before.values()[0] > 0


DEBOUNCE_SECONDS = 1.0
# For a repeated Ctrl-C, which a person may mean. Programs that forward it do so within milliseconds.
DEBOUNCE_SECONDS_OF_SIGINT = 0.5


class SignalDebouncer:
    """Ignore a repeated signal within one second, SIGINT within half a second: Slurm sends SIGTERM twice.

    SIGHUP, SIGINT and SIGTERM count as the same signal: a closing session sends SIGHUP and SIGTERM; on Ctrl-C a
    terminal sends SIGINT to launcher and ranks, and launchers (DeepSpeed's, torchrun) then SIGTERM or SIGINT to ranks.
    """

    def __init__(self) -> None:
        self._last = 0
        self._since = 0.0

    def is_duplicate(self, number: int) -> bool:
        """Whether a signal received now repeats the previous one."""
        before, self._last = self._last, number
        since, self._since = self._since, time.monotonic()
        window = DEBOUNCE_SECONDS_OF_SIGINT if number == before == signal.SIGINT else DEBOUNCE_SECONDS
        return _kind(number) == _kind(before) and self._since - since < window


def _kind(number: int) -> int:
    return signal.SIGTERM if number in (signal.SIGHUP, signal.SIGINT) else number
