"""Asynchronous checkpoints (`checkpoint.asynchronous`): written while training continues.

During a pause every rank copies what it will write to host memory. From then on a thread of each rank writes, fsyncs
and hashes its files. Listing them in checkpoint.json and renaming the folder, which makes them count, is done by all
ranks together at a step boundary. All ranks must agree on when: the number of ranks that are still writing is part of
the all-reduce of every step, and is read one step later. No collective here.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskvr_ds.runtime.deferred import DeferredTensor


class AsyncCheckpointWriter:
    """At most one checkpoint in flight. Every rank has one."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._commit: Callable[[], Path] | None = None
        self._flag: DeferredTensor | None = None
        self._step, self._started, self._paused = 0, 0.0, 0.0

    def start(self, step: int, write: Callable[[], None], commit: Callable[[], Path]) -> None:
        """Run `write`, which must not raise, in a thread; `commit` is called by all ranks together, after it."""
        assert self._commit is None
        self._step, self._started, self._flag, self._commit = step, time.perf_counter(), None, commit
        # A daemon: a process that ends with an error must not wait for files that will not count.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def record_pause(self, seconds: float) -> None:
        """Record how long training was paused for the checkpoint in flight."""
        self._paused = seconds

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing files."""
        return self._thread is not None and self._thread.is_alive()

    def all_written(self, flag: DeferredTensor) -> bool:
        """Whether all ranks have written their files, so that `finish` will not wait; identical on all ranks.

        Call once per step on all ranks. flag: int64 [1], all-reduced in this step: the number of ranks that are
        `writing`.
        """
        before, self._flag = self._flag, flag if self._commit is not None else None
        return before is not None and before.values()[0] == 0

    def finish(self) -> tuple[Path, dict[str, Any]] | None:
        """Wait for the checkpoint in flight and complete it. Collective: call on all ranks.

        Returns its folder and its event for metrics.jsonl; None if there is none. Raises what `save` raises.
        """
        if self._commit is None or self._thread is None:
            return None
        waited = time.perf_counter()
        self._thread.join()
        commit, self._commit, self._thread, self._flag = self._commit, None, None, None
        folder = commit()
        now = time.perf_counter()
        # Time that training stood still, and time from the start until the checkpoint counts.
        seconds = {"seconds": self._paused + now - waited, "after_seconds": self._paused + now - self._started}
        return folder, {"event": "checkpoint", "step": self._step, **seconds}
