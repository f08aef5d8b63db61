"""Starts DeepSpeed's runner on a hostfile, watches the ranks through the run's folder, and ends what is left.

No exit status of a launcher decides anything: DeepSpeed's returns 0 where a signal ended its ranks, mpirun's where a
rank was killed. Nor is the runner ever sent a signal that it can hear: with pdsh it would answer by `pkill -f` on every
host, which ends other jobs too. It gets SIGKILL; processes on the hosts are found by a variable in their environment
(node.MARK) and ended by id, through ssh, and by rank.py where ssh no longer comes through but the file system does.
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
# For ssh to all hosts and what it ends there.
END_SECONDS = 30
# Records are not read more often than this allows: file systems that hundreds of nodes share answer slowly.
_SECONDS_A_RANK = 0.005
# What the shells and pythons of hosts say where ranks cannot begin.
_TROUBLE = ("error", "not found", "no such file", "no module", "permission denied")


@dataclass(frozen=True)
class Plan:
    """A launch. hosts: host → slots, the first one the master; timeout: seconds without a sign of life, 0: for ever;
    grace: seconds from the end of the first rank until the others are ended; start: until every rank trains."""

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
    start: float

    @property
    def world_size(self) -> int:
        return sum(self.hosts.values())

    def host_of(self, number: int) -> str:
        """The host of a rank: launchers fill hosts in the hostfile's order."""
        for host, slots in self.hosts.items():
            if number < slots:
                return host
            number -= slots
        raise AssertionError("no such rank")

    @property
    def asks_by(self) -> str:
        return "srun" if self.launcher == "slurm" else "ssh"

    def ranks_of(self, host: str) -> list[int]:
        return [number for number in range(self.world_size) if self.host_of(number) == host]


def runner_command(plan: Plan) -> list[str]:
    """DeepSpeed's runner for this plan. Everything in it that may reach a shell is base64 or was checked."""
    payload = base64.urlsafe_b64encode(os.fsencode(plan.folder)).decode()
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(plan.hostfile)]
    # With one host in the file DeepSpeed would start the ranks here, whatever the host is called.
    words += ["--force_multi", "--no_ssh_check", "--launcher", plan.launcher]
    words += ["--master_addr", plan.master_addr, "--master_port", str(plan.master_port)]
    extra = plan.launcher_args
    if plan.launcher == "slurm":
        # srun would put the tasks where it likes.
        slots = next(iter(plan.hosts.values()))
        names = ",".join(plan.hosts)
        extra = f"--nodes={len(plan.hosts)} --nodelist={names} --ntasks-per-node={slots} --kill-on-bad-exit=0 {extra}"
    if extra.strip():
        words.append(f"--launcher_args={extra.strip()}")
    if plan.launcher in ("slurm", "mpich"):
        # DeepSpeed forgets --module for srun, and applies it to its own helper for mpirun.
        return [*words, str(Path(rank.__file__).resolve()), payload]
    return [*words, "--module", "cluster.hosts.rank", payload]


@dataclass
class Ranks:
    """What the ranks' records say, and since when (on this machine's clock) they say it."""

    plan: Plan
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    stopped_since: dict[int, float] = field(default_factory=dict)
    # In the order in which their ends were seen.
    ended: dict[int, int] = field(default_factory=dict)
    _looked: float = field(default_factory=lambda: time.monotonic())

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked > self.plan.timeout / 2:
            # It was this process that stood still.
            self.since, self.stopped_since = dict.fromkeys(self.since, now), dict.fromkeys(self.stopped_since, now)
        elif self.records and now - self._looked < _SECONDS_A_RANK * self.plan.world_size:
            return
        self._looked = now
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
        """Ranks that have said nothing for so long."""
        now = time.monotonic()
        return [n for n in self.records if n not in self.ended and now - self.since[n] > seconds]

    def stopped(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [n for n, since in self.stopped_since.items() if n not in self.ended and now - since > seconds]


class Progress:
    """Whether training gets on, by the ranks' heartbeats (watchdog.py); where not, whether ssh reaches the hosts.

    A cut link is seen by nothing else where it falls into a rendezvous or a checkpoint, whose length nobody knows, and
    the file system goes another way.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._earlier = self._all()
        self._marks: dict[str, int] = {}
        self._since = self._looked = time.monotonic()
        self._pool = ThreadPoolExecutor(1)
        self._question: Future[dict[str, remote.Answer]] | None = None

    def _all(self) -> set[Path]:
        return set((self._plan.run / HEARTBEATS).glob("*"))

    def records(self) -> dict[int, dict[str, Any]]:
        """Of the ranks that train: step, place, marks."""
        found = {}
        for folder in self._all() - self._earlier:
            for path in folder.glob(RANK_FILES):
                if (record := read_record(path)) is not None:
                    found[rank_of(path)] = record
        return found

    def under_way(self) -> bool:
        """Whether every rank trains. Before that nothing but a limit ends ranks that wait for each other."""
        return len(self.records()) == self._plan.world_size

    def lost(self) -> list[str]:
        """Hosts that ssh does not reach, asked where training has not got on for the plan's timeout."""
        plan, now = self._plan, time.monotonic()
        if plan.timeout == 0 or now - self._looked < max(rank.LOOK, _SECONDS_A_RANK * plan.world_size):
            return []
        stood_still = now - self._looked > plan.timeout / 2
        self._looked = now
        marks = {str(number): record.get("marks", 0) for number, record in self.records().items()}
        if marks != self._marks or stood_still:
            self._marks, self._since = marks, now
            self._question = None  # its answer is of before
        if self._question is not None and self._question.done():
            answers = self._question.result()
            self._since, self._question = now, None
            return [host for host, answer in answers.items() if answer.fault is not None]
        if self._question is None and now - self._since > plan.timeout:
            self._question = self._pool.submit(
                remote.ask, plan.hosts, {"action": "answer"}, timeout=END_SECONDS, by=plan.asks_by
            )
        return []

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Job:
    """The runner, and what it has started on the hosts."""

    def __init__(self, plan: Plan, quiet: bool = False) -> None:
        """quiet: do not print what rank 0 says."""
        self.plan, self._quiet = plan, quiet
        self.ranks = Ranks(plan)
        self.begun = time.monotonic()
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
        self._shown = 0
        self._times: dict[str, float] = {}
        self._statuses: dict[int, int] = {}

    def look(self) -> str | None:
        """One look at the job; None: it goes on, "" it is over, else why it has to end."""
        self.ranks.look()
        self.show()
        ranks, plan, now = self.ranks, self.plan, time.monotonic()
        if len(ranks.ended) == plan.world_size:
            return ""
        if self.process.poll() is not None:
            # Records may be on their way through a file system that caches.
            return "" if self._for("over", now, 2 * rank.LOOK) else None
        if plan.timeout > 0 and (silent := ranks.silent(plan.timeout)):
            return f"no sign of life for {plan.timeout:g} s from {self.names(silent)}"
        if plan.timeout > 0 and (stopped := ranks.stopped(plan.timeout)):
            return f"stopped (SIGSTOP, or a debugger) for {plan.timeout:g} s: {self.names(stopped)}"
        if any(ranks.ended.values()) and self._for("fault", now, plan.grace):
            return f"{plan.grace:g} s after the first rank's fault others are still there"
        if ranks.ended and plan.timeout > 0 and self._for("end", now, plan.timeout + plan.grace):
            return f"{plan.timeout + plan.grace:g} s after the first rank's end others are still there"
        if lost := self.progress.lost():
            return f"no progress for {plan.timeout:g} s, and not reached by {plan.asks_by}: {', '.join(lost)}"
        if now - self.begun > plan.start and not self._under_way():
            missing = [n for n in range(plan.world_size) if n not in ranks.records]
            return f"not begun within {plan.start:g} s: {self.names(missing or range(plan.world_size))}"
        return None

    def _under_way(self) -> bool:
        """Whether every rank has begun: trains, where hangs are watched at all, else is there."""
        if self.plan.timeout == 0 or self.plan.world_size == 1:
            return len(self.ranks.records) == self.plan.world_size
        return self.progress.under_way()

    def _for(self, what: str, now: float, seconds: float) -> bool:
        """Whether it has been so for `seconds`; the first call is when it began."""
        return now - self._times.setdefault(what, now) > seconds

    def show(self) -> None:
        """Print what rank 0 has said since the last time."""
        path = rank.log_path(self.plan.folder, 0)
        if path.exists() and not self._quiet:
            with path.open("rb") as file:
                file.seek(self._shown)
                text = file.read()
            self._shown += len(text)
            if text:
                say(text.decode("utf-8", "replace"), end="")

    def names(self, numbers: Iterable[int]) -> str:
        return ", ".join(f"rank {n} on {self.plan.host_of(n)}{self._step(n)}" for n in numbers)

    def _step(self, number: int) -> str:
        record = self.progress.records().get(number)
        return f" (last step {record['step']}, {record['place']})" if record is not None else ""

    def end(self) -> dict[str, remote.Answer]:
        """SIGKILL for everything of this launch; → what each host said. Afterwards nothing is left on any host that
        answers, nor on one that does not but still sees the run's folder."""
        # What comes after is our doing.
        self._statuses = dict(self.ranks.ended)
        (self.plan.folder / rank.END).touch()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.progress.close()
        request = {"action": "end", "mark": self.plan.mark}
        answers = remote.ask(self.plan.hosts, request, timeout=END_SECONDS, by=self.plan.asks_by)
        self.show()
        return answers

    def explain(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """What became of the ranks, a line each, causes first. answers: of `end`."""
        lines, ended = [], self._statuses
        for host, answer in answers.items():
            if answer.fault is not None:
                lines.append(f"{host}: {answer.fault}; {self.names(self.plan.ranks_of(host))}")
            elif answer.value["left"]:
                pids = ", ".join(str(process["pid"]) for process in answer.value["left"])
                lines.append(
                    f"{host}: processes {pids} of this launch do not end; they wait for a device or file system"
                )
        for number in self.ranks.stopped_since:
            lines.append(f"{self.names([number])}: was stopped (SIGSTOP), and did not go on")
        for number, status in ended.items():
            if status < 0:
                lines.append(f"{self.names([number])}: {describe_exit(status)}")
        for number, status in ended.items():
            if status > 0:
                lines.append(f"{self.names([number])}: {describe_exit(status)}{self._last_words(number)}")
        never = [n for n in range(self.plan.world_size) if n not in self.ranks.records]
        if never:
            lines.append(f"never begun: {self.names(never)}{_last_line(self.log, _TROUBLE)} ({self.log})")
        return lines

    def _last_words(self, number: int) -> str:
        return _last_line(rank.log_path(self.plan.folder, number))


def _ignore_signals() -> None:
    # A scheduler may signal the whole job; the runner would answer by pkill on every host.
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _last_line(path: Path, words: Sequence[str] = ("error",)) -> str:
    """Its last line with one of `words` in it; "" where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = [line for line in lines if any(word in line.lower() for word in words)]
    return f": {told[-1].strip()[:300]}" if told else ""
