"""Bytes on the wire that `maskvr plan` expects, against collectives counted on real ranks."""

from collections import Counter
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
# Stage 2, reduced to the owners of partitions, in one bucket and in several.
TO_OWNERS = {"use_multi_rank_bucket_allreduce": False}
OWNERS = [("zero2_bf16", TO_OWNERS), ("zero2_fp32", {**TO_OWNERS, "reduce_bucket_size": 400_000})]


def deepspeed_config(name: str, zero: dict[str, Any]) -> dict[str, Any]:
    """A file of ds_configs/, with changes in its section zero_optimization."""
    found = read_deepspeed_config(deepspeed_config_path(name))
    return {**found, "zero_optimization": {**found["zero_optimization"], **zero}}


def sent(cases: list[tuple[str, dict[str, Any]]], accumulation: int) -> list[tuple[dict[str, float], Counter[str]]]:
    """On a rank: bytes that it sends in the third step with each configuration, by collective, as a ring sends them;
    and the number of these collectives."""
    import inspect

    import torch

    from maskvr_ds.config import BatchConfig, OptimizerConfig
    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.engine import engine as engines
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed

    found: dict[str, float] = {}
    calls: Counter[str] = Counter()
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
                calls[name] += 1
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
    for name, zero in cases:
        engine = engines.create_engine(
            transformers_config(model, vocab_size=V, pad_id=0),
            deepspeed_config(name, zero),
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
        results.append((dict(found), Counter(calls)))
        found.clear()
        calls.clear()
        engine.destroy()
    return results


def test_collectives_of_a_step() -> None:
    ranks, accumulation = 3, 2
    sizes = encoder_sizes(ModelConfig(**MODEL), V)
    cases: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in CONFIGS), *OWNERS]
    counted = run_ranks(sent, ranks, cases, accumulation)
    for place, (name, changes) in enumerate(cases):
        planned = collectives(sizes, zero_settings(deepspeed_config(name, changes)), accumulation)
        for of_rank in counted:
            found, calls = of_rank[place]
            # Partitions are padded, and digests and norms are reduced.
            assert sum(found.values()) == pytest.approx(sum(one.wire(ranks) for one in planned), rel=0.02), name
            reduces = sum(one.calls(ranks) for one in planned if one.kind == "reduce")
            assert (calls["reduce"] > 0) == bool(changes)
            # Parameters are not cut, so that buckets are not full: at most one more piece for each parameter group.
            assert reduces <= calls["reduce"] <= 1.5 * reduces, (name, calls)
            print(name, changes, dict(calls), reduces)
