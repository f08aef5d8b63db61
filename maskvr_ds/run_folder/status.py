"""Run status files, and the exit code that launchers read. Loads no torch.

Exit codes of launchers are unreliable: DeepSpeed's launcher returns 0 if a signal ended its ranks, and for a run on the
wrong machines. Programs that start ranks decide by these files instead: rank 0 writes them atomically, after the
checkpoint that they refer to, and removes them when training starts or resumes. They name the owner of the run by its
token (fence.py), as do requests to stop that a launcher makes: what another job has written, or was asked, is not this
job's.
"""

import contextlib
import json
import os
import secrets
import time
from pathlib import Path

from maskvr_ds.run_folder.layout import COMPLETED, STOP_REQUEST, STOPPED
from maskvr_ds.runtime.files import atomic_write, discard, read_json

# sysexits.h: "temporary failure; user is invited to retry".
EXIT_STOPPED = os.EX_TEMPFAIL
# Maximum seconds between two heartbeats of a rank (reliability/watchdog.py).
LONGEST_BEAT = 10.0
# State of a rank in its last heartbeat: ended together with the others, or with an error of its own.
ENDED, FAILED = "ended", "failed"
# Line of a stop request that names the token of the job that is asked.
_OWNER = "owner: "
# In bytes; a person may have put anything into the file.
_LONGEST_REQUEST = 4096


def write(run: Path, name: str, step: int, owner: str) -> None:
    """Record how the run ended. name: STOPPED or COMPLETED. owner: the token of the job that trained it."""
    requested = stop_requested(run, owner)
    content = {"step": step, "owner": owner, **({"requested": True} if requested else {})}
    atomic_write(run / name, json.dumps(content))
    if requested:
        discard(run / STOP_REQUEST)


def clear(run: Path) -> None:
    """Remove the status files of an earlier job."""
    for name in (STOPPED, COMPLETED):
        (run / name).unlink(missing_ok=True)


def request_stop(run: Path, why: str, owner: str) -> None:
    """Ask the job with the token `owner`, and no other, to save and stop. why: for people."""
    atomic_write(run / STOP_REQUEST, f"{why}\n{_OWNER}{owner}\n")


def stop_requested(run: Path, owner: str) -> bool:
    """Whether the job with the token `owner` is asked to save and stop: by a request to it, or to whoever has the run,
    which anybody makes by creating the file."""
    return _addressee(run) in ("", owner)


def withdraw_request(run: Path, owner: str) -> None:
    """Delete a request to the job with the token `owner`, which has ended."""
    if _addressee(run) == owner:
        discard(run / STOP_REQUEST)


def forget_request(run: Path, seconds: float, owner: str) -> None:
    """Delete a stop request to another job than `owner`, and one to nobody in particular that is older than `seconds`:
    left by an earlier job that was killed before it stopped."""
    addressee = _addressee(run)
    if addressee is None or addressee == owner:
        return
    with contextlib.suppress(FileNotFoundError):
        if addressee or clock(run) - (run / STOP_REQUEST).stat().st_mtime > seconds:
            (run / STOP_REQUEST).unlink()


def _addressee(run: Path) -> str | None:
    """The token in a stop request; "" if it names none; None without a request."""
    try:
        with (run / STOP_REQUEST).open("rb") as file:
            lines = file.read(_LONGEST_REQUEST).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError:  # a folder of that name, or one that may not be read: it exists
        return ""
    return next((line.removeprefix(_OWNER) for line in lines if line.startswith(_OWNER)), "")


def clock(run: Path) -> float:
    """Seconds since 1970 by the clock of the run's file system."""
    probe = run / f".clock.{secrets.token_hex(8)}.partial"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a folder without write permission
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def step_of(run: Path, name: str, owner: str | None = None) -> int | None:
    """The step in STOPPED or COMPLETED; None if the file is missing or damaged, or another job's than `owner`'s."""
    try:
        content = read_json(run / name)
        return int(content["step"]) if owner is None or content.get("owner") == owner else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def completed(run: Path, steps: int, owner: str | None = None) -> bool:
    """Whether the run completed at step `steps` or later. owner: as in `step_of`."""
    step = step_of(run, COMPLETED, owner)
    return step is not None and step >= steps
