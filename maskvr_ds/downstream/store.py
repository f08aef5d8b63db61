"""Finished runs of an evaluation: one JSON file each, written atomically, found again by everything that decides them.

OUTPUT/
    runs/TASK/*.json    a run: `identity`, and what came of it
    intermediate/       encoders fine-tuned on an intermediate task
    results.json        all tasks and rows of the last command
    results.md          the same as tables
    .lock               locked by the command that writes to the folder
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.files import lock_file
from maskvr_ds.downstream.tasks import TASKS, TaskError
from maskvr_ds.runtime.files import atomic_write, keep_copy, read_json

RUNS, RESULTS, TABLES, INTERMEDIATE = "runs", "results.json", "results.md", "intermediate"
FEW_SHOT = "few_shot"
_LOCK = ".lock"
# Raised if the same identity would lead to another result.
FORMAT = 1

logger = logging.getLogger(__name__)
Content = dict[str, Any]


class RunStore:
    """The folder of an evaluation. Raises TaskError if it is of something else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not (folder.is_dir() and _is_free(folder)):
            raise TaskError(f"--output {folder}: exists and is no folder of an evaluation; choose another")
        (folder / RUNS).mkdir(parents=True, exist_ok=True)

    def get(
        self, label: str, identity: Content, make: Callable[[], Content], *, repeat: bool = False
    ) -> tuple[Content, bool]:
        """The stored run of this identity, or the one that `make` computes, which is stored; and whether it was stored.

        label: for people, the start of the name of a new file. repeat: compute it although it is
        stored. A damaged file is kept as a copy and computed again.
        """
        identity = {"format": FORMAT, **identity}
        path = self._path(identity, label)
        if path.exists() and not repeat:
            try:
                content = read_json(path)
                if content["identity"] == identity:
                    return content, True
                fault = "is of another run"
            except (ValueError, TypeError, KeyError) as error:
                fault = f"is damaged ({error})"
            logger.warning("%s: %s; the run is repeated, the file kept as %s", path, fault, keep_copy(path).name)
        content = {"identity": identity, **make()}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(content, allow_nan=False) + "\n")
        return content, False

    def find(self, identity: Content) -> Content | None:
        """The stored run of this identity; None if there is none, or it is damaged."""
        identity = {"format": FORMAT, **identity}
        try:
            content = read_json(self._path(identity, "none"))
            return content if content["identity"] == identity else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def intermediate(self, identity: Content) -> Path:
        """The folder of an encoder that a run of this identity has trained."""
        return self.folder / INTERMEDIATE / f"{identity['task']}-{_digest({'format': FORMAT, **identity})}"

    def _path(self, identity: Content, label: str) -> Path:
        digest = _digest(identity)
        folder = self.folder / RUNS / identity["task"]
        # Bytes: file systems limit those of a name to 255.
        name = re.sub(r"[^\w.-]+", "_", label).encode()[-80:].decode(errors="ignore")
        # Perhaps under another label: the same model in another folder.
        return next(iter(sorted(folder.glob(f"*-{digest}.json"))), folder / f"{name}-{digest}.json")


@contextmanager
def opened(folder: Path) -> Iterator[RunStore]:
    """The store of a command, for itself alone: two would compute the same runs and replace each other's tables.

    Raises TaskError if another command has it, or the folder is of something else.
    """
    store = RunStore(folder)
    try:
        lock = lock_file(folder / _LOCK)
    except BlockingIOError:
        raise TaskError(
            f"--output {folder}: another command is writing to it; wait for it, or choose another. If there is none, "
            f"for its machine has failed, delete {folder / _LOCK}"
        ) from None
    with lock:
        yield store


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, or of an evaluation: training runs are often in a folder `runs` as well."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if RUNS not in names or not (folder / RUNS).is_dir():
        return not names
    tasks = {path.name for path in (folder / RUNS).iterdir() if not path.name.startswith(".")}
    return tasks <= {*TASKS, FEW_SHOT} if tasks else names == {RUNS}


def _digest(identity: Content) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
