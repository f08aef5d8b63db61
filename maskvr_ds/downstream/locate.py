"""What a MODEL of the command line is: a run, a checkpoint, a folder of transformers, or a name on a hub. No torch."""

import logging
from pathlib import Path

from data_pipeline.hub import MODEL_FILES, local_folder
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.layout import MANIFEST

logger = logging.getLogger(__name__)


def locate(text: str) -> tuple[Path, bool]:
    """The folder of a MODEL, and whether it is a run or a checkpoint. Call in one process.

    A name is fetched (data_pipeline/hub.py), unless there is a folder of that name. An absolute path is returned as it
    is. Raises HubError if there is neither a folder nor a model of that name.
    """
    folder = Path(text)
    if (folder / MANIFEST).is_file() or checkpoints.complete_checkpoints(folder):
        return folder, True
    return local_folder(text, MODEL_FILES, "MODEL", logger), False
