"""Whether a folder is a run's: only what a run has marked may be overwritten by one. Loads no torch.

A run writes owner.json before anything else (fence.py). Runs of earlier versions may lack it; they have a config.yaml
with the number of its schema, or a checkpoint. A folder of one's own may contain a config.yaml, a metrics.jsonl, or
a folder heartbeats/: they mark nothing.
"""

import json
import re
from pathlib import Path

from maskvr_ds.run_folder.checkpoints import is_started
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONFIG, MANIFEST, OWNER

# First line of config.yaml as a run writes it.
_SCHEMA = re.compile(rb"schema: \d{1,3}\n")
_OF_OWNER = {"epoch", "token", "host", "pid"}
# An owner.json has a few hundred bytes.
_MAX_OWNER = 1 << 16


def is_run(folder: Path) -> bool:
    """Whether a run has marked the folder."""
    return _has_owner(folder) or _has_config(folder) or _has_checkpoint(folder)


def output_fault(folder: Path, resume: str | None) -> str | None:
    """Why a run must not write to output_dir `folder`, as a message; None if it may.

    It may if there is no such folder, if the folder holds nothing but what is there before a run starts
    (`checkpoints.is_started`), or, with `resume`, if it is a run's.
    """
    if (fault := place_fault(folder)) is not None:
        return fault
    if not is_started(folder):
        return None
    if not is_run(folder):
        return (
            f"output_dir {folder}: not empty and not a run's folder (neither {OWNER} nor {CHECKPOINTS}/ of a run is "
            "there), so its files are not overwritten; choose a new folder"
        )
    if resume is None:
        return f"output_dir {folder} is not empty; add --resume auto to continue, or choose another folder"
    return None


def place_fault(folder: Path) -> str | None:
    """Why there cannot be an output_dir `folder`, whatever it holds, as a message; None if there can."""
    try:
        first = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    except OSError as error:  # a name that is too long, a folder that may not be searched
        return f"output_dir {str(folder)[:200]}: {error.strerror}; choose another"
    except StopIteration:
        return None
    if first.is_dir():
        return None
    what = "is a link that leads nowhere" if first.is_symlink() and not first.exists() else "is a file"
    return f"output_dir {folder}: {f'{first} ' if first != folder else ''}{what}, a folder expected; choose another"


def _has_owner(folder: Path) -> bool:
    path = folder / OWNER
    try:
        content = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= _MAX_OWNER else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= _OF_OWNER


def _has_config(folder: Path) -> bool:
    path = folder / CONFIG
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return _SCHEMA.match(file.read(32)) is not None
    except OSError:
        return False


def _has_checkpoint(folder: Path) -> bool:
    return any(path.is_file() for path in (folder / CHECKPOINTS).glob(f"step-*/{MANIFEST}"))
