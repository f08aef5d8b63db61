"""Script run on a host over ssh or srun: reports the host's state, or kills the processes of a launch.

`python -P node.py REQUEST`: REQUEST is a JSON object in base64 (so that shells pass it unchanged); prints one line of
JSON. Standard library only and without the project on sys.path, so that a host where nothing else works can report it.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
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

# Environment variable of all processes of a launch: "<key of the run>-<launch>".
MARK = "MASKVR_LAUNCH"
_PACKAGES = ("torch", "deepspeed", "transformers", "maskvr_ds")
# DeepSpeed's process per node: one without MARK belongs to another job.
_DEEPSPEED = b"deepspeed.launcher.launch"
_SMI = ["nvidia-smi", "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader,nounits"]
# As PyTorch looks for one: CXX first.
_COMPILERS = ("g++", "clang++", "c++")


def report(request: dict[str, Any]) -> dict[str, Any]:
    """State of the host in JSON types.

    request: folder (of the launch), token (name of a file in it), corpora (paths), port (of the master; 0: any).
    """
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
        "shards": {path: _shard_faults(Path(path)) for path in request["corpora"]},
        "memory": _available_memory(),
        "shared_memory": _free_bytes(Path("/dev/shm")),
        "compiler": next(filter(None, map(shutil.which, [os.environ.get("CXX") or "", *_COMPILERS])), None),
        "triton": importlib.util.find_spec("triton") is not None,
        "interfaces": [name for _, name in socket.if_nameindex()],
        "port": _free_port(int(request["port"])),
        "free_bytes": _free_bytes(folder),
        "folder": _use_folder(folder, request["token"]),
        "time": time.time(),
    }


def packages() -> dict[str, str | None]:
    """Name -> version, None if not installed. Reads metadata only: importing torch takes seconds."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    nccl = [d for d in importlib.metadata.distributions() if (d.metadata["Name"] or "").startswith("nvidia-nccl")]
    return {**versions, "nccl": nccl[0].version if nccl else None}


def marked(mark: str) -> list[dict[str, Any]]:
    """This user's processes whose MARK starts with `mark`: pid, state (as shown by ps; D cannot be killed)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            value = _variable(folder, MARK)
            if value is not None and value.startswith(mark):
                state = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
                found.append({"pid": int(folder.name), "state": state})
        except (OSError, IndexError):
            continue  # another user's process, or ended
    return found


def kill(mark: str, seconds: float = 10) -> dict[str, Any]:
    """Kill the processes of a launch (SIGKILL, by pid). Returns those found, and those still alive after `seconds`."""
    found = alive = marked(mark)
    deadline = time.monotonic() + seconds
    while alive and time.monotonic() < deadline:
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], signal.SIGKILL)
        time.sleep(0.05)
        alive = marked(mark)
    return {"found": found, "alive": alive}


def deepspeed_jobs() -> list[dict[str, Any]]:
    """DeepSpeed jobs of all users on this host: pid of one process, user id, mark (None: not started by `launch`, or
    not readable).

    Jobs started by MPI or Slurm have no process of DeepSpeed's launcher; they are found only if they have a mark.
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
            continue  # ended
        # Compared word by word: the shell of ssh has the entire command line in one word.
        if mark is not None or _DEEPSPEED in words:
            jobs.setdefault(pid if mark is None else mark, {"pid": pid, "user": user, "mark": mark})
    return list(jobs.values())


def _variable(process: Path, name: str) -> str | None:
    """A variable of the environment that a process was started with. process: its folder in /proc."""
    for word in (process / "environ").read_bytes().split(b"\0"):
        if word.startswith(name.encode() + b"="):
            return word.partition(b"=")[2].decode(errors="replace")
    return None


def _gpus() -> dict[str, Any] | None:
    """Names of the GPUs, MiB in use of each (None: not reported), driver version; None if nvidia-smi is missing or
    fails."""
    try:
        answer = subprocess.run(_SMI, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [
        [cell.strip() for cell in line.rsplit(",", 2)] for line in answer.stdout.splitlines() if line.count(",") > 1
    ]
    used = [int(row[2]) if row[2].isdecimal() else None for row in rows]
    return {"names": [row[0] for row in rows], "used": used, "driver": rows[0][1] if rows else None}


def _addresses() -> list[str]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout.split()
    return []


def _free_port(wanted: int) -> int | None:
    """`wanted`, or any free port if 0; None if `wanted` is in use."""
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
    """Why the launch's folder cannot be used from this host; None if it is shared and writable."""
    if not (folder / token).is_file():
        return "not found: not on a file system that all nodes share, or not mounted"
    probe = folder / f".write-{socket.gethostname()}-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
        if probe.read_bytes() != b"x" * 4096:
            return "data written there is read back differently"
    except OSError as error:
        return f"not writable: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def _available_memory() -> int | None:
    """Bytes that processes can still take without swapping."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None


def _shard_faults(folder: Path) -> list[str]:
    """Shards of a corpus that cannot be read from this host or have another size than the manifest says; empty also
    without a readable manifest, which is reported by its digest."""
    faults = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for shard in json.loads((folder / "manifest.json").read_bytes())["shards"]:
            name, expected = shard["file"], shard["bytes"]
            try:
                with (folder / name).open("rb") as file:
                    file.read(1)
                    found = os.fstat(file.fileno()).st_size
            except OSError as error:
                faults.append(f"{name}: {error.strerror}")
                continue
            if found != expected:
                faults.append(f"{name}: {found:,} bytes, {expected:,} expected")
    return faults


def _sha256(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


_ACTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "report": report,
    "kill": lambda request: kill(request["mark"]),
    "ping": lambda request: {},
    "count": lambda request: {"gpus": _gpus(), "cpus": len(os.sched_getaffinity(0))},
}


def main(argv: list[str]) -> int:
    request = json.loads(base64.urlsafe_b64decode(argv[0]))
    print(json.dumps(_ACTIONS[request["action"]](request)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
