"""monitor.health_every: figures in metrics.jsonl, nothing else changes, under ZeRO 3 on two ranks and at resume too."""

from pathlib import Path

import pytest

from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import HEALTH, read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration, train_all
from tests.support.corpora import make_corpus

# Times differ between runs.
_TIMES = ("tokens_per_second", "step_seconds", "model_tflops_per_rank")


def lines(run: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in read_lines(run / METRICS)]


@pytest.mark.parametrize(("ranks", "deepspeed"), [(1, "zero1_fp32"), (2, "zero3_fp32")])
def test_training_is_the_same_with_and_without(tmp_path: Path, ranks: int, deepspeed: str) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows=60)
    jobs: list[tuple[dict[str, object], str | None]] = []
    for name, every, steps in (("off", 0, 6), ("on", 2, 6), ("resumed", 2, 3), ("resumed", 2, 6)):
        monitor = {"tensorboard": False, "health_every": every}
        values = configuration(
            tmp_path / name, corpus, steps=steps, monitor=monitor, deepspeed=deepspeed, evaluation={"every_steps": 0}
        )
        values["training"]["schedule_steps"] = 6
        jobs.append((values, "auto" if jobs and jobs[-1][0]["output_dir"] == values["output_dir"] else None))
    assert run_ranks(train_all, ranks, jobs) == [[None] * 4] * ranks
    off, on, resumed = (lines(tmp_path / name) for name in ("off", "on", "resumed"))
    measured = {line["step"]: {k: v for k, v in line.items() if k.startswith(HEALTH)} for line in on}
    assert [step for step, figures in measured.items() if figures] == [2, 4, 6]
    assert measured[2].keys() == {
        *(f"{HEALTH}activation_{what}" for what in ("first", "last", "spread")),
        *(f"{HEALTH}{what}" for what in ("attention_logit", "attention_entropy", "dead_units")),
    }
    assert 0 < measured[2][f"{HEALTH}attention_entropy"] <= 1.0001  # type: ignore[operator]
    assert [{k: v for k, v in line.items() if not k.startswith(HEALTH)} for line in on] == off
    assert resumed == on
