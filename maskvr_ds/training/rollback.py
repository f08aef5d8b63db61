"""Rollbacks after a divergence: where to resume, which batches to skip."""

import itertools
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from maskvr_ds.config import RunConfig
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import Loader
from maskvr_ds.reliability.divergence import DivergedError, Window
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import METRICS, ROLLBACKS
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.distributed import say
from maskvr_ds.telemetry.metrics_file import append_event
from maskvr_ds.training.phases import RunPhase


def merge(windows: list[Window]) -> list[Window]:
    """Windows [first, end) of batches, ascending, those that touch as one."""
    merged: list[Window] = []
    for first, end in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def position(trained: int, windows: list[Window]) -> int:
    """Number of the batch that comes after `trained` batches, with `windows` passed over."""
    for first, end in merge(windows):
        if first > trained:
            break
        trained += end - first
    return trained


def batches(loader: Loader, trained: int, windows: list[Window]) -> Generator[tuple[int, TokenBatch], None, None]:
    """Endless: (number, batch) of each step after `trained` steps of the phase, with `windows` passed over."""
    number = position(trained, windows)
    for end, after in [*(w for w in merge(windows) if w[0] > number), (None, None)]:
        reader = loader.batches(number * loader.global_size)
        count = None if end is None else end - number
        try:
            yield from enumerate(itertools.islice(reader, count), number)
        finally:
            reader.close()
        number = after or 0


def read_rollbacks(run: Path, restored: dict[str, Any]) -> list[dict[str, Any]]:
    """All roll-backs of the run: phase, step, to_step, reason, passed_over. restored: `guard` of the checkpoint, for a
    run that goes on in another folder."""
    path = run / ROLLBACKS
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return restored.get("rollbacks", [])


def write_rollbacks(run: Path, rollbacks: list[dict[str, Any]]) -> None:
    temporary = run / f".{ROLLBACKS}.partial"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(rollbacks, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / ROLLBACKS)


def windows_of(rollbacks: list[dict[str, Any]], phase: int) -> list[Window]:
    return [(first, end) for entry in rollbacks if entry["phase"] == phase for first, end in entry["passed_over"]]


def roll_back(
    config: RunConfig, phase: RunPhase, error: DivergedError, latest: Path | None, fence: Fence
) -> Path | None:
    """After a divergence → the checkpoint to go on from (None: the run's beginning), the roll-back on record. Every
    rank calls.

    latest: what the phase had gone on from. Raises FloatingPointError, on every rank alike, where the run has gone back
    to that checkpoint as often as it may, FencedError where another job has taken the run.
    """
    run = config.output_dir

    def decide() -> tuple[Path | None, dict[str, Any], bool]:
        fence.check()
        back_to = checkpoints.find(run, "auto") or latest
        state = None if back_to is None else checkpoints.read_state(back_to)
        rollbacks = read_rollbacks(run, {} if state is None else state.guard)
        to_step = 0 if state is None else state.step
        begin = position(max(0, to_step - phase.first_step), windows_of(rollbacks, phase.index))
        entry = {
            "event": "rollback",
            "phase": phase.index,
            "step": error.step,
            "to_step": to_step,
            "reason": error.reason,
            # What was trained before that checkpoint stays trained.
            "passed_over": [(max(first, begin), end) for first, end in merge(error.windows) if end > begin],
        }
        so_far = sum(before["to_step"] == to_step for before in rollbacks)
        allowed = so_far < config.divergence.max_rollbacks
        if allowed:
            write_rollbacks(run, [*rollbacks, entry])
        else:
            append_event(run / METRICS, {**entry, "event": "diverged", "rollbacks": so_far, "passed_over": []})
        return back_to, entry, allowed

    back_to, entry, allowed = distributed.run_on_rank0(decide)
    if not allowed:
        raise FloatingPointError(
            f"step {error.step}: {error.reason}, and the run has gone back to step {entry['to_step']} "
            f"{config.divergence.max_rollbacks} times (divergence.max_rollbacks); other data did not help. Resume from "
            "that checkpoint with a lower optimizer.lr or more schedule.warmup_steps"
        )
    passed_over = ", ".join(f"{first} to {end - 1}" for first, end in entry["passed_over"]) or "none"
    say(f"step {error.step}: {error.reason}; back to step {entry['to_step']}, batches passed over: {passed_over}")
    return back_to
