"""Format of metrics.jsonl and trust_ratios.jsonl: names in their lines, reading, appending, truncating. Loads no torch.

A line is a JSON object: of a step, or of an event if it has the key `event`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import atomic_file

# Kind of the events that strategy `auto` writes for each measurement.
AUTO_EVENT = "auto"
TRUST_RATIO_FIGURES = ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max")
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
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """Complete lines; a last line truncated by a kill is ignored."""
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(text) for text in texts if text.endswith("\n")]


def keep_until(step: int, path: Path, rollbacks: Sequence[dict[str, Any]] = ()) -> None:
    """Drop the lines after `step`, or all lines if `step` is 0. Creates the file if missing.

    rollbacks: replaces the file's rollback events; each is placed after the lines of the step that it rolled back to.
    """
    lines = [line for line in _read(path) if line["step"] <= step and line.get("event") != "rollback"] if step else []
    for rollback in reversed(rollbacks):
        index = sum(line["step"] <= rollback["to_step"] for line in lines)
        if index < len(lines) or rollback["to_step"] <= step:
            lines.insert(index, dict(rollback))
    with atomic_file(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
