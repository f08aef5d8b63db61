"""Starts DeepSpeed's runner on a hostfile, watches the ranks through the run's folder, and ends what is left.

No exit status of a launcher decides anything: DeepSpeed's returns 0 where a signal ended its ranks, mpirun's where a
rank was killed. Nor is the runner ever sent a signal that it can hear: with pdsh it would answer by `pkill -f` on every
host, which ends other jobs too. It gets SIGKILL; processes on the hosts are found by a variable in their environment
(node.MARK) and ended by id, through ssh, and by rank.py where ssh no longer comes through but the file system does.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import rank, remote

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
    grace: seconds from the end of the first rank until the others are ended; start: until every rank has begun."""

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
    return [*words, "--module", "cluster.rank", payload]


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
            record = self._read(number)
            if record is None or record["beat"] == self.records.get(number, {}).get("beat"):
                continue
            self.records[number], self.since[number] = record, now
            if record["state"] in ("T", "t"):
                self.stopped_since.setdefault(number, now)
            else:
                self.stopped_since.pop(number, None)
            if "status" in record:
                self.ended[number] = int(record["status"])

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            return json.loads((self.plan.folder / f"rank-{number:05d}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # not there yet, or half a record

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have said nothing for so long."""
        now = time.monotonic()
        return [n for n in self.records if n not in self.ended and now - self.since[n] > seconds]

    def stopped(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [n for n, since in self.stopped_since.items() if n not in self.ended and now - since > seconds]


class Job:
    """The runner, and what it has started on the hosts."""

    def __init__(self, plan: Plan, quiet: bool = False) -> None:
        """quiet: do not print what rank 0 says."""
        self.plan, self._quiet = plan, quiet
        self.ranks = Ranks(plan)
        self.begun = time.monotonic()
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
            return f"{plan.grace:g} s after the first rank's end others are still there"
        if len(ranks.records) < plan.world_size and now - self.begun > plan.start:
            missing = [n for n in range(plan.world_size) if n not in ranks.records]
            return f"not begun within {plan.start:g} s: {self.names(missing)}"
        return None

    def _for(self, what: str, now: float, seconds: float) -> bool:
        """Whether it has been so for `seconds`; the first call is when it began."""
        return now - self._times.setdefault(what, now) > seconds

    def show(self) -> None:
        """Print what rank 0 has said since the last time."""
        path = self.plan.folder / "rank-00000.log"
        if path.exists() and not self._quiet:
            with path.open("rb") as file:
                file.seek(self._shown)
                text = file.read()
            self._shown += len(text)
            if text:
                sys.stdout.write(text.decode("utf-8", "replace"))
                sys.stdout.flush()

    def names(self, numbers: Sequence[int]) -> str:
        return ", ".join(f"rank {n} on {self.plan.host_of(n)}{self._step(n)}" for n in numbers)

    def _step(self, number: int) -> str:
        """Where the rank was, by its heartbeat in the run's folder (watchdog.py)."""
        for path in (self.plan.run / "heartbeats").glob(f"*/rank-{number:05d}"):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                return f" (last step {record['step']}, {record['place']})"
            except (OSError, ValueError, KeyError):
                continue
        return ""

    def end(self) -> dict[str, remote.Answer]:
        """SIGKILL for everything of this launch; → what each host said. Afterwards nothing is left on any host that
        answers, nor on one that does not but still sees the run's folder."""
        # What comes after is our doing.
        self._statuses = dict(self.ranks.ended)
        (self.plan.folder / rank.END).touch()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        by = "srun" if self.plan.launcher == "slurm" else "ssh"
        request = {"action": "end", "mark": self.plan.mark}
        answers = remote.ask(self.plan.hosts, request, timeout=END_SECONDS, by=by)
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
                lines.append(f"{self.names([number])}: killed by {_signal_name(-status)}")
        for number, status in ended.items():
            if status > 0:
                lines.append(f"{self.names([number])}: ended with status {status}{self._last_words(number)}")
        never = [n for n in range(self.plan.world_size) if n not in self.ranks.records]
        if never:
            lines.append(f"never begun: {self.names(never)}{_last_line(self.log, _TROUBLE)} ({self.log})")
        return lines

    def _last_words(self, number: int) -> str:
        return _last_line(self.plan.folder / f"rank-{number:05d}.log")


def _ignore_signals() -> None:
    # A scheduler may signal the whole job; the runner would answer by pkill on every host.
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name} (by hand, or where memory ran out)" if number == signal.SIGKILL else name


def _last_line(path: Path, words: Sequence[str] = ("error",)) -> str:
    """Its last line with one of `words` in it; "" where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = [line for line in lines if any(word in line.lower() for word in words)]
    return f": {told[-1].strip()[:300]}" if told else ""
