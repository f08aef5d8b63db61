"""A rank's parent: starts the rank with what launch.json says, keeps its log, and says how it fares and how it ended.

Runs under every launcher in place of the training module (`--module cluster.hosts.rank`, or as a script), because
launchers differ in what they make of arguments, logs, environments and exit statuses. Its one argument is the launch's
folder in base64. Writes FOLDER/rank-00003.{json,log}; ends the rank where FOLDER/end appears, or with itself. Standard
library.
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

PLAN = "launch.json"
END = "end"
# Seconds between two looks for END, and the most between two beats.
LOOK, BEAT = 1.0, 10.0
# Rank, world size, place on the node, as launchers say them.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def place(environment: dict[str, str]) -> tuple[int, int, int]:
    """Rank, world size, local rank. Raises ValueError where no launcher has said them all."""
    for names in _NAMES:
        if all(name in environment for name in names):
            rank, world_size, local = (int(environment[name]) for name in names)
            return rank, world_size, local
    raise ValueError("no launcher has said which rank this is: " + ", or ".join(" ".join(names) for names in _NAMES))


def record_path(folder: Path, rank: int) -> Path:
    return rank_path(folder, rank).with_suffix(".json")


def log_path(folder: Path, rank: int) -> Path:
    return rank_path(folder, rank).with_suffix(".log")


def supervise(folder: Path, environment: dict[str, str]) -> int:
    """Run the rank to its end; → its exit status, 128 + n where signal n ended it."""
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder} is not seen from here; output_dir must lie on a file system that all nodes share")
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    rank, world_size, local = place(environment)
    if world_size != plan["world_size"]:
        # Of MPI and Slurm a wrong setting makes worlds of one, each of which would train and call it success.
        raise ValueError(f"the launcher made a world of {world_size} ranks, the hostfile has {plan['world_size']}")
    environment = {
        **environment,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": plan["master_addr"],
        "MASTER_PORT": str(plan["master_port"]),
    }
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        # The rank hears them too and knows better; not SIG_IGN, which it would inherit.
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
    said: dict[str, Any] = {"beat": 0, "rank": rank, "host": socket.gethostname(), "pid": child.pid, "state": "R"}
    looked = beaten = -BEAT
    while (status := child.poll()) is None:
        now = time.monotonic()
        if now - looked >= LOOK:
            looked = now
            if (folder / END).exists():
                child.kill()
        if now - beaten >= plan["beat"]:
            beaten = now
            said.update(beat=said["beat"] + 1, state=state(child.pid))
            heartbeat.write(said)
        time.sleep(0.1)
    heartbeat.write({**said, "beat": said["beat"] + 1, "state": "ended", "status": status})
    return status if status >= 0 else 128 - status


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.hosts.rank", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("folder", help="of the launch, in base64")
    folder = Path(os.fsdecode(base64.urlsafe_b64decode(parser.parse_args(argv).folder)))
    try:
        return supervise(folder, dict(os.environ))
    except (ValueError, OSError) as error:
        print(f"error: {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
