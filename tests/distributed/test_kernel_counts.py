"""Kernels that a step launches and times that the host waits for the device, counted on a CPU.

A model with the tensors of BERT-base and next to no arithmetic. A CPU splits dropout and attention into more kernels
than a GPU does, so the bounds are above what a GPU launches; allocations are not counted.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.support.corpora import make_corpus


def count(folder: str, deepspeed: str, accumulation: int, more: dict[str, Any]) -> dict[str, Any]:
    """On a rank: kernels of the third step by phase ("masks", "forward", "backward", "update", "step"), and waits."""
    from maskvr_ds import train
    from maskvr_ds.benchmarks.step_parts import Kernels
    from maskvr_ds.config import RunConfig
    from maskvr_ds.runtime import distributed

    phase, number = "step", 0
    counting = Kernels(lambda: phase)

    def within(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal phase
            before, phase = phase, name
            try:
                return function(*args, **kwargs)
            finally:
                phase = before

        return call

    run_step = train.run_step

    def counted(engine: Any, masker: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        if number != 3:
            return run_step(engine, masker, *args, **kwargs)
        engine.forward = within("forward", engine.forward)
        engine.backward = within("backward", engine.backward)
        engine.step = within("update", engine.step)
        with counting:
            return run_step(engine, masker, *args, **kwargs)

    distributed.initialize()
    train.plot_loss = lambda *_: None
    train.run_step = counted
    values = {
        "output_dir": f"{folder}/run",
        "deepspeed": deepspeed,
        "data": {"path": f"{folder}/corpus"},
        "model": {
            "num_hidden_layers": 12,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 32,
        },
        "batch": {"global_size": 2 * accumulation, "micro_size": 2},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "training": {"steps": 3},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "monitor": {"tensorboard": False},
        **more,
    }
    train.train(RunConfig.model_validate(values))
    return {"kernels": dict(counting.launched), "waits": dict(counting.reads)}


def counts(tmp_path: Path, deepspeed: str, accumulation: int = 1, **more: Any) -> tuple[Counter[str], Counter[str]]:
    make_corpus(tmp_path / "corpus", rows=64, length=16)
    (found,) = run_ranks(count, 1, str(tmp_path), deepspeed, accumulation, more)
    return Counter(found["kernels"]), Counter(found["waits"])


@pytest.mark.parametrize(("deepspeed", "bound"), [("zero1_bf16", 1220), ("zero2_bf16", 2080)])
def test_kernels_of_a_step(tmp_path: Path, deepspeed: str, bound: int) -> None:
    kernels, waits = counts(tmp_path, deepspeed)
    print(deepspeed, dict(kernels), kernels.total(), dict(waits))
    assert kernels.total() <= bound
    assert waits.total() <= 1


def test_masks_and_digests_do_not_grow_with_accumulation(tmp_path: Path) -> None:
    """At 4 micro-batches the masks, digests and counts are those of one batch."""
    kernels, _ = counts(tmp_path, "zero1_bf16", accumulation=4)
    print(dict(kernels))
    # The sums of the loss, and its scaling, are per micro-batch.
    assert kernels["step"] <= 200
