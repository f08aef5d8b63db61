"""LAMB in Triton kernels under ZeRO, by Triton's interpreter on gloo ranks, against the list operations."""

from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks

B, L, K, V, STEPS = 2, 16, 4, 60, 8
# The norm of the gradients is above the limit, so that they are clipped.
CLIPPING = 0.05
# DeepSpeed configuration → bound of the difference of weights. In bf16 gradients are those of rounded weights; one unit
# in the last place below 1/8.
BOUNDS = {"zero0_fp32": 1e-6, "zero1_fp32": 1e-6, "zero2_fp32": 1e-6, "zero3_fp32": 1e-6, "zero1_bf16": 5e-4}


def trained(names: list[str]) -> dict[str, Any]:
    """On a rank: for each configuration the weights and trust ratios of both kinds, or the error of an offload."""
    import deepspeed
    import torch

    from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
    from maskvr_ds.config.deepspeed import read_deepspeed_config
    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.engine.engine import create_engine, step_and_norm
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed
    from tests.support.batches import random_masked

    distributed.initialize()
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": L}
    model = ModelConfig(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    bert = transformers_config(model, vocab_size=V, pad_id=0)

    def masked(number: int) -> MaskedBatch:
        return random_masked(1000 * distributed.rank() + number, rows=B, length=L, predictions=K, vocabulary=V)

    def run(name: str, fused: bool) -> tuple[list[Any], Any]:
        engine = create_engine(
            bert,
            read_deepspeed_config(deepspeed_config_path(name)),
            model=model,
            batch=BatchConfig(global_size=B * distributed.world_size(), micro_size=B),
            optimizer=OptimizerConfig(lr=0.02, fused=fused, gradient_clipping=CLIPPING),
            accumulation=1,
            seed=1,
        )
        engine.train()
        for step in range(STEPS):
            engine.backward(weighted_loss(engine, masked(step)) / (B * K))
            norm = step_and_norm(engine)
            assert norm is None or norm > CLIPPING
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled="3" in name):
            weights = [p.detach().float().numpy().copy() for p in engine.module.parameters()]
        lamb = engine.basic_optimizer
        # The kernels write the model's weights where DeepSpeed would copy them: this rank's, rounded to nearest.
        assert bool(lamb.copies) == (fused and name == "zero1_bf16")
        for partition, copy in lamb.copies.items():
            assert torch.equal(copy, partition.to(copy.dtype))
        # The loss does not depend on the bias of keys: its gradient is rounding, and so is its ratio.
        ratios = [r for n, r in zip(lamb.tensor_names, lamb.trust_ratios.tolist(), strict=True) if "key.bias" not in n]
        engine.destroy()
        return weights, ratios

    found: dict[str, Any] = {name: (run(name, False), run(name, True)) for name in names}
    try:
        run("zero2_bf16_offload", True)
    except (ValueError, distributed.RemoteError) as error:
        found["offload"] = str(error)
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_equals_the_list_operations(world_size: int) -> None:
    for found in run_ranks(trained, world_size, list(BOUNDS)):
        assert "optimizer.fused is true, but offload_optimizer.device is 'cpu'" in found.pop("offload")
        for name, ((theirs, their_ratios), (ours, our_ratios)) in found.items():
            assert len(ours) > 20
            for our, their in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(our, their, rtol=0, atol=BOUNDS[name], err_msg=name)
            np.testing.assert_allclose(our_ratios, their_ratios, rtol=2e-2 if "bf16" in name else 1e-4, atol=1e-7)
