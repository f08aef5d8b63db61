"""Gradient-norm targets read through DeepSpeed engines on real ranks, against autograd on single predictions."""

from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import allow_fp16

B, L, K, V, A = 3, 16, 4, 60, 2
# DeepSpeed configuration → bound of the relative difference. In 16 bits the gradient itself is rounded.
BOUNDS = {
    "zero0_fp32": 1e-5,
    "zero1_fp32": 1e-5,
    "zero2_fp32": 1e-5,
    "zero1_fp16": 5e-3,
    "zero2_bf16": 3e-2,
    "zero3_fp16": 5e-3,
    "zero3_fp32": 1e-5,
}


def measure(names: list[str]) -> dict[str, Any]:
    """On a rank: configuration → (norms through the engine, by autograd), for two steps of two micro-batches."""
    import deepspeed
    import torch

    from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
    from maskvr_ds.config.deepspeed import read_deepspeed_config
    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.engine.engine import create_engine, loss_scale, step_and_norm
    from maskvr_ds.masking.gradient_norms import GradientNorms
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.encoder import MaskedLanguageModel
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed

    distributed.initialize()
    allow_fp16()
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": L}
    model = ModelConfig(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0, activation_checkpointing=True)
    bert = transformers_config(model, vocab_size=V, pad_id=0)
    optimizer = OptimizerConfig(lr=0.01)

    def batch(seed: int) -> MaskedBatch:
        random = torch.Generator().manual_seed(100 * distributed.rank() + seed)
        weights = torch.rand(B, K, generator=random) * 3 + 0.3
        weights[1, -1] = 0
        return MaskedBatch(
            torch.randint(5, V, (B, L), generator=random),
            torch.stack([torch.randperm(L, generator=random)[:K] for _ in range(B)]),
            torch.randint(5, V, (B, K), generator=random),
            weights,
        )

    def one_at_a_time(module: MaskedLanguageModel, masked: MaskedBatch, scale: float) -> np.ndarray:
        norms = np.zeros((B, K))
        for b, k in np.argwhere(masked.weights.numpy() != 0):
            hidden = module.hidden(masked.input_ids, masked.positions).detach().requires_grad_()
            logits = module.mlm.cls(hidden)[b, k].float()
            loss = torch.nn.functional.cross_entropy(logits, masked.labels[b, k])
            (gradient,) = torch.autograd.grad(loss * scale, hidden)
            norms[b, k] = gradient[b, k].float().norm() / scale
        return norms

    found: dict[str, Any] = {}
    for name in names:
        engine = create_engine(
            bert,
            read_deepspeed_config(deepspeed_config_path(name)),
            model=model,
            batch=BatchConfig(global_size=A * B * distributed.world_size(), micro_size=B),
            optimizer=optimizer,
            accumulation=A,
            seed=1,
        )
        engine.train()
        twin = MaskedLanguageModel(bert)
        norms = GradientNorms()
        engine.module.observer = norms.watch
        pairs = []
        for step in range(2):
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled="3" in name):
                twin.load_state_dict({n: p.detach().clone() for n, p in engine.module.state_dict().items()})
            twin.to(next(engine.module.parameters()).dtype)
            for micro in range(A):
                masked = batch(10 * step + micro)
                loss = weighted_loss(engine, masked)
                engine.backward(loss * 0.037)
                # A power of two, large enough that fp16 does not underflow.
                scale = loss_scale(engine) or 1.0
                pairs.append((norms.take().numpy(), one_at_a_time(twin, masked, min(scale, 256.0))))
                if micro < A - 1:
                    engine.step()
            step_and_norm(engine)
        found[name] = pairs
        engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_are_those_of_autograd(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(measure, world_size, list(BOUNDS))):
        for name, pairs in found.items():
            for ours, reference in pairs:
                assert ours.dtype == np.float32
                assert (ours[1, -1], (ours == 0).sum()) == (0, 1)
                used = reference != 0
                error = np.abs(ours[used] / reference[used] - 1).max()
                assert error < BOUNDS[name], (rank, name, error)
