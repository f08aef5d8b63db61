"""Supervision of a launch: starts DeepSpeed's runner, watches the ranks through files, kills what remains of it.

Exit codes of launchers are not used: DeepSpeed's launcher returns 0 if a signal ended its ranks, mpirun if a rank was
killed. The runner is never sent a signal that it can catch: with pdsh it would react by `pkill -f` on every host, which
also kills other jobs. It gets SIGKILL. Processes on the hosts are identified by a variable in their environment
(node.MARK) and killed by pid over ssh, or by rank.py if a host is cut off from ssh but not from the file system.
"""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.hosts import rank, remote
from maskvr_ds.run_folder.layout import HEARTBEATS
from maskvr_ds.runtime.heartbeats import RANK_FILES, rank_of, read_record
from maskvr_ds.runtime.processes import describe_exit
from maskvr_ds.runtime.terminal import say

LAUNCHERS = ("pdsh", "openmpi", "mpich", "slurm")
POLL = 0.2
# Timeout of killing the processes on all hosts.
KILL_SECONDS = 30
# Minimum seconds between two reads of all records, per rank: file systems shared by hundreds of nodes are slow.
_SECONDS_PER_RANK = 0.005
# In the messages of remote shells and interpreters if ranks cannot start.
_STARTUP_ERRORS = ("error", "not found", "no such file", "no module", "permission denied")


@dataclass(frozen=True)
class Plan:
    """Everything needed to start the ranks and to watch them.

    hosts: host -> slots, the first one is the master. mark: value of node.MARK for all processes of this launch.
    timeout: seconds without a heartbeat until the launch is aborted, 0: no limit. grace: seconds from the first failure
    of a rank until the others are killed. start_timeout: seconds until all ranks must be training.
    """

    hosts: Mapping[str, int]
    hostfile: Path
    launcher: str
    launcher_args: str
    folder: Path
    run: Path
    mark: str
    master_addr: str
    master_port: int
    environment: Mapping[str, str]
    timeout: float
    grace: float
    start_timeout: float

    @property
    def world_size(self) -> int:
        return sum(self.hosts.values())

    def host_of(self, number: int) -> str:
        """Host of a rank: launchers fill the hosts in the order of the hostfile."""
        for host, slots in self.hosts.items():
            if number < slots:
                return host
            number -= slots
        raise AssertionError("no such rank")

    @property
    def transport(self) -> str:
        """Command by which `remote.ask` reaches the hosts."""
        return "srun" if self.launcher == "slurm" else "ssh"

    def ranks_of(self, host: str) -> list[int]:
        return [number for number in range(self.world_size) if self.host_of(number) == host]


def runner_command(plan: Plan) -> list[str]:
    """Command line of DeepSpeed's runner. Whatever of it may reach a shell is base64 or was validated."""
    payload = base64.urlsafe_b64encode(os.fsencode(plan.folder)).decode()
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(plan.hostfile)]
    # Without --force_multi, a hostfile of one host starts the ranks on this machine, whatever the host is.
    words += ["--force_multi", "--no_ssh_check", "--launcher", plan.launcher]
    words += ["--master_addr", plan.master_addr, "--master_port", str(plan.master_port)]
    extra = plan.launcher_args
    if plan.launcher == "slurm":
        # Otherwise srun chooses the nodes itself.
        slots = next(iter(plan.hosts.values()))
        names = ",".join(plan.hosts)
        extra = f"--nodes={len(plan.hosts)} --nodelist={names} --ntasks-per-node={slots} --kill-on-bad-exit=0 {extra}"
    if extra.strip():
        words.append(f"--launcher_args={extra.strip()}")
    if plan.launcher in ("slurm", "mpich"):
        # DeepSpeed drops --module for srun, and applies it to a helper of its own for mpirun.
        return [*words, str(Path(rank.__file__).resolve()), payload]
    return [*words, "--module", "cluster.hosts.rank", payload]


@dataclass
class Ranks:
    """Heartbeats of the ranks as written by rank.py.

    records: rank -> latest record. since: rank -> when that changed, by the clock of this machine. stopped_since: rank
    -> since when it has been suspended. ended: rank -> return code, in the order in which the ranks ended.
    """

    plan: Plan
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    stopped_since: dict[int, float] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    _last_poll: float = field(default_factory=lambda: time.monotonic())

    def poll(self) -> None:
        """Read the records of all ranks that have not ended."""
        now = time.monotonic()
        if now - self._last_poll > self.plan.timeout / 2:
            # This process was suspended, not the ranks.
            self.since, self.stopped_since = dict.fromkeys(self.since, now), dict.fromkeys(self.stopped_since, now)
        elif self.records and now - self._last_poll < _SECONDS_PER_RANK * self.plan.world_size:
            return
        self._last_poll = now
        for number in range(self.plan.world_size):
            if number in self.ended:
                continue
            record = read_record(rank.record_path(self.plan.folder, number))
            if record is None or record["beat"] == self.records.get(number, {}).get("beat"):
                continue
            self.records[number], self.since[number] = record, now
            if record["state"] in ("T", "t"):
                self.stopped_since.setdefault(number, now)
            else:
                self.stopped_since.pop(number, None)
            if "status" in record:
                self.ended[number] = int(record["status"])

    def silent(self, seconds: float) -> list[int]:
        """Ranks whose last heartbeat is older than this."""
        now = time.monotonic()
        return [n for n in self.records if n not in self.ended and now - self.since[n] > seconds]

    def stopped(self, seconds: float) -> list[int]:
        """Ranks suspended (SIGSTOP, debugger) for longer than this."""
        now = time.monotonic()
        return [n for n, since in self.stopped_since.items() if n not in self.ended and now - since > seconds]


class Progress:
    """Whether training progresses, by the ranks' own heartbeats (reliability/watchdog.py); if not, pings the hosts.

    Nothing else detects a broken link during a rendezvous or a checkpoint, which may take any time, if the shared file
    system is reached over another network.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._earlier = self._all()
        self._marks: dict[str, int] = {}
        self._since = self._last_poll = time.monotonic()
        self._pool = ThreadPoolExecutor(1)
        self._ping: Future[dict[str, remote.Answer]] | None = None

    def _all(self) -> set[Path]:
        return set((self._plan.run / HEARTBEATS).glob("*"))

    def records(self) -> dict[int, dict[str, Any]]:
        """Heartbeats of the ranks that train, by rank: step, place, marks."""
        records = {}
        for folder in self._all() - self._earlier:
            for path in folder.glob(RANK_FILES):
                if (record := read_record(path)) is not None:
                    records[rank_of(path)] = record
        return records

    def all_training(self) -> bool:
        """Whether all ranks train. Until then ranks that wait for each other are ended by the start timeout only."""
        return len(self.records()) == self._plan.world_size

    def unreachable_hosts(self) -> list[str]:
        """Hosts that do not answer; they are pinged once training has not progressed for the plan's timeout."""
        plan, now = self._plan, time.monotonic()
        if plan.timeout == 0 or now - self._last_poll < max(rank.ABORT_POLL, _SECONDS_PER_RANK * plan.world_size):
            return []
        was_suspended = now - self._last_poll > plan.timeout / 2
        self._last_poll = now
        marks = {str(number): record.get("marks", 0) for number, record in self.records().items()}
        if marks != self._marks or was_suspended:
            self._marks, self._since = marks, now
            self._ping = None  # outdated
        if self._ping is not None and self._ping.done():
            answers = self._ping.result()
            self._since, self._ping = now, None
            return [host for host, answer in answers.items() if answer.error is not None]
        if self._ping is None and now - self._since > plan.timeout:
            self._ping = self._pool.submit(
                remote.ask, plan.hosts, {"action": "ping"}, timeout=KILL_SECONDS, transport=plan.transport
            )
        return []

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Job:
    """DeepSpeed's runner and the ranks that it starts on the hosts. quiet: do not print the output of rank 0."""

    def __init__(self, plan: Plan, quiet: bool = False) -> None:
        self.plan, self._quiet = plan, quiet
        self.ranks = Ranks(plan)
        self.started = time.monotonic()
        self.progress = Progress(plan)
        self.log = plan.folder / "launcher.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                runner_command(plan),
                cwd="/",
                env=dict(plan.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=_ignore_signals,
            )
        # Bytes of rank 0's log.
        self._printed = 0
        # Condition -> when it was first seen.
        self._since: dict[str, float] = {}
        # `ranks.ended` before this process killed any.
        self._returncodes: dict[int, int] = {}

    def poll(self) -> str | None:
        """Check the job: None while it runs, "" if it has ended, otherwise the reason why it must be aborted."""
        self.ranks.poll()
        self.print_output()
        ranks, plan, now = self.ranks, self.plan, time.monotonic()
        if len(ranks.ended) == plan.world_size:
            return ""
        if self.process.poll() is not None:
            # The last records may be delayed by the caches of the file system.
            return "" if self._for("runner ended", now, 2 * rank.ABORT_POLL) else None
        if plan.timeout > 0 and (silent := ranks.silent(plan.timeout)):
            return f"no heartbeat for {plan.timeout:g} s from {self.names(silent)}"
        if plan.timeout > 0 and (stopped := ranks.stopped(plan.timeout)):
            return f"stopped (SIGSTOP, or a debugger) for {plan.timeout:g} s: {self.names(stopped)}"
        if any(ranks.ended.values()) and self._for("rank failed", now, plan.grace):
            return f"other ranks are still running {plan.grace:g} s after the first failure"
        if ranks.ended and plan.timeout > 0 and self._for("rank ended", now, plan.timeout + plan.grace):
            return f"other ranks are still running {plan.timeout + plan.grace:g} s after the first one ended"
        if lost := self.progress.unreachable_hosts():
            return f"no progress for {plan.timeout:g} s, and not reachable by {plan.transport}: {', '.join(lost)}"
        if now - self.started > plan.start_timeout and not self._all_started():
            missing = [n for n in range(plan.world_size) if n not in ranks.records]
            return f"not started within {plan.start_timeout:g} s: {self.names(missing or range(plan.world_size))}"
        return None

    def _all_started(self) -> bool:
        """Whether all ranks train; if hangs are not watched (hangs.timeout 0, or one rank), whether all run."""
        if self.plan.timeout == 0 or self.plan.world_size == 1:
            return len(self.ranks.records) == self.plan.world_size
        return self.progress.all_training()

    def _for(self, condition: str, now: float, seconds: float) -> bool:
        """Whether a condition has held for `seconds`; the first call is taken as its start."""
        return now - self._since.setdefault(condition, now) > seconds

    def print_output(self) -> None:
        """Print the new output of rank 0."""
        path = rank.log_path(self.plan.folder, 0)
        if path.exists() and not self._quiet:
            with path.open("rb") as file:
                file.seek(self._printed)
                text = file.read()
            self._printed += len(text)
            if text:
                say(text.decode("utf-8", "replace"), end="")

    def names(self, numbers: Iterable[int]) -> str:
        """Ranks with their hosts and last steps, for messages."""
        return ", ".join(f"rank {n} on {self.plan.host_of(n)}{self._step(n)}" for n in numbers)

    def _step(self, number: int) -> str:
        record = self.progress.records().get(number)
        return f" (last step {record['step']}, {record['place']})" if record is not None else ""

    def kill(self) -> dict[str, remote.Answer]:
        """Kill all processes of this launch (SIGKILL); returns the hosts' answers for `explain`.

        Afterwards none is left on any host that can be reached, nor on one that cannot but still sees the run's folder
        (rank.py polls it).
        """
        # Later exits are caused by the kill.
        self._returncodes = dict(self.ranks.ended)
        (self.plan.folder / rank.ABORT).touch()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.progress.close()
        request = {"action": "kill", "mark": self.plan.mark}
        answers = remote.ask(self.plan.hosts, request, timeout=KILL_SECONDS, transport=self.plan.transport)
        self.print_output()
        return answers

    def explain(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """Describe how the ranks ended, one line each, likely causes first. answers: returned by `kill`."""
        lines, ended = [], self._returncodes
        for host, answer in answers.items():
            if answer.error is not None:
                lines.append(f"{host}: {answer.error}; {self.names(self.plan.ranks_of(host))}")
            elif alive := answer.value["alive"]:
                lines.append(remote.unkillable(host, alive))
        for number in self.ranks.stopped_since:
            lines.append(f"{self.names([number])}: was stopped (SIGSTOP) and not continued")
        for number, code in ended.items():
            if code < 0:
                lines.append(f"{self.names([number])}: {describe_exit(code)}")
        for number, code in ended.items():
            if code > 0:
                error = _last_line(rank.log_path(self.plan.folder, number))
                lines.append(f"{self.names([number])}: {describe_exit(code)}{error}")
        missing = [n for n in range(self.plan.world_size) if n not in self.ranks.records]
        if missing:
            lines.append(f"never started: {self.names(missing)}{_last_line(self.log, _STARTUP_ERRORS)} ({self.log})")
        return lines


def _ignore_signals() -> None:
    # A scheduler may signal the entire job; the runner would react by pkill on every host.
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _last_line(path: Path, words: Sequence[str] = ("error",)) -> str:
    """The last line of a log that contains one of `words`, preceded by ": "; "" if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    matches = [line for line in lines if any(word in line.lower() for word in words)]
    return f": {matches[-1].strip()[:300]}" if matches else ""
