"""Fencing: one job at a time writes to a run; RUN/owner.json says which. Loads no torch.

A node that the scheduler has given up may keep running its rank while the job continues elsewhere with the same run.
Rank 0 therefore takes ownership at start-up: a record with an epoch, incremented each time, and a random token. It
looks whether another job is at work before it chooses the checkpoint to resume from. It takes the run before it writes
anything, under the folder's lock, and only if nobody else has taken it in between: of two jobs that start together one
is refused and has changed nothing. A launcher chooses the token of the ranks that it starts (launched.py), to know
their record and their status files from those of other jobs.

Before anything that replaces or removes files on which another job relies (renaming a checkpoint, `latest`, deletions,
rollbacks, the final status) rank 0 reads the record again and stops if the token is not its own. The cost is one small
file read at each pause of training. metrics.jsonl needs no check: a new owner replaces the file, and lines of the old
one go to the file that was replaced.

Limits: another job may take the run between the check and the rename that follows. POSIX has no rename conditional on
another file's content, and locks are not reliable on every cluster's file system. The window is two system calls long,
not the writing of a checkpoint, and the files of both jobs stay intact: a checkpoint is written in a folder named after
the owner's epoch and token. On NFS, opening the file asks the server, regardless of the client's cache.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.files import locked_folder
from maskvr_ds.run_folder.layout import HEARTBEATS, OWNER
from maskvr_ds.run_folder.marks import is_run, output_fault
from maskvr_ds.run_folder.status import ENDED, FAILED, LONGEST_BEAT, clock
from maskvr_ds.runtime import slurm_env
from maskvr_ds.runtime.files import atomic_write, read_json
from maskvr_ds.runtime.heartbeats import RANK_FILES, rank_of, read_record
from maskvr_ds.runtime.processes import pid_namespace, start_time

# Seconds without a heartbeat after which a rank is presumed dead; a slow file system may lose one.
FRESH = 2.5 * LONGEST_BEAT
_RANKS = f"{HEARTBEATS}/*/{RANK_FILES}"


class FencedError(ValueError):
    """The run belongs to another job."""


@dataclass(frozen=True)
class Owner:
    """The process that may write to a run's folder: rank 0 of a job.

    epoch: number of owners so far, including this one. host, pid, started: of rank 0; started in clock ticks since the
    host's boot. namespace: the pid namespace. job: Slurm's id (`slurm_env.job_id`), "" without Slurm; restarts: how
    often Slurm has restarted it; nodes: its nodes in Slurm's notation. ranks: number of ranks. taken: seconds since
    1970.
    """

    epoch: int
    token: str
    host: str
    pid: int
    started: int
    namespace: str
    job: str
    restarts: int
    nodes: str
    ranks: int
    taken: float

    def __str__(self) -> str:
        job = f"Slurm job {self.job} (restart {self.restarts}), " if self.job else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.taken))
        return f"{job}process {self.pid} on {self.host}, since {when}"


class Fence:
    """This job's right to write to the run. Rank 0 takes and checks it; all ranks hold the same owner. token: the
    owner's, if a launcher has chosen it."""

    def __init__(self, run: Path, token: str | None = None) -> None:
        self._run = run
        self._given = token
        self._seen: int | None = None
        self._owner: Owner | None = None

    def look(self) -> None:
        """Raise FencedError if another job is visibly running the run. Call before reading what it may still change:
        `take` then refuses a run that another job has taken since."""
        # An owner.json of another program is none, and left to `output_fault`.
        marked = (self._run / OWNER).exists() and is_run(self._run)
        self._seen = _epoch(_free(self._run, os.environ)) if marked else 0

    def take(self, ranks: int) -> Owner:
        """Become the run's owner, or check that this job still owns it. Raises FencedError."""
        if self._owner is None:
            return take(self._run, ranks, token=self._given, seen=self._seen)
        self.check()
        return self._owner

    def hold(self, owner: Owner) -> None:
        """Store what `take` returned on rank 0."""
        self._owner = owner

    @property
    def token(self) -> str:
        """The owner's token, which its status files and requests to it carry."""
        assert self._owner is not None
        return self._owner.token

    @property
    def label(self) -> str:
        """Part of folder names that is unique to this owner."""
        assert self._owner is not None
        return f"{self._owner.epoch}-{self._owner.token}"

    def check(self) -> None:
        """Raise FencedError if another job owns the run."""
        assert self._owner is not None
        present = read(self._run)
        if present is None or present.token != self._owner.token:
            raise FencedError(
                f"output_dir {self._run}: {_whose(present)}; this job no longer owns the run and stops writing to it"
            )


def take(
    run: Path,
    ranks: int,
    environment: Mapping[str, str] = os.environ,
    *,
    token: str | None = None,
    seen: int | None = None,
) -> Owner:
    """Make this process, rank 0 of `ranks`, the owner of the folder of a run, which is created if need be.

    token: the owner's; None: a new one. seen: epoch of the owner that was found at the start, 0 for none; None: the
    present one. Raises FencedError if another job is visibly running it (see `at_work`), unless that is an earlier
    start of the same Slurm job, if another has taken it since `seen`, or if the folder is not a run's.
    """
    before = _free(run, environment)
    if seen is None:
        seen = _epoch(before)
    with locked_folder(run):
        if (fault := output_fault(run, "auto")) is not None:
            raise FencedError(fault)
        present = read(run)
        if _epoch(present) != seen:
            raise FencedError(f"output_dir {run}: {_whose(present)}, since this job has started; nothing was changed")
        owner = _owner(seen + 1, token or secrets.token_hex(8), ranks, environment)
        atomic_write(run / OWNER, json.dumps(asdict(owner)))
    return owner


def _free(run: Path, environment: Mapping[str, str]) -> Owner | None:
    """The run's owner, if its job has ended, is an earlier start of the same Slurm job, or is this process; None if the
    run never had one. Raises FencedError otherwise."""
    before = read(run)
    if before is None:
        return None
    job, restarts = slurm_env.job_id(environment), int(environment.get("SLURM_RESTART_COUNT", "0"))
    restarted = bool(job) and before.job == job and before.restarts < restarts
    ours = _is_here(before) and before.pid == os.getpid()
    if not restarted and not ours and at_work(run, before):
        raise FencedError(f"output_dir {run}: in use by {before}; end that job first, or choose another output_dir")
    return before


def _epoch(owner: Owner | None) -> int:
    return 0 if owner is None else owner.epoch


def _whose(owner: Owner | None) -> str:
    return f"{OWNER} is missing" if owner is None else f"{OWNER} names {owner}"


def _owner(epoch: int, token: str, ranks: int, environment: Mapping[str, str]) -> Owner:
    """The record of this process."""
    job, restarts = slurm_env.job_id(environment), int(environment.get("SLURM_RESTART_COUNT", "0"))
    return Owner(
        epoch=epoch,
        token=token,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=start_time(os.getpid()) or 0,
        namespace=pid_namespace(),
        job=job,
        restarts=restarts,
        nodes=environment.get("SLURM_JOB_NODELIST", "") if job else "",
        ranks=ranks,
        taken=time.time(),
    )


def read(run: Path) -> Owner | None:
    """The run's owner; None if it never had one. Raises FencedError if the file is damaged."""
    try:
        return Owner(**read_json(run / OWNER))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise FencedError(f"{run / OWNER}: damaged ({error}); remove it once no job uses the run") from None


def at_work(run: Path, owner: Owner) -> bool:
    """Whether the owner is visibly running: its process exists on this host, or on another host its heartbeats change.

    The latter takes up to 25 s, and is tried only if the last heartbeat is younger than that. A job on another host
    without heartbeats (still loading, or hangs.timeout 0) cannot be seen.
    """
    if _is_here(owner):
        return owner.started == start_time(owner.pid)
    ages = heartbeat_ages(run)
    if not ages or min(ages.values()) > FRESH:
        return False
    before = _beats(run)
    deadline = time.monotonic() + FRESH
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if (now := _beats(run)) != before:
            return bool(now)
    return False


def heartbeat_ages(run: Path) -> dict[int, float]:
    """Rank -> seconds since its last heartbeat, by the clock of the file system; without ranks that have ended."""
    now, ages = clock(run), {}
    for path in run.glob(_RANKS):
        record = read_record(path)
        if record is not None and record["place"] not in (ENDED, FAILED):
            with contextlib.suppress(OSError, ValueError):
                ages[rank_of(path)] = max(0.0, now - path.stat().st_mtime)
    return ages


def _beats(run: Path) -> dict[str, str]:
    beats = {}
    for path in run.glob(_RANKS):
        with contextlib.suppress(OSError):
            beats[str(path)] = path.read_text(encoding="utf-8")
    return beats


def _is_here(owner: Owner) -> bool:
    """Whether its process id refers to this host."""
    return (owner.host, owner.namespace) == (socket.gethostname(), pid_namespace())
