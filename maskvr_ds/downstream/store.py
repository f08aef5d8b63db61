"""Finished runs of an evaluation: one JSON file each, written atomically, found again by everything that decides them.

OUTPUT/
    runs/TASK/*.json    a run: `identity`, and what came of it
    intermediate/       encoders fine-tuned on an intermediate task
    results.json        all tasks and rows of the last command
    results.md          the same as tables
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskvr_ds.downstream.tasks import TaskError
from maskvr_ds.runtime.files import atomic_write, keep_copy, read_json

RUNS, RESULTS, TABLES, INTERMEDIATE = "runs", "results.json", "results.md", "intermediate"
# Raised if the same identity would lead to another result.
FORMAT = 1

logger = logging.getLogger(__name__)
Content = dict[str, Any]


class RunStore:
    """The folder of an evaluation. Raises TaskError if it is of something else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / RUNS).is_dir())):
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
        name = re.sub(r"[^\w.-]+", "_", label)[-80:]
        # Perhaps under another label: the same model in another folder.
        return next(iter(sorted(folder.glob(f"*-{digest}.json"))), folder / f"{name}-{digest}.json")


def _digest(identity: Content) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
