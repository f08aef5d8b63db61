"""A cooldown that branches off a checkpoint of a run at a constant rate is the run with its schedule from the start."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.config import ScheduleConfig
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.training.schedule import learning_rate
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, train_all
from tests.support.corpora import make_corpus

BRANCH_AT, COOLDOWN = 6, 4
END = BRANCH_AT + COOLDOWN
FIGURES = ("step", "lr", "loss", "grad_norm", "data_digest", "mask_digest")


def test_a_branch_equals_the_whole_run(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows=100, words=20)

    def values(name: str, steps: int, **schedule: Any) -> dict[str, Any]:
        return configuration(
            tmp_path / name,
            corpus,
            steps=steps,
            schedule={"warmup_steps": 3, **schedule},
            evaluation={"every_steps": 0},
            checkpoint={"every_steps": BRANCH_AT, "keep_every_steps": BRANCH_AT},
            deepspeed="zero2_fp32",
        )

    wsd = {"decay": "1-sqrt", "cooldown_steps": COOLDOWN}
    checkpoint = tmp_path / "main" / "checkpoints" / f"step-{BRANCH_AT:08d}"
    jobs = [
        (values("main", 14, decay="constant"), None),
        (values("branch", END, **wsd), str(checkpoint)),
        (values("whole", END, **wsd), None),
        (values("main", 16, decay="constant"), "auto"),
    ]
    assert run_ranks(train_all, 2, jobs) == [[None] * len(jobs)] * 2
    whole = column(tmp_path / "whole", *FIGURES)
    assert column(tmp_path / "branch", *FIGURES) == whole[BRANCH_AT:]
    assert column(tmp_path / "main", *FIGURES)[: BRANCH_AT + 1] == whole[: BRANCH_AT + 1], (
        "the peak is still that step's"
    )
    expected = [
        learning_rate(step, ScheduleConfig(warmup_steps=3, **wsd), peak=0.03, total_steps=END) for step in range(END)
    ]
    assert [lr for (lr,) in column(tmp_path / "whole", "lr")] == pytest.approx(expected)
    ours, theirs = (read_weights(complete_checkpoints(tmp_path / name)[-1]) for name in ("branch", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # The main run was not disturbed.
    assert [lr for (lr,) in column(tmp_path / "main", "lr")] == pytest.approx([0.01, 0.02, *[0.03] * 14])
