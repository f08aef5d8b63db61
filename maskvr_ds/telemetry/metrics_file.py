"""Files of metrics: their lines and events, read and appended."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVENT = "auto"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps, in a metrics.jsonl or trust_ratios.jsonl."""
    return [line for line in _read(path) if "event" not in line]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The other lines of a metrics.jsonl: checkpoints written, roll-backs, divergence."""
    return [line for line in _read(path) if "event" in line]


def append_event(path: Path, content: dict[str, Any]) -> None:
    """`MetricsLog.event` where no log is open."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(text) for text in texts if text.endswith("\n")]


def keep_until(step: int, path: Path, rollbacks: Sequence[dict[str, Any]] = ()) -> None:
    """Drop the lines of later steps; all of them where `step` is 0. The file is there afterwards.

    rollbacks: exactly these stand in it then, each behind the lines of the step that it went back to.
    """
    lines = [line for line in _read(path) if line["step"] <= step and line.get("event") != "rollback"] if step else []
    for rollback in reversed(rollbacks):
        behind = sum(line["step"] <= rollback["to_step"] for line in lines)
        if behind < len(lines) or rollback["to_step"] <= step:
            lines.insert(behind, dict(rollback))
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


TRUST_RATIO_FIGURES = ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max")


# Of MAPNet's telemetry, what is 1 for uniform masks (proposer.py).
PROPOSAL_FIGURES = ("variance_ratio", "effective_sample_size", "proposal_entropy")
