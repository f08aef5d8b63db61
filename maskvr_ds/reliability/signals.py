"""SIGTERM, SIGUSR1 and SIGHUP end a run at a step boundary, with a checkpoint and an exit status of its own.

A scheduler may tell one rank or all of them. What a rank has heard travels in the all-reduce that every step makes
anyway (step.py) and is read one step later, so that nothing waits for the device and all ranks decide alike. A second
signal ends the process at once, wherever it is; Slurm sends SIGTERM twice within milliseconds, which counts as one.

`maskvr train` passes on what itself hears by a file in the run's folder, which rank 0 looks for: that reaches ranks on
any node, and needs no process to be found.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from maskvr_ds.run_folder.layout import STOP_REQUEST
from maskvr_ds.run_folder.status import EXIT_STOPPED
from maskvr_ds.runtime import terminal

if TYPE_CHECKING:
    from maskvr_ds.runtime.deferred import DeferredTensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StoppedError(Exception):
    """The run was asked to stop, has saved a checkpoint, and stops. Raised on every rank alike."""


class StopRequest:
    """Whether a signal has come, and whether the ranks have agreed to stop. Make one in the main thread.

    Signals are counted by a thread that the interpreter's handler wakes through a pipe: Python calls handlers in the
    main thread alone, which may wait in a collective for ever.
    """

    def __init__(self) -> None:
        self._heard = False
        self._flag: DeferredTensor | None = None
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # SIGUSR1 is ignored where launch.py starts ranks, until they listen; SIGHUP where nohup does.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        echoes = SignalDebouncer()
        while received := os.read(self._read, 1):
            if received[0] not in SIGNALS:
                continue
            if echoes.is_duplicate(received[0]):
                continue
            name = signal.Signals(received[0]).name
            if self._heard:
                terminal.alert(f"{name}: the second signal; ends at once")
                os._exit(128 + received[0])
            self._heard = True
            terminal.alert(f"{name}: checkpoint at the next step boundary, then exit status {EXIT_STOPPED}")

    def heard(self, run: Path | None) -> bool:
        """Whether this process was asked to stop: by a signal, or by the file in the run's folder, if one is given."""
        return self._heard or (run is not None and (run / STOP_REQUEST).exists())

    def agreed(self, flag: "DeferredTensor") -> bool:
        """Whether any rank had heard one in the step before; the same on every rank, which all call once a step.

        flag: int64 [1], all-reduced over this step: how many have.
        """
        before, self._flag = self._flag, flag
        return before is not None and before.values()[0] > 0


# Slurm sends SIGTERM twice within milliseconds.
DEBOUNCE_SECONDS = 1.0


class SignalDebouncer:
    """Tells echoes, signal by signal. A session that ends sends SIGHUP and SIGTERM, so these count as the same."""

    def __init__(self) -> None:
        self._last = 0
        self._since = 0.0

    def is_duplicate(self, number: int) -> bool:
        """Whether a signal, heard now, is the echo of the one before it."""
        kind = signal.SIGTERM if number == signal.SIGHUP else number
        before, self._last = self._last, kind
        since, self._since = self._since, time.monotonic()
        return kind == before and self._since - since < DEBOUNCE_SECONDS
