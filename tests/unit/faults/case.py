"""A fault: what is wrong, the command that meets it, what the command prints and its status.

The tests run every fault (test_faults.py), and the page docs/reference/faults.md is made of the same values (page.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Fault:
    """what: the fault, in words. command: program and options as typed, without `python -m`; relative to a folder that
    holds `texts/`, `tok`, `corpus`, `run.yaml` and its finished run `run`. said: part of standard error or output; `…`
    matches any text within the line. done: what happens, if not the usual. status: exit status.

    prepare: makes the fault in that folder. may_change: files or folders there that the command changes. own_process:
    run the command in a process of its own, as one that starts ranks or sets up logging.
    """

    what: str
    command: str
    said: str
    done: str = ""
    status: int = 1
    prepare: Prepare = field(default=lambda folder: None, compare=False)
    may_change: tuple[str, ...] = ()
    own_process: bool = False

    def pattern(self) -> str:
        return ".*".join(re.escape(part) for part in self.said.split("…"))


def writes(name: str, content: str | bytes) -> Prepare:
    """Write one file, folders included."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def changes(name: str, old: str, new: str) -> Prepare:
    """Replace a piece of text that occurs in a file."""

    def prepare(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text, f"{name}: {old!r} not found"
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return prepare


def flips(name: str, place: int = -100) -> Prepare:
    """Flip one bit of a file, at a place counted from its start or end."""

    def prepare(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return prepare


def cuts(name: str, removed: int = 1) -> Prepare:
    """Remove the last bytes of a file."""

    def prepare(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-removed])

    return prepare


def removes(name: str) -> Prepare:
    return lambda folder: (folder / name).unlink()
