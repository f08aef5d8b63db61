"""Bytes on the wire that `maskvr plan` expects, against collectives counted on real ranks."""

from typing import Any

import pytest

from maskvr_ds.config import ModelConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.planning.communication import collectives
from maskvr_ds.planning.sizes import encoder_sizes
from maskvr_ds.planning.zero import zero_settings
from tests.distributed.ranks import run_ranks

B, L, K, V = 2, 16, 3, 5000
# Matrices of 320 × 320 are above stage3_param_persistence_threshold, as in any real model.
MODEL = {"num_hidden_layers": 1, "hidden_size": 320, "num_attention_heads": 5, "max_position_embeddings": L}
CONFIGS = ["zero0_fp32", "zero1_fp32", "zero1_bf16", "zero2_fp32", "zero2_bf16", "zero3_fp32", "zero3_bf16"]


def sent(names: list[str], accumulation: int) -> list[dict[str, float]]:
    """On a rank: bytes that it sends in the third step with each configuration, by collective, as a ring sends them."""
    import inspect

    import torch

    from maskvr_ds.config import BatchConfig, OptimizerConfig
    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.engine import engine as engines
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed

    found: dict[str, float] = {}
    counting = False

    def size(tensors: Any) -> float:
        tensors = tensors if isinstance(tensors, list) else [tensors]
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def count(name: str, factor: int, argument: str) -> None:
        """argument: of the function, the complete tensor."""
        function = getattr(torch.distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if counting:
                tensor = inspect.signature(function).bind(*args, **kwargs).arguments[argument]
                ranks = distributed.world_size()
                found[name] = found.get(name, 0.0) + factor * (ranks - 1) / ranks * size(tensor)
            return function(*args, **kwargs)

        setattr(torch.distributed, name, counted)

    count("all_reduce", 2, "tensor")
    count("reduce", 1, "tensor")
    count("broadcast", 1, "tensor")
    count("all_gather_into_tensor", 1, "output_tensor")
    count("all_gather", 1, "tensor_list")
    count("reduce_scatter_tensor", 1, "input")
    count("reduce_scatter", 1, "input_list")
    distributed.initialize()
    model = ModelConfig(**MODEL)
    results = []
    for name in names:
        engine = engines.create_engine(
            transformers_config(model, vocab_size=V, pad_id=0),
            read_deepspeed_config(deepspeed_config_path(name)),
            model=model,
            batch=BatchConfig(global_size=accumulation * B * distributed.world_size(), micro_size=B),
            optimizer=OptimizerConfig(lr=0.01),
            accumulation=accumulation,
            seed=1,
        )
        engine.train()
        for step in range(3):
            counting = step == 2
            for micro in range(accumulation):
                batch = MaskedBatch(
                    torch.randint(5, V, (B, L)),
                    torch.stack([torch.randperm(L)[:K] for _ in range(B)]),
                    torch.randint(5, V, (B, K)),
                    torch.ones(B, K),
                )
                engine.backward(weighted_loss(engine, batch))
                if micro < accumulation - 1:
                    engine.step()
            engines.step_and_norm(engine)
        counting = False
        results.append(dict(found))
        found.clear()
        engine.destroy()
    return results


def test_bytes_on_the_wire() -> None:
    ranks, accumulation = 3, 2
    sizes = encoder_sizes(ModelConfig(**MODEL), V)
    counted = run_ranks(sent, ranks, CONFIGS, accumulation)
    for place, name in enumerate(CONFIGS):
        zero = zero_settings(read_deepspeed_config(deepspeed_config_path(name)))
        planned = sum(one.wire(ranks) for one in collectives(sizes, zero, accumulation))
        for of_rank in counted:
            # Partitions are padded, and digests and norms are reduced.
            assert sum(of_rank[place].values()) == pytest.approx(planned, rel=0.02), name
