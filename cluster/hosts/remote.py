"""Runs cluster/node.py on hosts, all at once, by ssh or by srun. Only base64 passes through their shells."""

import base64
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.hosts import node

# Seconds for ssh to connect; a connection that says nothing for 10 s is over.
CONNECT_TIMEOUT = 10
KEEP_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2")
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT}", *KEEP_ALIVE)
# Of connections at once; sshd's own MaxStartups counts those of one machine.
_AT_ONCE = 64
_SSH_FAILED = 255


@dataclass(frozen=True)
class Answer:
    """A host's: `value` as node.py said it, or `fault` in words. clock: seconds that the host's is ahead of ours, and
    by how much that may be wrong."""

    value: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    clock: tuple[float, float] | None = None


def ask(hosts: Iterable[str], request: dict[str, Any], *, timeout: float, by: str = "ssh") -> dict[str, Answer]:
    """Every host's answer to a request of node.py, within `timeout` seconds. by: "ssh", or in a Slurm job "srun"."""
    names = list(hosts)
    with ThreadPoolExecutor(min(len(names), _AT_ONCE)) as pool:
        return dict(zip(names, pool.map(lambda host: _ask(host, request, timeout, by), names), strict=True))


def encode(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def command(host: str, request: dict[str, Any], by: str) -> list[str]:
    words = [sys.executable, "-P", str(Path(node.__file__).resolve()), encode(request)]
    if by == "srun":
        return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *words]
    return ["ssh", *SSH_OPTIONS, host, shlex.join(words)]


def _ask(host: str, request: dict[str, Any], timeout: float, by: str) -> Answer:
    begun = time.time()
    try:
        run = subprocess.run(
            command(host, request, by),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(fault=f"does not answer by {by} within {timeout:g} s")
    except OSError as error:
        return Answer(fault=f"{by} cannot be started here: {error}")
    ended = time.time()
    said = (run.stderr.strip().splitlines() or run.stdout.strip().splitlines() or ["no word"])[-1]
    if run.returncode == _SSH_FAILED and by == "ssh":
        return Answer(fault=f"not reached by ssh: {said} (try: ssh -o BatchMode=yes {host} true)")
    if run.returncode != 0:
        return Answer(fault=f"{sys.executable} there ends with status {run.returncode}: {said}")
    try:
        # The last line: a shell's start-up files may say something first.
        value = json.loads(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Answer(fault=f"its answer cannot be read: {run.stdout[-200:]!r}")
    clock = None
    if "time" in value:
        # Told last of all, so near to `ended`.
        clock = (value["time"] - ended, ended - begun)
    return Answer(value=value, clock=clock)
