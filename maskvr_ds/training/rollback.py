"""Rollbacks after divergence: which checkpoint to return to, and which batches to skip from then on.

Collectives: `distributed.run_on_rank0`.
"""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import Loader
from maskvr_ds.reliability.divergence import DivergedError, Window
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import METRICS, ROLLBACKS
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import atomic_write, read_json, set_aside
from maskvr_ds.telemetry.metrics_file import append_event, read_events
from maskvr_ds.training.phases import RunPhase
from maskvr_ds.training.resume import ResumePoint

logger = logging.getLogger(__name__)


def merge(windows: list[Window]) -> list[Window]:
    """Sort windows [first, end) of batches and join those that overlap or touch."""
    merged: list[Window] = []
    for first, end in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def position(trained: int, windows: list[Window]) -> int:
    """Index of the batch that follows `trained` batches if `windows` are skipped."""
    for first, end in merge(windows):
        if first > trained:
            break
        trained += end - first
    return trained


def batches(loader: Loader, trained: int, windows: list[Window]) -> Generator[tuple[int, TokenBatch], None, None]:
    """Endless (index, batch) of the steps after the first `trained` steps of the phase; `windows` are skipped."""
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
    """All rollbacks of the run: phase, step, to_step, reason, passed_over (windows of skipped batches).

    restored: the checkpoint's `guard`, used if the run continues in another folder. If rollbacks.json is damaged, it is
    set aside and written anew with the events in metrics.jsonl, or with those that the checkpoint knows if these are
    more.
    """
    path, known = run / ROLLBACKS, restored.get("rollbacks", [])
    try:
        rollbacks = read_json(path)
    except FileNotFoundError:
        return known
    except (OSError, ValueError):
        rollbacks = None
    if isinstance(rollbacks, list) and all(_is_rollback(entry) for entry in rollbacks):
        return rollbacks
    events = [event for event in read_events(run / METRICS) if event["event"] == "rollback" and _is_rollback(event)]
    rollbacks = events if len(events) > len(known) else known
    kept = set_aside(path, "damaged-")
    write_rollbacks(run, rollbacks)
    logger.warning("%s: damaged, kept as %s; %d rollbacks are known from elsewhere", path, kept, len(rollbacks))
    return rollbacks


def _is_rollback(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    windows = entry.get("passed_over")
    return all(type(entry.get(key)) is int for key in ("phase", "step", "to_step")) and (
        isinstance(windows, list) and all(_is_window(window) for window in windows)
    )


def _is_window(window: Any) -> bool:
    return isinstance(window, list | tuple) and len(window) == 2 and all(type(end) is int for end in window)


def write_rollbacks(run: Path, rollbacks: list[dict[str, Any]]) -> None:
    atomic_write(run / ROLLBACKS, json.dumps(rollbacks, indent=1) + "\n")


def windows_of(rollbacks: list[dict[str, Any]], phase: int) -> list[Window]:
    """Windows of batches to skip in a phase."""
    return [(first, end) for entry in rollbacks if entry["phase"] == phase for first, end in entry["passed_over"]]


def may_return(step: int, returned_to: list[int], maximum: int) -> bool:
    """Whether the run may roll back to the checkpoint of `step`; returned_to: steps of all earlier rollbacks.

    `maximum` times, unless it comes after a later checkpoint that did not help: then once.
    """
    limit = min(1, maximum) if any(other > step for other in returned_to) else maximum
    return returned_to.count(step) < limit


def _explain(tried: Counter[int], step: int) -> str:
    """Why a run ends, and how to continue."""
    done = ", ".join(f"{n} rollback{'s' * (n > 1)} to step {to}" for to, n in tried.items()) or "no rollback"
    return (
        f"after {done} (divergence.max_rollbacks); skipping data did not help. Resume, from step {step}, with a lower "
        "optimizer.lr or more schedule.warmup_steps"
    )


def _restore_newest(run: Path, rollbacks: list[dict[str, Any]], step: int, refused: Collection[Path]) -> int:
    """Undo the rollbacks past checkpoints that still exist, since those to `step` did not help either: with other
    settings the run must not lose what it has trained. Returns the step from which it continues."""
    for folder in reversed(checkpoints.complete_checkpoints(run)):
        if checkpoints.step_of(folder) <= step:
            break
        if folder not in refused and not checkpoints.faults(folder):
            state = checkpoints.read_state(folder)
            known = len(state.guard.get("rollbacks", []))
            past = (n for n, entry in enumerate(rollbacks) if n >= known and entry["to_step"] < state.step)
            write_rollbacks(run, rollbacks[: next(past, len(rollbacks))])
            return state.step
    return step


def roll_back(phase: RunPhase, error: DivergedError, point: ResumePoint, fence: Fence) -> ResumePoint:
    """Choose the checkpoint to return to after a divergence and record the rollback. Collective: call on all ranks.

    point: where the phase was resumed from. Returns the run's newest intact checkpoint (`point` if it has not saved
    one); if the run has returned to it `divergence.max_rollbacks` times already, the newest earlier one to which it has
    not. Raises, on all ranks, FloatingPointError if there is none, FencedError if another job owns the run.
    """
    run, maximum = phase.config.output_dir, phase.config.divergence.max_rollbacks

    def decide() -> tuple[ResumePoint, dict[str, Any], str | None]:
        fence.check()
        newest = point.at(checkpoints.find(run, "auto", point.refused) or point.checkpoint)
        rollbacks = read_rollbacks(run, {} if newest.checkpoint is None else newest.checkpoint.state.guard)
        returned_to = [rollback["to_step"] for rollback in rollbacks]
        earlier = (point.at(c) for c in checkpoints.intact(run, refused=point.refused) if c.state.step < newest.step)
        chosen = next((p for p in itertools.chain([newest], earlier) if may_return(p.step, returned_to, maximum)), None)
        back_to = chosen or newest
        start = position(max(0, back_to.step - phase.first_step), windows_of(rollbacks, phase.index))
        entry = {
            "event": "rollback",
            "phase": phase.index,
            "step": error.step,
            "to_step": back_to.step,
            "reason": error.reason,
            # Batches trained before that checkpoint remain trained.
            "passed_over": [(max(first, start), end) for first, end in merge(error.windows) if end > start],
        }
        if chosen is not None:
            write_rollbacks(run, [*rollbacks, entry])
            return back_to, entry, None
        before = returned_to.count(back_to.step)
        append_event(run / METRICS, {**entry, "event": "diverged", "rollbacks": before, "passed_over": []})
        tried = Counter(step for step in returned_to if step >= back_to.step)
        return back_to, entry, _explain(tried, _restore_newest(run, rollbacks, back_to.step, point.refused))

    back_to, entry, ends = distributed.run_on_rank0(decide)
    if ends is not None:
        raise FloatingPointError(f"step {error.step}: {error.reason}, {ends}")
    skipped = ", ".join(f"{first} to {end - 1}" for first, end in entry["passed_over"]) or "none"
    message = "step %d: %s; rolled back to step %d, skipping batches: %s"
    logger.info(message, error.step, error.reason, back_to.step, skipped)
    return back_to
