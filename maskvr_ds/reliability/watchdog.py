"""Watchdog: ends the job if a rank hangs or fails, and names that rank.

Every rank has a thread that writes a heartbeat file in RUN/heartbeats/JOB/: beat, step, place. Rank 0 reads the files
of all other ranks, the others that of rank 0. All ranks exit with status 1, and the culprit is reported, if
- a rank's beat has not changed for `hangs.timeout` seconds (stopped process, lost machine);
- ranks lag behind the others within a step for that long (stuck in I/O, in a kernel);
- a rank has left with an exception while the others continue and would wait for it in a collective.
Heartbeats are files because these work even if the network or rank 0 hangs. Ages are measured by the reader's clock, so
clocks of nodes may differ. Collectives: a broadcast and `distributed.run_on_rank0` when it is created.
"""

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from maskvr_ds.run_folder.layout import HEARTBEATS
from maskvr_ds.run_folder.status import ENDED, FAILED, LONGEST_BEAT
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.heartbeats import BEATS_PER_TIMEOUT, HeartbeatWriter, rank_path, read_record

_ABORT = "abort"
# Slurm's name of this node.
_NODE = os.environ.get("SLURMD_NODENAME", "")[:64]
# Seconds for the other ranks to exit once one has failed: if all fail, each reports its own error.
_GRACE = 5.0


class Watchdog:
    """Context manager that writes and checks heartbeats. Collective: create it on all ranks.

    run: the run's folder, on a file system that all nodes share. timeout: in seconds; 0 disables it. orderly:
    exceptions that all ranks raise together and that are not failures.
    """

    def __init__(self, run: Path, timeout: float, orderly: tuple[type[Exception], ...] = ()) -> None:
        self._timeout, self._orderly = timeout, orderly
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._active = timeout > 0
        self._progress: tuple[int, int, str] = (0, 0, "starting")
        self._end = threading.Event()
        if not self._active:
            return
        job = distributed.broadcast_object(f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}")
        self._folder = run / HEARTBEATS / job

        def create() -> None:
            shutil.rmtree(run / HEARTBEATS, ignore_errors=True)
            self._folder.mkdir(parents=True)

        distributed.run_on_rank0(create)
        self._heartbeat = HeartbeatWriter(rank_path(self._folder, self._rank))
        self._interval = min(timeout / BEATS_PER_TIMEOUT, LONGEST_BEAT)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def mark(self, step: int, place: str) -> None:
        """Report the main thread's progress. Ranks that lag behind are detected in the places "data" and "step"."""
        self._progress = (self._progress[0] + 1, step, place)

    def pause(self) -> None:
        """Like `mark`, in the same step: something other than training follows, such as evaluation or saving."""
        self.mark(self._progress[1], "pause")

    def __enter__(self) -> "Watchdog":
        if self._active:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._active:
            self.mark(self._progress[1], ENDED if error is None or isinstance(error, self._orderly) else FAILED)
            self._end.set()
            self._thread.join()
            self._heartbeat.close()

    def _run(self) -> None:
        others = range(1, self._world_size) if self._rank == 0 else [0]
        seen: dict[int, dict[str, Any]] = {}
        since = dict.fromkeys(others, time.monotonic())
        marks: list[int] = []
        marks_since = last = time.monotonic()
        number = 0
        while True:
            ended = self._end.is_set()
            number += 1
            self._heartbeat.write({"beat": number, **self._own()})
            if ended:
                return
            if (self._folder / _ABORT).exists():
                os._exit(1)
            now = time.monotonic()
            if now - last > self._timeout / 2:
                # This process itself was suspended.
                since, marks_since = dict.fromkeys(others, now), now
            last = now
            for rank in others:
                record = read_record(rank_path(self._folder, rank))
                if record is not None and record["beat"] != seen.get(rank, {}).get("beat"):
                    seen[rank], since[rank] = record, now
                place, silent = seen.get(rank, {}).get("place"), now - since[rank]
                if place == FAILED and silent > min(_GRACE, self._timeout):
                    self._abort(f"{_describe(rank, seen[rank])} has failed while the others wait for it", seen[rank])
                if place not in (ENDED, FAILED) and silent > self._timeout:
                    who = _describe(rank, seen.get(rank))
                    self._abort(f"{who} has not answered for {self._timeout:g} s (hangs.timeout)", seen.get(rank))
            if self._rank == 0:
                records = {0: self._own(), **seen}
                if (present := [r["marks"] for r in records.values()]) != marks:
                    marks, marks_since = present, now
                watched = all(r["place"] in ("step", "data") for r in records.values())
                if watched and len(records) == self._world_size and now - marks_since > self._timeout:
                    behind = [rank for rank, r in records.items() if r["marks"] == min(present)]
                    names = ", ".join(_describe(rank, records[rank]) for rank in behind)
                    culprit = records[behind[0]] if len(behind) < self._world_size else None
                    why = f"no progress for {self._timeout:g} s (hangs.timeout); furthest behind: {names}"
                    self._abort(why, culprit)
            self._end.wait(self._interval)

    def _own(self) -> dict[str, Any]:
        marks, step, place = self._progress
        return {"marks": marks, "step": step, "place": place, "host": socket.gethostname(), "node": _NODE}

    def _abort(self, why: str, culprit: dict[str, Any] | None) -> None:
        """Report why, make all ranks exit, and exit. culprit: last record of the rank at fault, if it is known: a Slurm
        job excludes a node on which that happens twice (cluster/slurm/templates/job.sbatch)."""
        try:
            # Only the first rank to create the file reports.
            handle = os.open(self._folder / _ABORT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(handle, (culprit or {}).get("node", "").encode())
            os.close(handle)
        except FileExistsError:
            os._exit(1)
        except OSError:
            pass
        text = f"error: {why}. The job ends; resume from the last checkpoint with --resume auto\n"
        with contextlib.suppress(OSError):  # the log's disk is full, or the terminal is closed
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        os._exit(1)


def _describe(rank: int, record: dict[str, Any] | None) -> str:
    if record is None:
        return f"rank {rank} (no heartbeat yet)"
    return f"rank {rank} on {record['host']} (last step {record['step']}, {record['place']})"
