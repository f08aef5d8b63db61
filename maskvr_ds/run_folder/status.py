"""How a run fares and ended, said by files in its folder and by an exit status of its own. Loads no torch.

Exit statuses of launchers cannot be trusted: DeepSpeed's returns 0 where a signal ended its ranks, and for a run on the
wrong machines. Whoever starts ranks decides by these files: they are written by rank 0, whole or not at all, after the
checkpoint that they speak of, and removed when training begins or goes on.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from maskvr_ds.run_folder.layout import COMPLETED, STOP_REQUEST, STOPPED
from maskvr_ds.runtime.files import atomic_write

# sysexits.h: "temporary failure, the user is invited to retry".
EXIT_STOPPED = os.EX_TEMPFAIL
LONGEST_BEAT = 10.0
# Where a rank is in its last beat: it has left as all do, or with an error of its own.
ENDED, FAILED = "ended", "failed"


def write(run: Path, name: str, step: int) -> None:
    """Leave word of how the run ended: `name` is STOPPED or COMPLETED."""
    content = {"step": step, **({"requested": True} if (run / STOP_REQUEST).exists() else {})}
    atomic_write(run / name, json.dumps(content))
    (run / STOP_REQUEST).unlink(missing_ok=True)


def clear(run: Path) -> None:
    """Forget an earlier end, before the run begins or goes on."""
    for name in (STOPPED, COMPLETED):
        (run / name).unlink(missing_ok=True)


def forget_request(run: Path, seconds: float) -> None:
    """Remove a STOP_REQUEST that is older: it was made of an earlier job, which was killed before it heeded it."""
    with contextlib.suppress(FileNotFoundError):
        if clock(run) - (run / STOP_REQUEST).stat().st_mtime > seconds:
            (run / STOP_REQUEST).unlink()


def clock(run: Path) -> float:
    """Seconds since 1970, as the file system that the run lies on would have it now."""
    probe = run / f".clock.{secrets.token_hex(8)}.partial"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a folder that is not ours to write to
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def written(run: Path) -> dict[str, int]:
    """STOPPED, COMPLETED → when they were written, of those that are there. A launcher asks before it starts ranks:
    what an earlier job has left is no word of its own, and not its to remove, as the ranks may yet refuse the run."""
    return {name: (run / name).stat().st_mtime_ns for name in (STOPPED, COMPLETED) if (run / name).is_file()}


def step_of(run: Path, name: str, before: Mapping[str, int] | None = None) -> int | None:
    """The step that STOPPED or COMPLETED names; None where there is no such file, or that of `before` (`written`)."""
    try:
        if before is not None and before.get(name) == (run / name).stat().st_mtime_ns:
            return None
        return int(json.loads((run / name).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return None


def completed(run: Path, steps: int, before: Mapping[str, int] | None = None) -> bool:
    """Whether the run has come to its end at `steps` or beyond; before: as in `step_of`."""
    step = step_of(run, COMPLETED, before)
    return step is not None and step >= steps
