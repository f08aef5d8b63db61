"""A large global batch by accumulation: the same run on 1 and 2 ranks, in the memory of one micro-batch.

2,048 sequences per step by default; 32,768 with `--whole-matrix` (ten minutes). `-s` prints the figures.
"""

import resource
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration
from tests.support.corpora import make_corpus

L, MICRO, STEPS = 32, 64, 3
# Bytes per sequence of a rank's batch: tokens, masked tokens, positions, labels and weights, while masks are drawn.
PER_SEQUENCE = 4096
# Bytes by which the peak differs without a reason of the batch (up to 25 MiB); kept activations would take 18 MiB per
# micro-batch.
ALLOCATOR = 32 << 20


def train_measured(values: dict[str, Any], resume: str | None) -> dict[str, Any]:
    """On a rank: train; returns the seconds of each step by part, and the growth of the peak memory after step 1."""
    import torch

    from maskvr_ds import train
    from maskvr_ds.benchmarks.step_parts import StepParts, Traffic, recording
    from maskvr_ds.config import RunConfig
    from maskvr_ds.runtime import distributed

    distributed.initialize()
    train.plot_loss = lambda *_: None
    parts = StepParts(torch.device("cpu"))
    with recording(parts, Traffic(), counted_step=-1):
        train.train(RunConfig.model_validate(values), resume)
    seconds = [{part: elapsed for part, (elapsed, _) in step.items()} for step in parts.seconds()]
    # Of this process, in KiB.
    return {"parts": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> int:
    return 32_768 if request.config.getoption("--whole-matrix") else 2_048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large_batch")
    make_corpus(path / "corpus", rows=40_000, length=L, shard_rows=10_000)
    return path


def trained(folder: Path, name: str, ranks: int, size: int, *, steps: int = STEPS, resume: str | None = None) -> Any:
    values = configuration(
        folder / name,
        folder / "corpus",
        steps=steps,
        model={"preset": "bert-tiny"},
        batch={"global_size": size, "micro_size": MICRO},
        training={"steps": steps, "schedule_steps": STEPS},
        schedule={"warmup_steps": 1},
        evaluation={"every_steps": 0},
    )
    values["model"] = {"preset": "bert-tiny", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return run_ranks(train_measured, ranks, values, resume, timeout=3000)


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_lines(folder / name / METRICS)


def test_the_same_run_on_1_and_2_ranks_in_constant_memory(folder: Path, size: int) -> None:
    small = trained(folder, "small", 1, size // 8)
    results = {ranks: trained(folder, f"{ranks}_ranks", ranks, size) for ranks in (1, 2)}
    one, two = (lines_of(folder, f"{ranks}_ranks") for ranks in (1, 2))
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert (a["data_digest"], a["mask_digest"]) == (b["data_digest"], b["mask_digest"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    growth = results[1][0]["peak"] - small[0]["peak"]
    print(f"{size} against {size // 8} sequences per step: peak memory grows by {growth / 2**20:.0f} MiB")
    assert growth < PER_SEQUENCE * size + ALLOCATOR
    for ranks, measured in results.items():
        for line, parts in zip(lines_of(folder, f"{ranks}_ranks"), measured[0]["parts"], strict=False):
            shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
            print(
                f"{ranks} ranks, step {line['step']}: {line['step_seconds']:.2f} s = {shown}; loss {line['loss']:.6f}"
            )
            assert sum(parts.values()) == pytest.approx(line["step_seconds"], rel=0.1, abs=0.5)


def test_resumed_on_the_other_number_of_ranks(folder: Path, size: int) -> None:
    """Two steps on one rank, the third on two; and the other way round."""
    expected = lines_of(folder, "1_ranks")
    for first, second in ((1, 2), (2, 1)):
        name = f"from_{first}_to_{second}"
        trained(folder, name, first, size, steps=STEPS - 1)
        trained(folder, name, second, size, resume="auto")
        found = lines_of(folder, name)
        assert [line["step"] for line in found] == [1, 2, 3]
        for a, b in zip(expected, found, strict=True):
            assert (a["data_digest"], a["mask_digest"]) == (b["data_digest"], b["mask_digest"])
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
