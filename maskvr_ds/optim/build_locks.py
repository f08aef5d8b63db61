"""Locks of DeepSpeed's compiled operations that outlive the process that held them.

DeepSpeed compiles an operation at its first use. torch's builder creates the file `lock` in the operation's build
folder, deletes it at the end, and waits, without a word and without end, while another process's is there
(torch/utils/file_baton.py). If that process was killed, every later start waits for ever.

The file names no process, but its owner keeps it open: a lock that no process of this host has open was left by a
killed one, or belongs to another host with the same home folder.
"""

import importlib.util
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch._appdirs import user_cache_dir

# DeepSpeed's all-reduce through shared memory on CPUs; only its inference engine calls it.
SHARED_MEMORY_OP = "deepspeed_shm_comm"
# Seconds that the longest build takes, generously: an older lock is nobody's.
LONGEST_BUILD = 1800.0


class BuildLockError(ValueError):
    """An operation would be waited for for ever."""


def abandoned_lock(operation: str) -> Path | None:
    """The lock of an operation's build folder, if there is one that no process of this host has open."""
    path = _extensions_folder() / operation / "lock"
    if not path.exists():
        return None
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        # Processes end meanwhile, and other users' cannot be looked into.
        with suppress(OSError):
            if link.samefile(path):
                return None
    return path if path.exists() else None


def check_build_lock(operation: str) -> None:
    """Raise BuildLockError if the build of an operation, which DeepSpeed is about to use, was killed; warn if it may
    have been."""
    if (path := abandoned_lock(operation)) is None:
        return
    age = time.time() - path.stat().st_mtime
    if age > LONGEST_BUILD:
        raise BuildLockError(
            f"{path}: left by a killed build of DeepSpeed's operation {operation}, {age / 3600:.1f} hours ago; every "
            "start would wait for it for ever. Delete the file"
        )
    warnings.warn(
        f"{path}: DeepSpeed's operation {operation} is being built on another host with this folder, or its build was "
        "killed. If this start does not continue within minutes, stop it and delete the file",
        stacklevel=2,
    )


def avoid_shared_memory_op() -> None:
    """Have DeepSpeed do without its shared-memory all-reduce for CPUs, which training does not call, if it would wait
    for the lock of a build that was killed. Otherwise nothing changes."""
    path = abandoned_lock(SHARED_MEMORY_OP)
    if path is None or importlib.util.find_spec("deepspeed") is None:
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    warnings.warn(
        f"{path}: left by a build that was killed, DeepSpeed would wait for it for ever. Its operation "
        f"{SHARED_MEMORY_OP}, which only inference calls, is not used; delete the file to have it built again",
        stacklevel=2,
    )


def _extensions_folder() -> Path:
    """Where torch builds extensions: as torch.utils.cpp_extension._get_build_directory has it, which creates folders
    and takes a second to import."""
    if (given := os.environ.get("TORCH_EXTENSIONS_DIR")) is not None:
        return Path(given)
    cuda, hip = torch.version.cuda, torch.version.hip
    accelerator = f"rocm{hip}" if hip is not None else f"cu{cuda}" if cuda is not None else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(user_cache_dir(appname="torch_extensions")).resolve() / f"{python}_{accelerator.replace('.', '')}"
