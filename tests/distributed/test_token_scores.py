"""A training whose masks follow a table of token scores, on two ranks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import Corpus
from maskvr_ds.data.token_scores import write_token_scores
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, train_all
from tests.support.corpora import make_corpus


def test_a_run_with_token_scores(tmp_path: Path) -> None:
    """A moved file continues the run exactly; changed scores are another run."""
    corpus = make_corpus(tmp_path / "corpus", rows=100, words=20)
    manifest = Corpus(corpus).manifest
    scores = np.linspace(0.1, 2, manifest.vocab_size)
    for name, table in (("scores", scores), ("changed", scores[::-1])):
        write_token_scores(tmp_path / f"{name}.json", table, manifest.tokenizer_sha256, {})
    shutil.copy(tmp_path / "scores.json", tmp_path / "moved.json")

    def run(folder: str, name: str | None, steps: int) -> dict[str, Any]:
        masking = {"strategy": "frequency", "frequency": {"scores": str(tmp_path / f"{name}.json")} if name else {}}
        values = configuration(
            tmp_path / folder, corpus, steps=steps, model=NO_DROPOUT, masking=masking, schedule={"warmup_steps": 1},
            evaluation={"every_steps": 0},
        )  # fmt: skip
        return values | {"training": {"steps": steps, "schedule_steps": 4}}

    jobs = [
        (run("whole", "scores", 4), None),
        (run("counted", None, 4), None),
        (run("parts", "scores", 2), None),
        (run("parts", "changed", 4), "auto"),
        (run("parts", "moved", 4), "auto"),
    ]
    for *complete, refused, resumed in run_ranks(train_all, 2, jobs):
        assert complete == [None] * 3
        assert "belongs to another run" in str(refused)
        assert "masking.frequency.scores" in str(refused)
        assert resumed is None
    figures = ("step", "loss", "data_digest", "mask_digest")
    assert column(tmp_path / "parts", *figures) == column(tmp_path / "whole", *figures)
    assert column(tmp_path / "counted", "data_digest") == column(tmp_path / "whole", "data_digest")
    assert column(tmp_path / "counted", "mask_digest") != column(tmp_path / "whole", "mask_digest")
