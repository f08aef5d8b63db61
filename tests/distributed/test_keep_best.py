"""checkpoint.keep_best: the checkpoint with the lowest held-out loss outlives the newest ones, also across a resume."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from maskvr_ds.cli import main
from maskvr_ds.config import RunConfig
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, step_of
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, configuration, metrics, train_all
from tests.support.corpora import make_corpus

EVERY, STEPS = 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that get worse, as the rate rises beyond all measure: `sync`, and `async`, which is stopped half-way."""
    folder = tmp_path_factory.mktemp("best")
    make_corpus(folder / "corpus", rows=100, words=20)
    make_corpus(folder / "corpus" / "held_out", rows=30, words=20, seed=1)

    def values(name: str, steps: int, **checkpoint: Any) -> dict[str, Any]:
        return configuration(
            folder / name,
            folder / "corpus",
            steps=steps,
            model=NO_DROPOUT,
            optimizer={"name": "adam", "lr": 3.0},
            schedule={"warmup_steps": STEPS, "warmup_power": 6.0},
            training={"steps": steps, "schedule_steps": STEPS},
            divergence={"enabled": False},
            evaluation={"every_steps": 5, "rows": 30},
            checkpoint={"every_steps": EVERY, "keep_last": 2, "keep_best": True, **checkpoint},
        )

    jobs = [
        (values("sync", STEPS), None),
        (values("async", STEPS // 2, asynchronous=True), None),
        (values("async", STEPS, asynchronous=True), "auto"),
    ]
    assert run_ranks(train_all, 2, jobs) == [[None] * len(jobs)] * 2
    return folder


@pytest.mark.parametrize("name", ["sync", "async"])
def test_the_best_is_kept(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / name
    losses = {line["step"]: line["held_out_loss"] for line in metrics(run) if "held_out_loss" in line}
    assert set(losses) == {*range(EVERY, STEPS + 1, EVERY), 5, 10, 15}, "every checkpoint was evaluated"
    best = min(range(EVERY, STEPS + 1, EVERY), key=lambda step: (losses[step], step))
    assert best < STEPS - EVERY, "it would not be kept otherwise"
    assert [step_of(path) for path in complete_checkpoints(run)] == [best, STEPS - EVERY, STEPS]
    assert (run / "checkpoints" / "best").read_text() == f"step-{best:08d}\n"
    assert (run / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"
    for path in complete_checkpoints(run):
        held_out = checkpoints.verify(path).state.held_out
        assert held_out["held_out_loss"] == losses[step_of(path)]
        assert held_out.keys() == {"held_out_loss", "held_out_rows", "held_out_unigram_entropy"}
    assert main(["checkpoint", "list", str(run)]) == 0
    assert f"{losses[best]:.4f}" in capsys.readouterr().out.splitlines()[1]


def test_needs_held_out_losses(tmp_path: Path) -> None:
    values = configuration(tmp_path, tmp_path, steps=3, checkpoint={"keep_best": True}, evaluation={"every_steps": 0})
    with pytest.raises(ValidationError, match=r"checkpoint\.keep_best needs held-out losses"):
        RunConfig.model_validate({**values, "schedule": {}})
