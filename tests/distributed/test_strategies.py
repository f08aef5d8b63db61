"""Strategies in training on real gloo ranks: the same masks whatever the ranks, resumed = undisturbed."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

STEPS = 12
# Rows of 32 tokens at 0.2: k = 6, 5 segments; 60 sequences a step are 12 rows of 5 segments.
STRATEGIES: dict[str, dict[str, Any]] = {
    "same_batch": {"strategy": "fully_explored", "placement": "same_batch"},
    "frequency": {"strategy": "frequency", "final_rate": 0.1},
}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "changed rate": (
        {"strategy": "fully_explored", "final_rate": 0.1},
        "masking.final_rate 0.1: with strategy fully_explored the rate must not change the number of segments",
    ),
    "too many segments": (
        {"strategy": "fully_explored", "placement": "same_batch", "segments_per_sequence": 6},
        "masking.segments_per_sequence 6: a sequence of 32 tokens has 5 segments at rate 0.2",
    ),
    "does not divide": (
        {"strategy": "fully_explored", "placement": "same_batch", "rate": 0.13},
        r"batch.global_size 60 is not a multiple of 8, .* set it to 56 or 64, or masking.segments_per_sequence",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    make_corpus(folder / "corpus", rows=200, words=20, padded_last_row=True)
    make_corpus(folder / "corpus" / "held_out", rows=60, words=20, seed=1)
    return folder


def values(folder: Path, run: str, masking: dict[str, Any], **sections: Any) -> dict[str, Any]:
    sections = {"batch": {"global_size": 60, "micro_size": 10}, **sections}
    return configuration(
        folder / run, folder / "corpus", steps=STEPS, model=NO_DROPOUT, masking={"rate": 0.2, **masking}, **sections
    )


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Strategies on 1 and 2 ranks; on 2 also in two parts."""
    for world_size, micro in ((1, 30), (2, 10)):
        layout = {"global_size": 60, "micro_size": micro}
        jobs: list[tuple[dict[str, Any], str | None]] = [
            (values(folder, f"{name}-{world_size}", masking, batch=layout), None)
            for name, masking in STRATEGIES.items()
        ]
        if world_size == 2:
            for name, masking in STRATEGIES.items():
                whole = values(folder, f"{name}-parts", masking, batch=layout)
                part = {"steps": STEPS // 2, "schedule_steps": STEPS}
                jobs += [({**whole, "training": part}, None), (whole, "auto")]
        assert run_ranks(train_all, world_size, jobs, timeout=400) == [[None] * len(jobs)] * world_size
    other = values(folder, "frequency-parts", {"strategy": "whole_word"})
    faulty = [(values(folder, name, masking), None) for name, (masking, _) in FAULTS.items()]
    ((*said, refused),) = run_ranks(train_all, 1, [*faulty, (other, "auto")])
    for text, (_, expected) in zip(said, FAULTS.values(), strict=True):
        assert re.search(expected, str(text)), text
    assert re.search("belongs to another run: .*masking was .*'frequency'.* is .*'whole_word'", str(refused)), refused
    return folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_do_not_depend_on_ranks_or_layout(runs: Path, name: str) -> None:
    figures = ("step", "samples", "predictions", "data_digest", "mask_digest")
    one = column(runs / f"{name}-1", *figures)
    assert column(runs / f"{name}-2", *figures) == one
    assert len({line[-1] for line in one}) == STEPS
    losses = [column(runs / f"{name}-{world_size}", "loss") for world_size in (1, 2)]
    for (a,), (b,) in zip(*losses, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_resumed_is_undisturbed_and_loss_falls(runs: Path, name: str) -> None:
    figures = ("step", "loss", "grad_norm", "data_digest", "mask_digest")
    assert column(runs / f"{name}-parts", *figures) == column(runs / f"{name}-2", *figures)
    held_out = [line["held_out_loss"] for line in metrics(runs / f"{name}-2") if "held_out_loss" in line]
    assert held_out[-1] < held_out[0]


def test_a_rate_by_schedule_ends_at_the_final_one(runs: Path) -> None:
    predictions = [p for (p,) in column(runs / "frequency-1", "predictions")]
    assert predictions[0] > predictions[6] > predictions[-1]
    assert predictions[0] == pytest.approx(2 * predictions[-1], rel=0.02)


def test_faults_and_another_strategy_at_resume_are_refused(runs: Path) -> None:
    """The texts are compared in `runs`."""
    assert not any((runs / name).exists() for name in FAULTS)
