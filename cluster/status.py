"""`python -m cluster status RUN...`: state, place and progress of runs, from their folders and squeue."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.yaml_values import parse_yaml
from maskvr_ds.run_folder import fence
from maskvr_ds.run_folder.layout import (
    ATTEMPT,
    CHECKPOINTS,
    COMPLETED,
    CONFIG,
    JOBS,
    LATEST,
    METRICS,
    OWNER,
    STOPPED,
    SUBMITTED,
)
from maskvr_ds.run_folder.status import step_of
from maskvr_ds.runtime.files import parse_json

_EXAMPLES = """examples:
  python -m cluster status runs/mine
  python -m cluster status runs/bert_base runs/seeds --json
"""
# Bytes read from the end of metrics.jsonl.
_TAIL = 1 << 16


class StatusError(ValueError):
    """A folder that is not a run's."""


@dataclass(frozen=True)
class Status:
    """State of a run in JSON types; None if unknown.

    state: running, suspended, queued, completed, stopped (on request, with a checkpoint), ended (without a status
    file), not started. why: evidence for the state. job, restarts, nodes: from Slurm. ranks, host: of the last start;
    host is rank 0's. step, loss, tokens_per_second: from the last step in metrics.jsonl. checkpoint: name of the newest
    one. metrics_age, checkpoint_age: seconds since they were written. heartbeat_ages: minimum and maximum over the
    ranks of the seconds since their last heartbeats.
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
    steps: int | None  # of the configuration, all phases
    loss: float | None
    tokens_per_second: float | None
    metrics_age: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    heartbeat_ages: tuple[float, float] | None


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status",
        help="show run status",
        description="Show the state of runs, where they run, their last step, checkpoint and heartbeats.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or the folder of runs with --seeds")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects, one per run")
    parser.set_defaults(run=_print)


def _print(arguments: argparse.Namespace) -> int:
    runs, faults = [], []
    for folder in arguments.runs:
        try:
            runs += runs_of(Path(folder))
        except StatusError as error:
            faults.append(str(error))
    statuses = [read_status(run) for run in runs]
    if arguments.json:
        print(json.dumps([asdict(status) for status in statuses], indent=1))
    else:
        print("\n\n".join(describe(status) for status in statuses), end="\n" if statuses else "")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def runs_of(folder: Path) -> list[Path]:
    """The folder itself, or the runs of several seeds in it. Raises StatusError if it is neither."""
    if not folder.is_dir():
        raise StatusError(f"{folder}: no such folder; expected a run folder")
    seeds = sorted(path for path in folder.glob("seed-*") if path.is_dir())
    if any((folder / name).exists() for name in (OWNER, METRICS, CONFIG)):
        return [folder]
    if seeds:
        return seeds
    if (folder / JOBS).is_dir():
        return [folder]
    raise StatusError(f"{folder}: neither a run's folder ({METRICS} is missing) nor a folder of seed-* runs")


def read_status(run: Path) -> Status:
    owner = fence.read(run)
    line = last_step(run / METRICS)
    ages = fence.heartbeat_ages(run)
    latest = run / CHECKPOINTS / LATEST
    job = _job_in(run / JOBS / ATTEMPT) or (owner.job if owner else "") or None
    queue = None if job is None else squeue(job)
    # A job that has not started yet has left nothing in the run's folder.
    waiting = _job_in(run / JOBS / SUBMITTED)
    if queue is None and waiting is not None and waiting != job and (queue := squeue(waiting)) is not None:
        job = waiting
    state, why = _state(run, owner, queue, ages)
    nodes = queue["nodes"] if queue is not None and queue["state"] == "RUNNING" else ""
    same_job = owner is not None and owner.job == job
    return Status(
        run=str(run),
        state=state,
        why=why,
        job=job,
        restarts=owner.restarts if owner is not None and same_job else None,
        nodes=nodes or (owner.nodes if owner else None) or None,
        ranks=owner.ranks if owner else None,
        host=owner.host if owner else None,
        step=line.get("step"),
        steps=_steps(run / CONFIG),
        loss=line.get("loss"),
        tokens_per_second=line.get("tokens_per_second"),
        metrics_age=_age(run / METRICS) if line else None,
        checkpoint=latest.read_text(encoding="utf-8").strip() if latest.is_file() else None,
        checkpoint_age=_age(latest),
        heartbeat_ages=(min(ages.values()), max(ages.values())) if ages else None,
    )


def _state(
    run: Path, owner: fence.Owner | None, queue: dict[str, str] | None, ages: dict[int, float]
) -> tuple[str, str]:
    """State and evidence, the most certain first: status files of the run, the queue, heartbeats and processes."""
    if (step := step_of(run, COMPLETED)) is not None:
        return "completed", f"{COMPLETED}: step {step}"
    if queue is not None and queue["state"] in ("RUNNING", "COMPLETING"):
        return "running", f"squeue: {queue['state']} for {queue['time']}"
    if queue is not None and queue["state"] in ("SUSPENDED", "STOPPED"):
        return "suspended", f"squeue: {queue['state']} (scontrol resume continues it, or Slurm itself)"
    if queue is not None:
        return "queued", f"squeue: {queue['state']} ({queue['reason']})"
    if (step := step_of(run, STOPPED)) is not None:
        return "stopped", f"{STOPPED}: step {step}"
    if ages and min(ages.values()) < fence.FRESH:
        return "running", f"heartbeat {min(ages.values()):.0f} s ago"
    if owner is not None and fence.at_work(run, owner):
        return "running", f"process {owner.pid} runs on this host"
    if owner is None:
        return "not started", f"no {OWNER}"
    return "ended", "no status file and no recent heartbeat; continue with --resume auto"


def squeue(job: str) -> dict[str, str] | None:
    """state, reason, nodes, time of a job; None if it is no longer queued, or squeue is not available."""
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
    """The last step's line of a metrics.jsonl, empty if there is none. Reads the end of the file only."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for text in reversed(lines[:-1]):
        try:
            line = parse_json(text)
        except ValueError:
            continue  # starts before the part that was read, or damaged
        if isinstance(line, dict) and "event" not in line:
            return line
    return {}


def _steps(path: Path) -> int | None:
    """The steps of all phases that a run's config.yaml asks for; None if it does not say."""
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        parts = [phase["training"]["steps"] for phase in config.get("phases") or [config]]
        return sum(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _job_in(path: Path) -> str | None:
    """The id of a Slurm job that a file starts with; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except (FileNotFoundError, IndexError):
        return None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None


def describe(status: Status) -> str:
    """A status in a few lines of text."""
    lines = [f"{status.run}: {status.state} ({status.why})"]
    where = [
        f"job {status.job}" if status.job else None,
        f"restarts {status.restarts}" if status.restarts is not None else None,
        f"nodes {status.nodes}" if status.nodes else None,
        f"{status.ranks} rank{'s' * (status.ranks != 1)}, rank 0 on {status.host}" if status.ranks else None,
    ]
    if any(where):
        lines.append("  " + ", ".join(filter(None, where)))
    if status.step is not None:
        loss = "not finite" if status.loss is None else f"{status.loss:.4f}"
        speed = f"{status.tokens_per_second or 0:,.0f} tokens/s"
        of = "" if status.steps is None else f" of {status.steps}"
        lines.append(f"  step {status.step}{of}, loss {loss}, {speed}, {_ago(status.metrics_age)}")
    lines.append(
        f"  checkpoint {status.checkpoint}, {_ago(status.checkpoint_age)}" if status.checkpoint else "  no checkpoint"
    )
    if status.heartbeat_ages is not None:
        youngest, oldest = status.heartbeat_ages
        lines.append(f"  last heartbeats of the ranks: {youngest:.0f} to {oldest:.0f} s ago")
    return "\n".join(lines)


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
