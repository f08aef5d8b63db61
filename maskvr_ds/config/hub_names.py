"""model.initialize_from by name on a hub: resolved to a local folder once, before the configuration is validated.

Callers are the command that a user runs (on a login node, before ranks start) and rank 0; the other ranks are given the
folder. config.yaml thus has the folder of one commit, which does not change when a branch does. Loads no torch.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.hub import MODEL_FILES, local_folder, parse_name, snapshot_name
from maskvr_ds.config.loading import assign, read_yaml
from maskvr_ds.run_folder.layout import CONFIG

logger = logging.getLogger(__name__)


def with_local_model(config: str | Path, assignments: Sequence[str], files: tuple[str, ...] = MODEL_FILES) -> list[str]:
    """`assignments`, followed by the folder if model.initialize_from is a name. Call in one process. files: what is
    needed of the model.

    A run that has resolved the name before keeps its commit, without asking the hub, unless the name has another one. A
    text that a run was started with is left to it: it may be a folder that is gone, which a resume does not need.
    Raises ConfigError for an invalid configuration, HubError if the name cannot be resolved.
    """
    values = read_yaml(config)
    for assignment in assignments:
        assign(values, assignment)
    given = _initial(values)
    if given is None or (parsed := parse_name(given)) is None:
        if given is not None:
            local_folder(given, files, "model.initialize_from", logger)
        return list(assignments)
    stored = _initial_of_run(values.get("output_dir"))
    if stored == given:
        return list(assignments)
    folder = stored if stored is not None and _is_of(stored, *parsed) else None
    folder = folder or str(local_folder(given, files, "model.initialize_from", logger))
    return [*assignments, f"model.initialize_from={json.dumps(folder)}"]


def _initial(values: dict[str, Any]) -> str | None:
    model = values.get("model")
    given = model.get("initialize_from") if isinstance(model, dict) else None
    return given if isinstance(given, str) and given else None


def _initial_of_run(output: Any) -> str | None:
    """What config.yaml of a run in folder `output` has; None if there is none."""
    path = Path(output) / CONFIG if isinstance(output, str) and output else None
    if path is None or not path.is_file():
        return None
    try:
        return _initial(read_yaml(path))
    except ValueError:  # reported where the run is resumed
        return None


def _is_of(folder: str, name: str, revision: str | None) -> bool:
    """Whether a folder is a snapshot of the model; of this revision, if that is a commit. Branches may have moved."""
    found = snapshot_name(folder)
    if found is None or found[0] != name:
        return False
    return revision is None or len(revision) != len(found[1]) or revision == found[1]
