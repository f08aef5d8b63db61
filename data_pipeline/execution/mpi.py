"""Multi-node builds over MPI (`mpirun` or `srun --mpi`): rank 0 runs the command and assigns tasks to all ranks.

Each rank, including rank 0, runs `--workers` processes and assigns tasks to idle ones. The ranks need a shared file
system and nothing else, because results are exchanged as files (execution/workers.py). Messages are point-to-point on
COMM_WORLD, pickled by mpi4py:

    rank 0 → r   ("task", slot, task, folder), or ("stop",)
    r → rank 0   (slot, kind, value), kind as reported by the worker process, "died", or at last "stopped"

After "stop", rank 0 receives until every rank has stopped: no worker writes to a folder that rank 0 cleans up, and no
rank waits for ever in a message that nobody receives.

A rank that dies or fails aborts the job, as usual under MPI; rerunning the command resumes. If a worker process dies,
the error names its rank and host.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.execution.tasks import Task
from data_pipeline.files import CorpusError

# World size as set by Open MPI, and by MPICH, Intel MPI and other PMI launchers.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_PAUSE = 0.005


class Team:
    """The MPI ranks of this job."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._working = set(range(1, self.size))
        self._sent: list[Any] = []  # requests of replies that may not have been received yet

    def send_task(self, rank: int, slot: int, task: Task, folder: Path) -> None:
        self._comm.send(("task", slot, task, folder), dest=rank)

    def messages(self) -> list[tuple[int, int, str, Any]]:
        """Messages received by rank 0 since the last call: (rank, slot, kind, value)."""
        from mpi4py import MPI

        received = []
        status = MPI.Status()
        while self._comm.iprobe(source=MPI.ANY_SOURCE, status=status):
            rank = status.Get_source()
            received.append((rank, *self._comm.recv(source=rank)))
        return received

    def stop(self) -> None:
        """Tell the other ranks to stop, because rank 0 has finished or failed, and wait until they have. May be called
        again."""
        for rank in self._working:
            self._comm.send(("stop",), dest=rank)
        while self._working:
            for rank, _, kind, _ in self.messages():
                if kind == "stopped":
                    self._working.discard(rank)
            time.sleep(_PAUSE)

    def receive(self) -> tuple[Any, ...] | None:
        """The next message from rank 0, or None if none has arrived."""
        if not self._comm.iprobe(source=0):
            return None
        message: tuple[Any, ...] = self._comm.recv(source=0)
        return message

    def reply(self, slot: int, kind: str, value: Any) -> None:
        """Report the state of a slot's task to rank 0, without waiting until it receives: it may be sending a task."""
        self._sent = [request for request in self._sent if not request.test()[0]]
        self._sent.append(self._comm.isend((slot, kind, value), dest=0))

    def leave(self) -> None:
        """Tell rank 0 that this rank has stopped: the last message."""
        self.reply(-1, "stopped", None)
        for request in self._sent:
            request.wait()

    def abort(self) -> None:
        """End all ranks because of the exception that is being handled: rank 0 would wait for this one for ever."""
        traceback.print_exc()
        sys.stderr.flush()
        self._comm.Abort(1)


def join_team() -> Team | None:
    """The team if mpirun or srun started several ranks, else None.

    Raises CorpusError if there are several ranks that cannot communicate: each would do all of the work, on the same
    files.
    """
    size = _started_together(os.environ)
    if size < 2:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError if there is no MPI library
        raise CorpusError(
            f"started by mpirun or srun with {size} ranks, but mpi4py is not available ({error}). "
            "Install it (pip install 'maskvr_ds[mpi]'), or start one task and use --workers"
        ) from None
    team = Team(MPI.COMM_WORLD)
    if team.size < size:
        raise CorpusError(
            f"started with {size} ranks, but the MPI world size is {team.size}: each rank would do all the work on the "
            "same files. Use the mpirun of the library that mpi4py links to, or srun --mpi=pmix if it supports PMIx"
        )
    return team


def _started_together(environment: Mapping[str, str]) -> int:
    """Number of ranks according to the launcher's environment variables, 1 without a launcher.

    Raises CorpusError for several tasks of one srun without MPI.
    """
    if sizes := [int(environment[name]) for name in _SIZES if environment.get(name, "").isdigit()]:
        return max(sizes)
    # A batch script has SLURM_NTASKS and SLURM_PROCID too, but is not a job step.
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 1
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "PMIX_RANK" not in environment:  # PMIx does not set its size in the environment
        raise CorpusError(
            f"started by srun with {tasks} tasks without MPI: each would do all the work on the same files. Start one "
            "task (srun -n 1 -c CORES) with --workers CORES, or install mpi4py and use mpirun or srun --mpi=pmix"
        )
    return tasks
