"""Format of metrics.jsonl and trust_ratios.jsonl: names in their lines, reading, appending, truncating. Loads no torch.

A line is a JSON object: of a step, or of an event if it has the key `event`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import atomic_file
from maskvr_ds.runtime.files import append_line, keep_copy, parse_json

logger = logging.getLogger(__name__)

# Kind of the events that strategy `auto` writes for each measurement.
AUTO_EVENT = "auto"
# Kind of the event of the steps that measured its costs.
AUTO_COSTS_EVENT = "auto_costs"
# Kind of the event with the held-out figures before the first step.
HELD_OUT_EVENT = "held_out"
TRUST_RATIO_FIGURES = ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max")
UPDATE_RMS_FIGURES = ("update_rms_median", "update_rms_max")
# What monitor.health_every adds (training/health.py).
HEALTH = "health_"
# Metrics of MAPNet that are 1 for uniform masks (masking/proposer.py).
PROPOSAL_FIGURES = ("variance_ratio", "effective_sample_size", "proposal_entropy")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The step lines of a metrics.jsonl or trust_ratios.jsonl."""
    return [line for line in _read(path) if "event" not in line]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The event lines of a metrics.jsonl: checkpoints, rollbacks, divergence, measurements of `auto`."""
    return [line for line in _read(path) if "event" in line]


def append_event(path: Path, content: dict[str, Any]) -> None:
    """Append an event line to a metrics.jsonl that no MetricsLog has open."""
    append_line(path, json.dumps(content))


def _read(path: Path) -> list[dict[str, Any]]:
    """Complete lines; a last line truncated by a kill is ignored, damaged ones are skipped with a warning."""
    lines, damaged = _parse(path)
    if damaged:
        logger.warning("%s: %d damaged lines are skipped, the first is line %d", path, len(damaged), damaged[0])
    return lines


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines that are JSON objects with a step, and the numbers of the others."""
    if not path.is_file():
        return [], []
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            damaged.append(number)
    return lines, damaged


def keep_until(step: int, path: Path, rollbacks: Sequence[dict[str, Any]] = ()) -> None:
    """Drop the lines after `step`, or all lines if `step` is 0. Creates the file if missing.

    rollbacks: replaces the file's rollback events; each is placed after the lines of the step that it rolled back to.
    If lines are damaged, the file as it was is kept next to it.
    """
    lines, damaged = _parse(path)
    if damaged:
        copy = keep_copy(path)
        logger.warning("%s: %d damaged lines, the first is line %d; kept in %s", path, len(damaged), damaged[0], copy)
    lines = [line for line in lines if line["step"] <= step and line.get("event") != "rollback"] if step else []
    for rollback in reversed(rollbacks):
        index = sum(line["step"] <= rollback["to_step"] for line in lines)
        if index < len(lines) or rollback["to_step"] <= step:
            lines.insert(index, dict(rollback))
    with atomic_file(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
