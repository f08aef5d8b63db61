"""Several ranks of one `mpirun` or `srun --mpi`: rank 0 runs the command and hands out tasks, the others only work.

Every rank keeps `--workers` processes, rank 0 too, and gives a task to whichever is free: the ranks need a shared file
system and nothing else, since tasks and their results are files (`workers`). Messages are point-to-point on COMM_WORLD,
pickled by mpi4py, at most one in flight for each process:

    rank 0 → r   ("task", slot, task, folder), or ("stop",)
    r → rank 0   (slot, kind, value), kind as a worker process says it, or "died"

A rank that dies takes the job with it (that is MPI's way, and mpirun names it); the same command goes on from there. A
worker process that dies is named with its rank and host.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.execution.tasks import Task
from data_pipeline.files import CorpusError

# What launchers set: Open MPI; MPICH, Intel MPI and their like.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Team:
    """The ranks of this job."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def send_task(self, rank: int, slot: int, task: Task, folder: Path) -> None:
        self._comm.send(("task", slot, task, folder), dest=rank)

    def messages(self) -> list[tuple[int, int, str, Any]]:
        """What has arrived at rank 0: (rank, slot, kind, value)."""
        from mpi4py import MPI

        found = []
        status = MPI.Status()
        while self._comm.iprobe(source=MPI.ANY_SOURCE, status=status):
            rank = status.Get_source()
            found.append((rank, *self._comm.recv(source=rank)))
        return found

    def stop(self) -> None:
        """Rank 0 is done, or has failed: the others may go."""
        for rank in range(1, self.size):
            self._comm.send(("stop",), dest=rank)

    def receive(self) -> tuple[Any, ...] | None:
        """The next message of rank 0, None while there is none."""
        if not self._comm.iprobe(source=0):
            return None
        message: tuple[Any, ...] = self._comm.recv(source=0)
        return message

    def reply(self, slot: int, kind: str, value: Any) -> None:
        """Report on a slot's task to rank 0."""
        self._comm.send((slot, kind, value), dest=0)


def join_team() -> Team | None:
    """The team, where mpirun or srun started several ranks, else None.

    Raises CorpusError where there are several and they do not find each other: all would do the same work, each on
    the files of the others.
    """
    size = _started_together(os.environ)
    if size < 2:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where there is no MPI library
        raise CorpusError(
            f"started by mpirun or srun with {size} ranks, but mpi4py is not there ({error}). "
            "Install it (pip install 'maskvr_ds[mpi]'), or start one task and use --workers"
        ) from None
    team = Team(MPI.COMM_WORLD)
    if team.size < size:
        raise CorpusError(
            f"started with {size} ranks, but MPI makes a world of {team.size}: each would do all the work on the same "
            "files. Start them with the mpirun of the library that mpi4py uses, or srun --mpi=pmix where it knows PMIx"
        )
    return team


def _started_together(environment: Mapping[str, str]) -> int:
    """How many ranks a launcher says that it has started; 1 where none says anything.

    Raises CorpusError for tasks of one srun without MPI.
    """
    if sizes := [int(environment[name]) for name in _SIZES if environment.get(name, "").isdigit()]:
        return max(sizes)
    # A batch script has SLURM_NTASKS and SLURM_PROCID too, but is no step.
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 1
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "PMIX_RANK" not in environment:  # PMIx does not say its size
        raise CorpusError(
            f"started by srun with {tasks} tasks without MPI: each would do all the work on the same files. Start one "
            "task (srun -n 1 -c CORES) with --workers CORES, or ranks with srun --mpi=pmix, or mpirun, and mpi4py"
        )
    return tasks
