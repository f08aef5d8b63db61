"""One job writes into a run's folder at a time: who owns it stands in RUN/owner.json. Loads no torch.

A node that the scheduler has given up may still run its rank, while the job goes on elsewhere with the same run. Rank 0
takes the run when it starts: a record with an epoch, one more than that of the record before, and a random token.
Before everything that would replace or remove what another job relies on (a checkpoint's renaming into place, `latest`,
deletions, roll-backs, word of the end) it reads the record again, and stops where the token is not its own. The cost
is one small file read at each pause of the training. Lines of metrics.jsonl need no check: the new owner replaces the
file, and those of the old one go on into the file that was replaced.

What is left: between that check and the rename that follows another job may take the run. POSIX has no rename that
depends on the content of another file, and locks do not survive on every cluster's file system. The window is that of
two system calls, not of a checkpoint's writing, and both jobs' files are whole: a checkpoint is written in a folder
whose name has the owner's epoch and token. On NFS, opening the file asks the server, whatever the client has cached.
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

from maskvr_ds.run_folder.layout import HEARTBEATS, OWNER
from maskvr_ds.run_folder.status import ENDED, FAILED, LONGEST_BEAT, clock
from maskvr_ds.runtime import slurm_env
from maskvr_ds.runtime.heartbeats import RANK_FILES, rank_of, read_record
from maskvr_ds.runtime.processes import pid_namespace, start_time

# Seconds without a heartbeat after which a rank is not known to live; a slow file system may lose one.
FRESH = 2.5 * LONGEST_BEAT
_RANKS = f"{HEARTBEATS}/*/{RANK_FILES}"


class FencedError(ValueError):
    """The run belongs to another job."""


@dataclass(frozen=True)
class Owner:
    """Who writes into a run's folder: rank 0 of a job.

    epoch: how many have taken the run, this one included. host, pid, started: of rank 0; started in clock ticks since
    the host's boot. namespace: in which pid is meant. job: Slurm's (`slurm.job_id`), "" without Slurm; restarts: how
    often Slurm has started that job again; nodes: its nodes as Slurm writes them. ranks: of the job. taken: seconds
    since 1970.
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
    """The right of this job to write into the run. Rank 0 takes and checks it; every rank holds what rank 0 took."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._owner: Owner | None = None

    def take(self, ranks: int) -> Owner:
        """Become the run's owner, or check that this job still is it. Raises FencedError."""
        if self._owner is None:
            return take(self._run, ranks)
        self.check()
        return self._owner

    def hold(self, owner: Owner) -> None:
        """What `take` returned on rank 0."""
        self._owner = owner

    @property
    def label(self) -> str:
        """For names of folders that are this owner's alone."""
        assert self._owner is not None
        return f"{self._owner.epoch}-{self._owner.token}"

    def check(self) -> None:
        """Raise FencedError where another job has taken the run."""
        assert self._owner is not None
        present = read(self._run)
        if present is None or present.token != self._owner.token:
            whose = "is gone" if present is None else f"names {present}"
            raise FencedError(
                f"output_dir {self._run}: {OWNER} {whose}; this job has lost the run and writes nothing more into it"
            )


def take(run: Path, ranks: int, environment: Mapping[str, str] = os.environ) -> Owner:
    """Make this process, rank 0 of `ranks`, the owner of the run's folder, which is there.

    Raises FencedError where another job is visibly at work on it (see `at_work`), unless that is an earlier start of
    the same Slurm job.
    """
    before = read(run)
    job, restarts = slurm_env.job_id(environment), int(environment.get("SLURM_RESTART_COUNT", "0"))
    if before is not None:
        restarted = bool(job) and before.job == job and before.restarts < restarts
        ours = _is_here(before) and before.pid == os.getpid()
        if not restarted and not ours and at_work(run, before):
            raise FencedError(f"output_dir {run}: in use by {before}; end that job first, or name another output_dir")
    owner = Owner(
        epoch=1 if before is None else before.epoch + 1,
        token=secrets.token_hex(8),
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
    temporary = run / f".{OWNER}.{owner.token}.partial"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(owner), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / OWNER)
    return owner


def read(run: Path) -> Owner | None:
    """The run's owner; None where none has been yet. Raises FencedError where the file is damaged."""
    try:
        return Owner(**json.loads((run / OWNER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise FencedError(f"{run / OWNER}: damaged ({error}); remove it once no job uses the run") from None


def at_work(run: Path, owner: Owner) -> bool:
    """Whether the owner is visibly at work: its process runs on this host or, on another one, its heartbeats go on.

    The latter takes up to 25 s, and only where the last beat is younger than that. A job on another host without
    heartbeats (one that is still loading, or has hangs.timeout 0) cannot be seen.
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
    """Rank → seconds since its last sign of life, by the clock of the file system; ranks that have ended left out."""
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
    """Whether its process id is one of this host's."""
    return (owner.host, owner.namespace) == (socket.gethostname(), pid_namespace())
