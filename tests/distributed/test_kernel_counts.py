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

# Operations that launch nothing.
VIEWS = {
    *("view", "_unsafe_view", "as_strided", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze"),
    *("squeeze", "narrow", "detach", "alias", "split", "split_with_sizes", "unbind", "chunk", "reshape", "unfold"),
    *("lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense"),
}


def count(folder: str, deepspeed: str, accumulation: int, more: dict[str, Any]) -> dict[str, Any]:
    """On a rank: kernels of the third step by phase ("masks", "forward", "backward", "update", "step"), and waits."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from maskvr_ds import train
    from maskvr_ds.config import RunConfig
    from maskvr_ds.runtime import distributed

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.phase, self.kernels, self.waits = "step", Counter[str](), Counter[str]()
            self.active = False

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function._schema.name.removeprefix("aten::")
            if name == "_local_scalar_dense":
                self.waits[self.phase] += 1
            elif name.rstrip("_") not in {view.rstrip("_") for view in VIEWS}:
                self.kernels[self.phase] += 1
            return function(*args, **(kwargs or {}))

    counting, number = Counting(), 0

    def within(phase: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, counting.phase = counting.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                counting.phase = before

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
        counting.active = True
        with counting:
            result = run_step(engine, masker, *args, **kwargs)
        counting.active = False
        return result

    def tolist(tensor: torch.Tensor) -> Any:
        # Not seen by the mode on a CPU; copies from a GPU.
        counting.waits[counting.phase] += counting.active
        return original(tensor)

    original, torch.Tensor.tolist = torch.Tensor.tolist, tolist
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
    return {"kernels": dict(counting.kernels), "waits": dict(counting.waits)}


def counts(tmp_path: Path, deepspeed: str, accumulation: int = 1, **more: Any) -> tuple[Counter[str], Counter[str]]:
    make_corpus(tmp_path / "corpus", rows=64, length=16)
    (found,) = run_ranks(count, 1, str(tmp_path), deepspeed, accumulation, more)
    return Counter(found["kernels"]), Counter(found["waits"])


@pytest.mark.parametrize(("deepspeed", "bound"), [("zero1_bf16", 1220), ("zero2_bf16", 2080)])
def test_kernels_of_a_step(tmp_path: Path, deepspeed: str, bound: int) -> None:
    kernels, waits = counts(tmp_path, deepspeed)
    print(deepspeed, dict(kernels), kernels.total(), dict(waits))
    assert kernels.total() <= bound
    if deepspeed == "zero1_bf16":
        assert waits.total() <= 1


def test_masks_and_digests_do_not_grow_with_accumulation(tmp_path: Path) -> None:
    """At 4 micro-batches the masks, digests and counts are those of one batch."""
    kernels, _ = counts(tmp_path, "zero1_bf16", accumulation=4)
    print(dict(kernels))
    # The sums of the loss, and its scaling, are per micro-batch.
    assert kernels["step"] <= 200
