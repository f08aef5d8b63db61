"""Run status files, and the exit code that launchers read. Loads no torch.

Exit codes of launchers are unreliable: DeepSpeed's launcher returns 0 if a signal ended its ranks, and for a run on the
wrong machines. Programs that start ranks decide by these files instead: rank 0 writes them atomically, after the
checkpoint that they refer to, and removes them when training starts or resumes.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from maskvr_ds.run_folder.layout import COMPLETED, STOP_REQUEST, STOPPED
from maskvr_ds.runtime.files import atomic_write, discard, read_json

# sysexits.h: "temporary failure; user is invited to retry".
EXIT_STOPPED = os.EX_TEMPFAIL
# Maximum seconds between two heartbeats of a rank (reliability/watchdog.py).
LONGEST_BEAT = 10.0
# State of a rank in its last heartbeat: ended together with the others, or with an error of its own.
ENDED, FAILED = "ended", "failed"


def write(run: Path, name: str, step: int) -> None:
    """Record how the run ended. name: STOPPED or COMPLETED."""
    content = {"step": step, **({"requested": True} if (run / STOP_REQUEST).exists() else {})}
    atomic_write(run / name, json.dumps(content))
    discard(run / STOP_REQUEST)


def clear(run: Path) -> None:
    """Remove the status files of an earlier job."""
    for name in (STOPPED, COMPLETED):
        (run / name).unlink(missing_ok=True)


def forget_request(run: Path, seconds: float) -> None:
    """Delete a stop request older than `seconds`: left by an earlier job that was killed before it stopped."""
    with contextlib.suppress(FileNotFoundError):
        if clock(run) - (run / STOP_REQUEST).stat().st_mtime > seconds:
            (run / STOP_REQUEST).unlink()


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


def written(run: Path) -> dict[str, int]:
    """STOPPED, COMPLETED -> modification time in ns, of the files that exist. A launcher reads it before it starts
    ranks, to tell files of an earlier job from new ones; it must not delete them, as the ranks may still refuse the
    run."""
    return {name: (run / name).stat().st_mtime_ns for name in (STOPPED, COMPLETED) if (run / name).is_file()}


def step_of(run: Path, name: str, before: Mapping[str, int] | None = None) -> int | None:
    """The step in STOPPED or COMPLETED; None if the file is missing or damaged, or unchanged since `before` (see
    `written`)."""
    try:
        if before is not None and before.get(name) == (run / name).stat().st_mtime_ns:
            return None
        return int(read_json(run / name)["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def completed(run: Path, steps: int, before: Mapping[str, int] | None = None) -> bool:
    """Whether the run completed at step `steps` or later. before: as in `step_of`."""
    step = step_of(run, COMPLETED, before)
    return step is not None and step >= steps
