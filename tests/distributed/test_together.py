"""Settings that change the forward pass or the engine, together: equal losses and digests, or refused by name.

masks × attention over rows or within documents × eager or compiled layers × ZeRO stages, without dropout, in fp32.
Reference: the same masks and attention, eager, ZeRO 1, one rank. By default a part that meets each setting with each
other one at least once; the complete product, also on two ranks, with --whole-matrix.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.config import ConfigError, MaskingConfig, RunConfig, run_deepspeed_config
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration, metrics, train_all
from tests.support.architectures import section
from tests.support.corpora import PAD_IS_1, make_corpus

STEPS = 8
# Relative difference of losses and norms.
BOUND = 1e-5
MASKS: dict[str, dict[str, Any]] = {
    "rates": {"rate": 0.15, "final_rate": 0.4},
    "segments": {
        "strategy": "fully_explored",
        "rate": 0.3,
        "fully_explored": {"placement": "same_batch", "segments_per_sequence": 2},
    },
}
if "late_layer" in MaskingConfig.model_fields:
    MASKS["late"] = {"rate": 0.3, "late_layer": 1, "mask_probability": 1.0, "random_probability": 0.0}
ATTENTION, COMPILED, STAGES = ("rows", "documents"), ("none", "layers"), ("zero0", "zero1", "zero2", "zero3")
# Masks, attention, what is compiled, stage.
Case = tuple[str, str, str, str]
WHOLE: list[Case] = [case for case in product(MASKS, ATTENTION, COMPILED, STAGES) if case[2:] != ("layers", "zero3")]


def part() -> list[Case]:
    """One compiled run for each kind of masks, since compiling takes seconds."""
    compiled = [(masks, "documents", "layers", STAGES[n % 3]) for n, masks in enumerate(MASKS)]
    eager = [
        (masks, "documents", "none", stage) for masks, stage in zip(MASKS, ("zero2", "zero3", "zero0"), strict=False)
    ]
    return [*compiled, *eager, ("rates", "documents", "none", "zero3")]


def values(folder: Path, corpus: Path, case: Case, ranks: int = 1) -> dict[str, Any]:
    masks, attention, how, stage = case
    found = configuration(
        folder / f"{'-'.join(case)}-{ranks}",
        corpus,
        steps=STEPS,
        data={"path": str(corpus), "attention": attention},
        masking=MASKS[masks],
        deepspeed=f"{stage}_fp32",
        evaluation={"every_steps": 0},
    )
    found["training"]["compile"] = how
    return {**found, "model": section("bert")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    return make_corpus(folder, rows=200, words=20, special=PAD_IS_1, padded_last_row=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The complete product as one test for each kind of masks and attention, so that a part of it can be run."""
    if "cases" in metafunc.fixturenames:
        groups = {"part": part()}
        if metafunc.config.getoption("--whole-matrix"):
            groups = {f"{m}-{a}": [case for case in WHOLE if case[:2] == (m, a)] for m, a in product(MASKS, ATTENTION)}
        metafunc.parametrize("cases", groups.values(), ids=groups)


def test_losses_are_equal(tmp_path: Path, corpus: Path, cases: list[Case], request: pytest.FixtureRequest) -> None:
    references = sorted({(masks, attention, "none", "zero1") for masks, attention, *_ in cases})
    for ranks in (1, 2) if request.config.getoption("--whole-matrix") else (1,):
        here = [*references, *(case for case in cases if case not in references)] if ranks == 1 else cases
        jobs = [(values(tmp_path, corpus, case, ranks), None) for case in here]
        assert run_ranks(train_all, ranks, jobs, timeout=3600) == [[None] * len(jobs)] * ranks
        for case in cases:
            lines = metrics(Path(values(tmp_path, corpus, case, ranks)["output_dir"]))
            reference = metrics(Path(values(tmp_path, corpus, (*case[:2], "none", "zero1"))["output_dir"]))
            assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
            for line, expected in zip(lines, reference, strict=True):
                for digest in ("data_digest", "mask_digest"):
                    assert line[digest] == expected[digest], case
                for figure in ("loss", "grad_norm"):
                    assert line[figure] == pytest.approx(expected[figure], rel=BOUND), (case, ranks)


def test_masks_and_attention_matter(tmp_path: Path, corpus: Path) -> None:
    """Otherwise the losses would be equal whatever is set."""
    cases: list[Case] = [(masks, attention, "none", "zero1") for masks, attention in product(MASKS, ATTENTION)]
    jobs = [(values(tmp_path, corpus, case), None) for case in cases]
    assert run_ranks(train_all, 1, jobs) == [[None] * len(jobs)]
    losses = [metrics(Path(job["output_dir"]))[-1]["loss"] for job, _ in jobs]
    assert len(set(losses)) == len(cases)


@pytest.mark.parametrize("masks", MASKS)
def test_compiled_layers_at_stage_3_are_refused(tmp_path: Path, corpus: Path, masks: str) -> None:
    config = RunConfig.model_validate(values(tmp_path, corpus, (masks, "documents", "layers", "zero3")))
    with pytest.raises(ConfigError, match=r"training\.compile needs ZeRO stage 0, 1 or 2"):
        run_deepspeed_config(config)
