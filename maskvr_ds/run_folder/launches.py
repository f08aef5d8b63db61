"""launches.jsonl of a run: one line each time ranks start to train a phase, for the model card. Loads no torch.

A line has `time` (UTC), `command`, `ranks`, `ranks_per_host`, `device`, `versions` and `corpora` (`CorpusCounts`).
"""

import json
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from maskvr_ds.run_folder.layout import LAUNCHES
from maskvr_ds.runtime.files import append_line, parse_json

_PACKAGES = ("maskvr_ds", "torch", "deepspeed", "transformers")
# Programs that a rank may be: the module of the ranks, the command of a single rank.
_PROGRAMS = ("train.py", "maskvr", "main.py", "__main__.py")
_KEYS = {"time", "command", "ranks", "ranks_per_host", "device", "versions", "corpora"}


class CorpusCounts(TypedDict):
    """One corpus of a launch. sources: name -> documents; empty if the manifest does not list them."""

    path: str
    weight: float
    rows: int
    tokens: int
    documents: int
    sequence_length: int
    tokenizer_sha256: str
    vocab_size: int
    sources: dict[str, int]


def append_launch(run: Path, **content: Any) -> None:
    """Append a line with `content`, the time, the command of this process, and the versions of the packages."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command(sys.argv), **content}
    line["versions"] = _versions()
    append_line(run / LAUNCHES, json.dumps(line, ensure_ascii=False))


def read_launches(run: Path) -> list[dict[str, Any]]:
    """The lines of launches.jsonl, oldest first; none of a run of an earlier version. Lines that are damaged, or lack a
    key, are skipped."""
    path = run / LAUNCHES
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= _KEYS:
            lines.append(line)
    return lines


def command(argv: list[str]) -> str | None:
    """`maskvr train …` with the options of a rank; None if the process is another program that trains.

    Without the options that launchers add: the number of the rank, and the token of the job.
    """
    if Path(argv[0]).name not in _PROGRAMS:
        return None
    words = [word for word in argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    if "--launch" in words:
        at = words.index("--launch")
        del words[at : at + 2]
    return shlex.join(["maskvr", "train", *(words[1:] if words[:1] == ["train"] else words)])


def changed_versions(run: Path) -> str:
    """What differs between the installed packages and those that last trained the run, in words; empty if nothing."""
    launches, now = read_launches(run), _versions()
    if not launches:
        return "those that trained it are not known"
    was = launches[-1]["versions"]
    return ", ".join(f"{n} was {was.get(n)}, is {now.get(n)}" for n in _PACKAGES if was.get(n) != now.get(n))


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES if _installed(name)}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
