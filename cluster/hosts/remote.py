"""Requests to all hosts in parallel: runs cluster/hosts/node.py on each over ssh or srun.

The request is passed as base64, so that no shell interprets any of it.
"""

import base64
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.hosts import node

# Seconds for ssh to connect; a connection without any answer for 10 s is closed.
CONNECT_TIMEOUT = 10
KEEP_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2")
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT}", *KEEP_ALIVE)
# Connections at a time.
_PARALLEL = 64
# Exit status of ssh itself.
_SSH_FAILED = 255


@dataclass(frozen=True)
class Answer:
    """A host's answer: `value` as printed by node.py, or `error` in words.

    clock: seconds by which the host's clock is ahead of this machine's, and the uncertainty of that.
    """

    value: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    clock: tuple[float, float] | None = None


def ask(hosts: Iterable[str], request: dict[str, Any], *, timeout: float, transport: str = "ssh") -> dict[str, Answer]:
    """Send a request for node.py to all hosts; returns host -> answer after at most `timeout` seconds.

    transport: "ssh", or "srun" in a Slurm job.
    """
    names = list(hosts)
    with ThreadPoolExecutor(min(len(names), _PARALLEL)) as pool:
        return dict(zip(names, pool.map(lambda host: _ask(host, request, timeout, transport), names), strict=True))


def encode(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def command(host: str, request: dict[str, Any], transport: str) -> list[str]:
    words = [sys.executable, "-P", str(Path(node.__file__).resolve()), encode(request)]
    if transport == "srun":
        return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *words]
    return ["ssh", *SSH_OPTIONS, host, shlex.join(words)]


def unkillable(host: str, processes: Sequence[Mapping[str, Any]]) -> str:
    """Error message for processes that survive SIGKILL."""
    pids = ", ".join(str(process["pid"]) for process in processes)
    return f"{host}: processes {pids} of this run cannot be killed; they are blocked in a device or file system"


def _ask(host: str, request: dict[str, Any], timeout: float, transport: str) -> Answer:
    started = time.time()
    try:
        run = subprocess.run(
            command(host, request, transport),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer by {transport} within {timeout:g} s")
    except OSError as error:
        return Answer(error=f"{transport} cannot be started on this machine: {error}")
    ended = time.time()
    message = (run.stderr.strip().splitlines() or run.stdout.strip().splitlines() or ["no output"])[-1]
    if run.returncode == _SSH_FAILED and transport == "ssh":
        return Answer(error=f"not reachable by ssh: {message} (try: ssh -o BatchMode=yes {host} true)")
    if run.returncode != 0:
        return Answer(error=f"{sys.executable} failed there with exit status {run.returncode}: {message}")
    try:
        # The last line: start-up files of a shell may print something first.
        value = json.loads(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Answer(error=f"unreadable answer: {run.stdout[-200:]!r}")
    clock = None
    if "time" in value:
        # Read by node.py just before it ends, so compared with `ended`.
        clock = (value["time"] - ended, ended - started)
    return Answer(value=value, clock=clock)
