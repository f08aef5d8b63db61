"""Masking strategies in training on real gloo ranks: masks do not depend on ranks and layout, resume is exact.

`--whole-matrix` runs all strategies on 1, 2 and 3 ranks with accumulation 1 and 4; by default STRATEGIES run, once per
number of ranks.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

STEPS, SIZE = 12, 120
# Rows of 32 tokens at rate 0.2: k = 6, 5 segments; 120 sequences per step are 24 rows of 5 segments.
STRATEGIES: dict[str, dict[str, Any]] = {
    "same_batch": {"strategy": "fully_explored", "fully_explored": {"placement": "same_batch"}},
    "frequency": {"strategy": "frequency", "final_rate": 0.1},
    "documents": {"strategy": "frequency", "frequency": {"document_power": 0.5, "estimator": "hajek"}},
    "whole_mask": {"strategy": "frequency", "frequency": {"sampler": "conditional_poisson", "estimator": "whole_mask"}},
}
# test_train.py trains with uniform masks too.
OTHERS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "whole_word": {"strategy": "whole_word"},
    "span": {"strategy": "span"},
    "across_epochs": {"strategy": "fully_explored"},
    "exact": {"strategy": "frequency", "frequency": {"sampler": "conditional_poisson"}},
}
# (ranks, accumulation)
LAYOUTS = [(1, 1), (2, 4), (3, 1)]
ALL_LAYOUTS = [(ranks, accumulation) for ranks in (1, 2, 3) for accumulation in (1, 4)]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "changed rate": (
        {"strategy": "fully_explored", "final_rate": 0.1},
        "masking.final_rate 0.1: with strategy fully_explored the rate must not change the number of segments",
    ),
    "too many segments": (
        {"strategy": "fully_explored", "fully_explored": {"placement": "same_batch", "segments_per_sequence": 6}},
        "segments_per_sequence 6 exceeds the maximum: a sequence of 32 tokens has 5 segments at rate 0.2",
    ),
    "does not divide": (
        {"strategy": "fully_explored", "fully_explored": {"placement": "same_batch"}, "rate": 0.13},
        r"batch.global_size 60 is not a multiple of 8, .* set it to 56 or 64, or masking.fully_explored.segments",
    ),
    "no probability": (
        {"strategy": "frequency", "frequency": {"estimator": "whole_mask"}},
        "estimator whole_mask needs the probability of a mask, which sampler pareto does not provide",
    ),
    "not its own": (
        {"frequency": {"estimator": "hajek"}},
        r"frequency \(estimator\) belongs to strategy frequency; strategy is uniform",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    make_corpus(folder / "corpus", rows=200, words=20, padded_last_row=True)
    make_corpus(folder / "corpus" / "held_out", rows=60, words=20, seed=1)
    return folder


def values(folder: Path, run: str, masking: dict[str, Any], micro: int = 10, **sections: Any) -> dict[str, Any]:
    sections = {"batch": {"global_size": SIZE, "micro_size": micro}, "evaluation": {"every_steps": 4}, **sections}
    return configuration(
        folder / run, folder / "corpus", steps=STEPS, model=NO_DROPOUT, masking={"rate": 0.2, **masking}, **sections
    )


@pytest.fixture(scope="module")
def layouts(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    return ALL_LAYOUTS if request.config.getoption("--whole-matrix") else LAYOUTS


@pytest.fixture(scope="module")
def strategies(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return {**STRATEGIES, **OTHERS} if request.config.getoption("--whole-matrix") else STRATEGIES


@pytest.fixture(scope="module")
def runs(folder: Path, layouts: list[tuple[int, int]], strategies: dict[str, dict[str, Any]]) -> Path:
    """All strategies in all layouts; on 2 ranks also in two parts. Then the faults and changes at resume."""
    for ranks in (1, 2, 3):
        jobs: list[tuple[dict[str, Any], str | None]] = []
        for name, masking in strategies.items():
            for _, accumulation in (layout for layout in layouts if layout[0] == ranks):
                micro = SIZE // ranks // accumulation
                jobs.append((values(folder, f"{name}-{ranks}-{accumulation}", masking, micro), None))
            if ranks == 2:
                both = values(folder, f"{name}-parts", masking, SIZE // 8)
                part = {"steps": STEPS // 2, "schedule_steps": STEPS}
                jobs += [({**both, "training": part}, None), (both, "auto")]
        assert run_ranks(train_all, ranks, jobs, timeout=900) == [[None] * len(jobs)] * ranks
    more = {"training": {"steps": STEPS + 2}}
    other = values(folder, "frequency-parts", {"strategy": "whole_word"}, **more)
    allowed = values(folder, "frequency-parts", {"strategy": "whole_word", "change_at_resume": True}, **more)
    same_batch = {**STRATEGIES["same_batch"], "change_at_resume": True}
    reordered = values(folder, "frequency-parts", same_batch, **more)
    half = {"global_size": 60, "micro_size": 20}
    faulty = [(values(folder, name, masking, batch=half), None) for name, (masking, _) in FAULTS.items()]
    jobs = [*faulty, (other, "auto"), (reordered, "auto"), (allowed, "auto")]
    ((*said, refused, refused_too, accepted),) = run_ranks(train_all, 1, jobs)
    for text, (_, expected) in zip(said, FAULTS.values(), strict=True):
        assert re.search(expected, str(text)), text
    difference = "belongs to another run: .*masking.strategy was 'frequency', is 'whole_word'"
    assert re.search(difference, str(refused)), refused
    assert "masking.change_at_resume=true lets masks differ" in str(refused)
    assert "segments of a row per global batch were 1, are all at rate 0.2" in str(refused_too)
    assert accepted is None
    return folder


def test_masks_do_not_depend_on_ranks_or_layout(
    runs: Path, layouts: list[tuple[int, int]], strategies: dict[str, dict[str, Any]]
) -> None:
    figures = ("step", "samples", "predictions", "data_digest", "mask_digest")
    for name in strategies:
        first, *others = (runs / f"{name}-{ranks}-{accumulation}" for ranks, accumulation in layouts)
        assert len({line[-1] for line in column(first, *figures)}) == STEPS
        for other in others:
            assert column(other, *figures) == column(first, *figures), other
            losses = zip(column(first, "loss"), column(other, "loss"), strict=True)
            assert all(a == pytest.approx(b, abs=1e-4) for (a,), (b,) in losses), other


def test_resume_is_exact_and_loss_falls(runs: Path, strategies: dict[str, dict[str, Any]]) -> None:
    figures = ("step", "loss", "grad_norm", "data_digest", "mask_digest")
    for name in strategies:
        assert column(runs / f"{name}-parts", *figures)[:STEPS] == column(runs / f"{name}-2-4", *figures)
        held_out = [line["held_out_loss"] for line in metrics(runs / f"{name}-2-4") if "held_out_loss" in line]
        assert held_out[-1] < held_out[0], name


def test_a_scheduled_rate_ends_at_the_final_rate(runs: Path) -> None:
    predictions = [p for (p,) in column(runs / "frequency-1-1", "predictions")]
    assert predictions[0] > predictions[6] > predictions[-1]
    assert predictions[0] == pytest.approx(2 * predictions[-1], rel=0.02)


def test_faults_and_another_strategy_at_resume_are_refused(runs: Path) -> None:
    """`runs` compares the errors."""
    assert not any((runs / name).exists() for name in FAULTS)


def test_a_strategy_may_change_at_resume_if_allowed(runs: Path) -> None:
    """Continues with the next rows, here on another number of ranks."""
    lines = column(runs / "frequency-parts", "step", "samples", "data_digest")
    assert [step for step, _, _ in lines] == list(range(1, STEPS + 3))
    assert lines[-1][1] == (STEPS + 2) * SIZE
