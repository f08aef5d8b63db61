"""Streamlined optimizers against DeepSpeed's own, on real ranks: equal to the bit."""

import math
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks

B, L, K, V, STEPS = 2, 16, 4, 60, 20
# DeepSpeed configuration, accumulation, clipping: always, never, off.
CASES = [
    ("zero1_bf16", 1, 0.5),
    ("zero1_bf16", 3, 0.5),
    ("zero1_bf16", 3, 1e9),
    ("zero1_bf16", 2, 0.0),
    ("zero1_fp32", 2, 0.5),
    ("zero2_fp32", 2, 0.5),
    ("zero2_bf16", 2, 0.5),
]
HELD_BACK = {7, 8}  # steps whose update is not allowed
NOT_FINITE = {12}


def trained(cases: list[tuple[str, int, float]]) -> list[tuple[Any, Any]]:
    """On a rank: for each case the figures of all steps and the last weights, by DeepSpeed and streamlined."""
    import torch

    from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
    from maskvr_ds.config.deepspeed import read_deepspeed_config
    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.engine import engine as engines
    from maskvr_ds.engine.deepspeed_patches import gate_optimizer_step
    from maskvr_ds.engine.streamline import streamline
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed
    from tests.support.batches import random_masked

    distributed.initialize()
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": L}
    model = ModelConfig(**sizes)
    bert = transformers_config(model, vocab_size=V, pad_id=0)

    def masked(number: int) -> MaskedBatch:
        return random_masked(1000 * distributed.rank() + number, rows=B, length=L, predictions=K, vocabulary=V)

    def run(name: str, accumulation: int, clipping: float) -> tuple[list[tuple[float, float]], list[Any]]:
        engine = engines.create_engine(
            bert,
            read_deepspeed_config(deepspeed_config_path(name)),
            model=model,
            batch=BatchConfig(global_size=accumulation * B * distributed.world_size(), micro_size=B),
            optimizer=OptimizerConfig(lr=0.02, gradient_clipping=clipping),
            accumulation=accumulation,
            seed=1,
        )
        engine.train()
        torch.manual_seed(3)  # dropout
        step = 0
        gate_optimizer_step(engine, lambda norm: step not in HELD_BACK and math.isfinite(norm))
        figures = []
        for step in range(STEPS):
            for micro in range(accumulation):
                loss = weighted_loss(engine, masked(10 * step + micro))
                engine.backward(loss * (float("nan") if step in NOT_FINITE else 0.37))
                if micro < accumulation - 1:
                    engine.step()
            figures.append((float(loss.detach()), float(engines.step_and_norm(engine))))
        optimizer = engine.optimizer
        tensors = list(engine.module.parameters())
        tensors += [weights for group in optimizer.optimizer.param_groups for weights in group["params"]]
        for entry in optimizer.optimizer.state.values():
            tensors += [moment for moment in entry.values() if torch.is_tensor(moment)]
        replaced = {"step", "update_hp_grads", "get_grad_norm_direct"} & set(vars(optimizer))
        arrays = [tensor.detach().float().numpy().copy() for tensor in tensors]
        engine.destroy()
        assert bool(replaced) == (engines.streamline is streamline)
        return figures, arrays

    found = []
    for case in cases:
        engines.streamline = lambda engine: None
        theirs = run(*case)
        engines.streamline = streamline
        ours = run(*case)
        found.append((theirs, ours))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_are_equal(world_size: int) -> None:
    for found in run_ranks(trained, world_size, CASES):
        for (their_figures, their_tensors), (figures, tensors) in found:
            np.testing.assert_array_equal(figures, their_figures)  # NaN equals NaN
            assert not math.isfinite(figures[12][1]) or figures[12][1] < 0
            assert len(tensors) == len(their_tensors) > 40
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(tensors, their_tensors, strict=True))
