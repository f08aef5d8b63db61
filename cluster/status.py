"""`python -m cluster status RUN…`: what runs where, how far it is, how it ended. Reads files of the run, and squeue."""

import argparse
import json
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskvr_ds.run_folder import fence, layout
from maskvr_ds.run_folder import status as outcome
from maskvr_ds.run_folder.layout import COMPLETED, JOBS, STOPPED

# As metrics.py and manifest.py write them; neither is imported here, since the former loads torch.
_METRICS, _CHECKPOINTS = "metrics.jsonl", "checkpoints"
_TAIL = 1 << 16


class StatusError(ValueError):
    """A folder that is not that of a run."""


@dataclass(frozen=True)
class Status:
    """A run's state in JSON types; None for what is not known.

    state: running, queued, completed, stopped (saved, on request), ended (without a word), not begun. why: how that is
    known. job, restarts, nodes: of Slurm. ranks, host: of the last start. step, loss, tokens_per_second: of the last
    line in metrics.jsonl, metrics_age: seconds since. checkpoint: the newest one's name, checkpoint_age: seconds since.
    heartbeat_ages: seconds since the ranks' last signs of life, the youngest and the oldest.
    """

    run: str
    state: str
    why: str
    job: str | None
    restarts: int | None
    nodes: str | None
    ranks: int | None
    host: str | None
    step: int | None
    loss: float | None
    tokens_per_second: float | None
    metrics_age: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    heartbeat_ages: tuple[float, float] | None


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("status", help="what runs where, how far it is, how it ended")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or one of runs for several seeds")
    parser.add_argument("--json", action="store_true", help="a list of objects, one a run")
    parser.set_defaults(run=_print)


def _print(arguments: argparse.Namespace) -> int:
    found = [read_status(run) for folder in arguments.runs for run in runs_of(Path(folder))]
    if arguments.json:
        print(json.dumps([asdict(status) for status in found], indent=1))
    else:
        print("\n\n".join(describe(status) for status in found))
    return 0


def runs_of(folder: Path) -> list[Path]:
    """The folder itself, or the runs of several seeds in it. Raises StatusError where it is neither."""
    if not folder.is_dir():
        raise StatusError(f"{folder}: no such folder; that of a run expected")
    seeds = sorted(path for path in folder.glob("seed-*") if path.is_dir())
    if any((folder / name).exists() for name in (layout.OWNER, _METRICS, "config.yaml")):
        return [folder]
    if seeds:
        return seeds
    if (folder / JOBS).is_dir():
        return [folder]
    raise StatusError(f"{folder}: neither a run's folder ({_METRICS} is missing) nor one of seed-*")


def read_status(run: Path) -> Status:
    owner = fence.read(run)
    line = last_step(run / _METRICS)
    ages = fence.heartbeat_ages(run)
    latest = run / _CHECKPOINTS / "latest"
    job = _job_of(run) or (owner.job if owner else "") or None
    queue = None if job is None else squeue(job)
    state, why = _state(run, owner, queue, ages)
    now_on = queue["nodes"] if queue is not None and queue["state"] == "RUNNING" else ""
    same_job = owner is not None and owner.job == job
    return Status(
        run=str(run),
        state=state,
        why=why,
        job=job,
        restarts=owner.restarts if owner is not None and same_job else None,
        nodes=now_on or (owner.nodes if owner else None) or None,
        ranks=owner.ranks if owner else None,
        host=owner.host if owner else None,
        step=line.get("step"),
        loss=line.get("loss"),
        tokens_per_second=line.get("tokens_per_second"),
        metrics_age=_age(run / _METRICS) if line else None,
        checkpoint=latest.read_text(encoding="utf-8").strip() if latest.is_file() else None,
        checkpoint_age=_age(latest),
        heartbeat_ages=(min(ages.values()), max(ages.values())) if ages else None,
    )


def _state(
    run: Path, owner: fence.Owner | None, queue: dict[str, str] | None, ages: dict[int, float]
) -> tuple[str, str]:
    """The first that is certain: word left by the run, then the queue, then signs of life."""
    if (step := outcome.step_of(run, COMPLETED)) is not None:
        return "completed", f"{COMPLETED} names step {step}"
    if queue is not None and queue["state"] in ("RUNNING", "COMPLETING"):
        return "running", f"squeue says {queue['state']}, for {queue['time']}"
    if queue is not None:
        return "queued", f"squeue says {queue['state']} ({queue['reason']})"
    if (step := outcome.step_of(run, STOPPED)) is not None:
        return "stopped", f"{STOPPED} names step {step}"
    if ages and min(ages.values()) < fence.FRESH:
        return "running", f"a heartbeat {min(ages.values()):.0f} s ago"
    if owner is not None and fence.at_work(run, owner):
        return "running", f"process {owner.pid} runs on this host"
    if owner is None:
        return "not begun", f"no {layout.OWNER}"
    return "ended", "no word of its end, and no sign of life; --resume auto goes on"


def squeue(job: str) -> dict[str, str] | None:
    """state, reason, nodes, time of a job; None where it is no longer queued, or there is no squeue here."""
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%r|%N|%M"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    if answer.returncode or not lines:
        return None
    return dict(zip(("state", "reason", "nodes", "time"), lines[0].split("|"), strict=True))


def last_step(path: Path) -> dict[str, Any]:
    """The last line of a metrics.jsonl that is a step's; empty where there is none. Reads the file's end only."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for text in reversed(lines[:-1]):
        try:
            line = json.loads(text)
        except ValueError:
            continue  # begun before the part that was read
        if "event" not in line:
            return line
    return {}


def _job_of(run: Path) -> str | None:
    """The job whose script had the run last."""
    try:
        return (run / JOBS / "attempt").read_text(encoding="utf-8").split()[0]
    except (FileNotFoundError, IndexError):
        return None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None


def describe(status: Status) -> str:
    """A few lines for people."""
    lines = [f"{status.run}: {status.state} ({status.why})"]
    where = [
        f"job {status.job}" if status.job else None,
        f"restarts {status.restarts}" if status.restarts is not None else None,
        f"nodes {status.nodes}" if status.nodes else None,
        f"{status.ranks} ranks, rank 0 on {status.host}" if status.ranks else None,
    ]
    if any(where):
        lines.append("  " + ", ".join(filter(None, where)))
    if status.step is not None:
        loss = "not finite" if status.loss is None else f"{status.loss:.4f}"
        speed = f"{status.tokens_per_second or 0:,.0f} tokens/s"
        lines.append(f"  step {status.step}, loss {loss}, {speed}, {_ago(status.metrics_age)}")
    lines.append(
        f"  checkpoint {status.checkpoint}, {_ago(status.checkpoint_age)}" if status.checkpoint else "  no checkpoint"
    )
    if status.heartbeat_ages is not None:
        youngest, oldest = status.heartbeat_ages
        lines.append(f"  last signs of life of the ranks: {youngest:.0f} to {oldest:.0f} s ago")
    return "\n".join(lines)


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f} s ago"
