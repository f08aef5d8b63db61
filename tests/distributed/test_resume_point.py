"""A resume reads and hashes the checkpoint once, on rank 0; the other ranks decide by what it broadcasts."""

import sys
from pathlib import Path
from typing import Any

from maskvr_ds.run_folder.layout import MANIFEST, SAVING
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, configuration, train_all
from tests.support.corpora import make_corpus


def resume_and_count(job: tuple[dict[str, Any], str | None], seen: list[int]) -> tuple[str | None, int]:
    """On a rank: train; returns the error and how often a checkpoint.json was opened for reading before a save."""
    saving: list[str] = []

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(f"/{MANIFEST}") and arguments[1] in ("r", "rb"):
            # A save reads back what it has written, and looks at older checkpoints.
            if SAVING in (path := str(arguments[0])):
                saving.append(path)
            if not saving:
                seen.append(1)

    sys.addaudithook(count)
    (error,) = train_all([job])
    return error, len(seen)


def test_checkpoint_json_is_read_once(tmp_path: Path) -> None:
    sections = {
        "model": NO_DROPOUT,
        "evaluation": {"every_steps": 0},
        "deepspeed": "zero2_fp32",
        "schedule": {"warmup_steps": 0},
    }
    corpus = make_corpus(tmp_path / "corpus", rows=60, length=16)
    values, more = (configuration(tmp_path / "run", corpus, steps=steps, **sections) for steps in (2, 3))
    values["training"] = {"steps": 2, "schedule_steps": 3}
    assert run_ranks(train_all, 2, [(values, None)]) == [[None], [None]]
    assert run_ranks(resume_and_count, 2, (more, "auto"), []) == [(None, 1), (None, 0)]
