"""Processes of this host: start time, state, pid namespace, exit descriptions, death with the parent. Loads no torch.

Reads /proc instead of using psutil, which neither login nodes nor an environment without DeepSpeed have. Linux only.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Loaded at import: between fork and exec only async-signal-safe work should be done.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process (SIGKILL) when its parent dies; exit at once if `parent` is dead already.

    For a child between fork and exec: `preexec_fn=partial(die_with_parent, os.getpid())`. The kernel watches the
    thread that forked, so start children from a thread that lives as long as the process.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise SystemExit within the block, with the status 143 that a shell reports of it: temporary files
    are deleted then. Call in the main thread."""

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # Slurm sends it twice: not into the cleanup
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None if it does not exist or is a zombie.

    Together with the pid it identifies a process for as long as the host is up: pids are reused.
    """
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def state(pid: int) -> str:
    """One-letter state as shown by ps (R, S, T stopped, D uninterruptible wait, Z zombie); "?" if there is none."""
    return (_stat(pid) or "?")[0]


def process_age() -> float:
    """Seconds since this process started, accurate to a clock tick (the time of boot is known to a second only)."""
    started = start_time(os.getpid())
    return 0.0 if started is None else time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def pid_namespace() -> str:
    """Identifies the pid namespace of this process on its host; "" if /proc does not show it."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def describe_exit(returncode: int) -> str:
    """A `Popen.returncode` in words: "exit status 3" or "killed by SIGTERM"."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (by hand, or by the kernel when memory ran out)" if returncode == -signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The second field, the command in parentheses, may itself contain blanks and parentheses.
    return text.rpartition(")")[2].split()
