"""Parent process of one rank: starts it as launch.json says, logs its output, and records its state and return code.

Launchers run it in place of the training module (`--module cluster.hosts.rank`, or as a script), because they differ in
how they pass arguments, logs, environments and exit codes. Its one argument is the launch's folder in base64. Writes
FOLDER/rank-00003.{json,log}; kills the rank if FOLDER/end appears, and the kernel kills it if this process dies.
Imports of the project the torch-free part only; the ranks need the same PYTHONPATH, which plan.py exports.
"""

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from maskvr_ds.runtime.heartbeats import HeartbeatWriter, rank_path
from maskvr_ds.runtime.processes import die_with_parent, state

# Files in the launch's folder: what to run; created by the supervisor to abort.
PLAN, ABORT = "launch.json", "end"
# Seconds between two checks for ABORT.
ABORT_POLL = 1.0
# Environment variables for rank, world size, local rank: torch, Open MPI, MPICH, Slurm.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def read_ranks(environment: dict[str, str]) -> tuple[int, int, int]:
    """Rank, world size, local rank. Raises ValueError if no launcher has set all three."""
    for names in _NAMES:
        if all(name in environment for name in names):
            rank, world_size, local = (int(environment[name]) for name in names)
            return rank, world_size, local
    raise ValueError("no launcher has set the rank: expected " + ", or ".join(" ".join(names) for names in _NAMES))


def record_path(folder: Path, rank: int) -> Path:
    return rank_path(folder, rank).with_suffix(".json")


def log_path(folder: Path, rank: int) -> Path:
    return rank_path(folder, rank).with_suffix(".log")


def supervise(folder: Path, environment: dict[str, str]) -> int:
    """Run the rank to its end; returns its exit status, 128 + n if signal n killed it."""
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder}: not found on this host; output_dir must be on a file system that all nodes share")
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    rank, world_size, local = read_ranks(environment)
    if world_size != plan["world_size"]:
        # A misconfigured MPI or Slurm starts worlds of one rank, each of which would train and report success.
        raise ValueError(f"the launcher started a world of {world_size} ranks, the hostfile has {plan['world_size']}")
    environment = {
        **environment,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": plan["master_addr"],
        "MASTER_PORT": str(plan["master_port"]),
    }
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        # The rank receives them too, and handles them. Not SIG_IGN, which it would inherit.
        signal.signal(number, lambda *_: None)
    log = os.open(log_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    heartbeat = HeartbeatWriter(record_path(folder, rank), fsync=True)
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", plan["module"], *plan["arguments"]],
        cwd=plan["cwd"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    record: dict[str, Any] = {"beat": 0, "rank": rank, "host": socket.gethostname(), "pid": child.pid, "state": "R"}
    last_poll = last_beat = float("-inf")
    while (code := child.poll()) is None:
        now = time.monotonic()
        if now - last_poll >= ABORT_POLL:
            last_poll = now
            if (folder / ABORT).exists():
                child.kill()
        if now - last_beat >= plan["beat"]:
            last_beat = now
            record.update(beat=record["beat"] + 1, state=state(child.pid))
            heartbeat.write(record)
        time.sleep(0.1)
    heartbeat.write({**record, "beat": record["beat"] + 1, "state": "ended", "status": code})
    return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.hosts.rank", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("folder", help="folder of the launch, in base64")
    folder = Path(os.fsdecode(base64.urlsafe_b64decode(parser.parse_args(argv).folder)))
    try:
        return supervise(folder, dict(os.environ))
    except (ValueError, OSError) as error:
        print(f"error: {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
