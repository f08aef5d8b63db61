"""A checkpoint that is written while training goes on (`checkpoint.asynchronous`).

At the pause every rank has put what it is to write in host memory. From then on a thread of each rank writes,
synchronises and hashes its files. Listing them and renaming the folder, without which they count for nothing, is done
by all ranks together at a step boundary. When is decided like everything that all must decide alike: how many ranks are
still writing travels in the all-reduce that every step makes anyway, and is read one step later. No collective here.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskvr_ds.runtime.deferred import DeferredTensor


class AsyncCheckpointWriter:
    """At most one checkpoint on its way. Every rank makes one."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._finish: Callable[[], Path] | None = None
        self._flag: DeferredTensor | None = None
        self._step, self._began, self._paused = 0, 0.0, 0.0

    def start(self, step: int, write: Callable[[], None], finish: Callable[[], Path]) -> None:
        """Have `write`, which must not raise, run beside training; `finish` is for all ranks together, after it."""
        assert self._finish is None
        self._step, self._began, self._flag, self._finish = step, time.perf_counter(), None, finish
        # A process that ends with an error shall not wait for what will not count.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def pausing(self, seconds: float) -> None:
        """Training has stood still for the checkpoint that is on its way."""
        self._paused = seconds

    @property
    def writing(self) -> bool:
        """Whether this rank is not through with its files."""
        return self._thread is not None and self._thread.is_alive()

    def agreed(self, flag: "DeferredTensor") -> bool:
        """Whether all ranks have written, so that `finish` need not wait; the same on every rank, which all call once a
        step.

        flag: int64 [1], all-reduced over this step: on how many ranks `writing` was true.
        """
        before, self._flag = self._flag, flag if self._finish is not None else None
        return before is not None and before.values()[0] == 0

    def finish(self) -> tuple[Path, dict[str, Any]] | None:
        """Wait for what is being written and have it count; → the checkpoint, its event for metrics.jsonl; None where
        nothing is on its way. Every rank calls. Raises what `checkpoint.save` raises."""
        if self._finish is None or self._thread is None:
            return None
        waited = time.perf_counter()
        self._thread.join()
        finish, self._finish, self._thread, self._flag = self._finish, None, None, None
        folder = finish()
        now = time.perf_counter()
        # Stood still; from the beginning until it counts.
        seconds = {"seconds": self._paused + now - waited, "after_seconds": self._paused + now - self._began}
        return folder, {"event": "checkpoint", "step": self._step, **seconds}
