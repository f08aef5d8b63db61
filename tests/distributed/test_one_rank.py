"""Gradients on one rank, which nothing reduces: equal to DeepSpeed's own way to the bit, without its buffers."""

from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks

B, L, K, V, STEPS = 2, 16, 4, 3_000, 6
# DeepSpeed configuration, optimizer, accumulation, clipping.
CASES = [
    ("zero0_fp32", "lamb", 3, 0.5),
    ("zero1_fp32", "lamb", 1, 0.5),
    ("zero1_fp32", "adamw", 3, 1e9),
    ("zero2_fp32", "lamb", 3, 0.0),
    ("zero2_fp32", "adamw", 1, 0.5),
    ("zero1_bf16", "lamb", 2, 0.5),
]


def trained(cases: list[tuple[str, str, int, float]]) -> list[tuple[Any, Any]]:
    """On a rank: for each case norms and weights, by DeepSpeed and as this project trains, and in the latter the
    operations of an update that return a new tensor as large as half of the model."""
    from unittest import mock

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
    from maskvr_ds.config.deepspeed import read_deepspeed_config
    from maskvr_ds.engine import engine as engines
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed
    from tests.support.batches import random_masked

    distributed.initialize()
    model = ModelConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, max_position_embeddings=L)
    bert = transformers_config(model, vocab_size=V, pad_id=0)

    class Fresh(TorchDispatchMode):
        """Names of operations that return a new tensor of at least `size` elements."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.names: set[str] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            aliases = any(returned.alias_info is not None for returned in function._schema.returns)
            if isinstance(found, torch.Tensor) and not aliases and found.numel() >= self.size:
                self.names.add(function.__name__)
            return found

    def run(name: str, optimizer: str, accumulation: int, clipping: float) -> Any:
        engine = engines.create_engine(
            bert,
            read_deepspeed_config(deepspeed_config_path(name)),
            model=model,
            batch=BatchConfig(global_size=accumulation * B, micro_size=B),
            optimizer=OptimizerConfig.model_validate({"name": optimizer, "lr": 0.02, "gradient_clipping": clipping}),
            accumulation=accumulation,
            seed=1,
        )
        engine.train()
        torch.manual_seed(3)  # dropout
        fresh = Fresh(sum(p.numel() for p in engine.module.parameters()) // 2)
        norms = []
        for step in range(STEPS):
            for micro in range(accumulation):
                batch = random_masked(10 * step + micro, rows=B, length=L, predictions=K, vocabulary=V)
                engine.backward(weighted_loss(engine, batch))
                if micro < accumulation - 1:
                    engine.step()
                    if step == 3 and name == "zero1_fp32":
                        # Gradients that someone drops, or replaces by others, are those that count.
                        parameters = list(engine.module.parameters())
                        parameters[4].grad = None
                        parameters[5].grad = torch.ones_like(parameters[5])
            norm = engines.replicated_grad_norm(engine)
            if step == STEPS - 1:
                with fresh:
                    norm = engines.step_and_norm(engine, norm)
            else:
                norm = engines.step_and_norm(engine, norm)
            norms.append(float(norm))
        arrays = [p.detach().float().numpy().copy() for p in engine.module.parameters()]
        for state in engine.basic_optimizer.state.values():
            arrays += [v.numpy().copy() for v in state.values() if torch.is_tensor(v)]
        engine.destroy()
        return norms, arrays, sorted(fresh.names)

    found = []
    for case in cases:
        with mock.patch.object(engines, "streamline", return_value=None):
            theirs = run(*case)
        found.append((theirs, run(*case)))
    return found


@pytest.fixture(scope="module")
def runs() -> list[tuple[Any, Any]]:
    (found,) = run_ranks(trained, 1, CASES)
    return list(found)


def test_results_are_equal(runs: list[tuple[Any, Any]]) -> None:
    for case, (theirs, ours) in zip(CASES, runs, strict=True):
        assert ours[0] == theirs[0], case
        assert len(ours[1]) == len(theirs[1]) > 20
        assert all(np.array_equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True)), case


def test_no_buffer_of_the_size_of_the_model(runs: list[tuple[Any, Any]]) -> None:
    """A CPU maps such a buffer anew in every step, page by page."""
    for case, (theirs, ours) in zip(CASES, runs, strict=True):
        assert ours[2] == [], case
        assert theirs[2] or case[0] == "zero0_fp32", case
