"""Runs on a node, by ssh or srun: says what the node is and sees, or ends what a launch has left there.

`python -P node.py REQUEST`, REQUEST a mapping in JSON in base64 (nothing that a shell could read into); prints one line
of JSON. The standard library alone, so that a node where nothing else works can still say so.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In the environment of everything that a launch has started: "<key of the run>-<launch>".
MARK = "MASKVR_LAUNCH"
_PACKAGES = ("torch", "deepspeed", "transformers", "maskvr_ds")
# DeepSpeed's per-node process: where one is that no launch of ours has started, another job runs.
_DEEPSPEED = b"deepspeed.launcher.launch"
_SMI = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]


def report(request: dict[str, Any]) -> dict[str, Any]:
    """The node, in JSON types. request: folder (of the launch), token (a file there), corpora, port (0: any)."""
    folder = Path(request["folder"])
    return {
        "hostname": socket.gethostname(),
        "addresses": _addresses(),
        "python": platform.python_version(),
        "packages": packages(),
        "gpus": _gpus(),
        "cpus": len(os.sched_getaffinity(0)),
        "jobs": deepspeed_jobs(),
        "manifests": {path: _sha256(Path(path) / "manifest.json") for path in request["corpora"]},
        "port": _free_port(int(request["port"])),
        "free_bytes": _free_bytes(folder),
        "folder": _use_folder(folder, request["token"]),
        "time": time.time(),
    }


def packages() -> dict[str, str | None]:
    """Versions by name, None where not installed; found without importing, which takes seconds."""
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    nccl = [d for d in importlib.metadata.distributions() if (d.metadata["Name"] or "").startswith("nvidia-nccl")]
    return {**found, "nccl": nccl[0].version if nccl else None}


def marked(mark: str) -> list[dict[str, Any]]:
    """This user's processes whose MARK begins with `mark`: pid, state (of ps: D does not end)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            theirs = _variable(folder, MARK)
            if theirs is not None and theirs.startswith(mark):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found.append({"pid": int(folder.name), "state": state})
        except (OSError, IndexError):
            continue  # of another user, or gone
    return found


def end(mark: str, seconds: float = 10) -> dict[str, Any]:
    """SIGKILL for the processes of a launch, by id; → those there were, those still there after `seconds`."""
    found = left = marked(mark)
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], signal.SIGKILL)
        time.sleep(0.05)
        left = marked(mark)
    return {"found": found, "left": left}


def deepspeed_jobs() -> list[dict[str, Any]]:
    """DeepSpeed's jobs here, of any user: pid of one process, user id, mark (None: not of a launch of ours, or hidden).

    Jobs of MPI and Slurm have none of DeepSpeed's own processes: of these, ours alone are seen.
    """
    jobs: dict[Any, dict[str, Any]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        pid, mark = int(folder.name), None
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            user = folder.stat().st_uid
            with contextlib.suppress(PermissionError):
                mark = _variable(folder, MARK)
        except OSError:
            continue  # gone
        # The shell of ssh has the whole line as one word.
        if mark is not None or _DEEPSPEED in words:
            jobs.setdefault(pid if mark is None else mark, {"pid": pid, "user": user, "mark": mark})
    return list(jobs.values())


def _variable(process: Path, name: str) -> str | None:
    """From the environment that a process was started with. process: its folder in /proc."""
    for word in (process / "environ").read_bytes().split(b"\0"):
        if word.startswith(name.encode() + b"="):
            return word.partition(b"=")[2].decode(errors="replace")
    return None


def _gpus() -> dict[str, Any] | None:
    """Names and driver; None where there is no way to count."""
    try:
        answer = subprocess.run(_SMI, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
    return {"names": [row[0].strip() for row in rows], "driver": rows[0][1].strip() if rows else None}


def _addresses() -> list[str]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout.split()
    return []


def _free_port(wanted: int) -> int | None:
    """`wanted`, or any where it is 0; None where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _free_bytes(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def _use_folder(folder: Path, token: str) -> str | None:
    """What is wrong with the launch's folder, seen from here; None: it is shared, and can be written."""
    if not (folder / token).is_file():
        return "not there: not on a file system that all nodes share, or not mounted"
    probe = folder / f".write-{socket.gethostname()}-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
        if probe.read_bytes() != b"x" * 4096:
            return "what was written there reads otherwise"
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def _sha256(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


_ACTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "report": report,
    "end": lambda request: end(request["mark"]),
    "answer": lambda request: {},
    "count": lambda request: {"gpus": _gpus(), "cpus": len(os.sched_getaffinity(0))},
}


def main(argv: list[str]) -> int:
    request = json.loads(base64.urlsafe_b64decode(argv[0]))
    print(json.dumps(_ACTIONS[request["action"]](request)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
