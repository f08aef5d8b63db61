"""fp32 master weights in and out of an engine."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.utils import safe_get_full_fp32_param
from torch._utils import _unflatten_dense_tensors

from maskvr_ds.optim import lamb
from maskvr_ds.optim.partitions import layout_of, trained
from maskvr_ds.runtime import distributed


def partition_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Elements of the flat partitions that ZeRO cut on this rank; none at stage 0. Equal on all ranks."""
    if engine.zero_optimization_stage() == 0:
        return []
    groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    if engine.zero_optimization_stage() == 3:
        groups = [engine.optimizer.fp32_partitioned_groups_flat]
    return [flat.numel() for flats in groups for flat in flats]


def full_fp32_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Name → fp32 weights on the CPU, master weights where the model computes in less; tied ones appear once. On rank
    0; empty on the others.

    One collective a parameter over the data-parallel group under ZeRO: every rank must call.
    """
    beside = _masters_beside(engine.optimizer)
    weights = {}
    for name, parameter in engine.module.mlm.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is None:
            master = beside.get(parameter, parameter)
        assert master.dtype == torch.float32, f"{name}: no fp32 master weights in {type(engine.optimizer).__name__}"
        if distributed.rank() == 0:
            # A copy: safetensors refuses tensors that share storage, as DeepSpeed's flattened ones do.
            weights[name] = master.detach().to("cpu", copy=True)
    return weights


def _masters_beside(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """Parameter → whole fp32 master, where ZeRO 0 in bf16 keeps them in lists beside the parameters."""
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        masters = optimizer.fp32_groups
    elif isinstance(optimizer, FP16_Optimizer):
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        masters = [_unflatten_dense_tensors(group_flat, group) for group_flat, group in flat]
    else:
        return {}
    groups = zip(optimizer.fp16_groups, masters, strict=True)
    return {p: master for group, of_group in groups for p, master in zip(group, of_group, strict=True)}


@torch.no_grad()
def set_masters(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> None:
    """Have the fp32 masters be these weights, of which the engine's parameters are the rounded values. Not a
    collective."""
    if beside := _masters_beside(engine.optimizer):
        for name, parameter in engine.module.named_parameters():
            beside[parameter].copy_(weights[name])
        return
    given = [p for group in lamb.parameter_groups(engine.module) for _, p in group["params"]]
    layout = layout_of(engine, trained([{"params": given}]), engine.basic_optimizer.param_groups)
    for flat, partition in layout.partitions.items():
        for fragment in partition.fragments:
            whole = weights[layout.names[fragment.tensor]].view(-1)
            here = fragment.of_partition(flat.detach())
            here.copy_(whole.narrow(0, fragment.tensor_start, fragment.length).view(here.shape))


def not_rounded(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that are not their fp32 weights, as `full_fp32_weights` gave them, rounded.

    On rank 0; empty on the others. Under ZeRO 3 one all-gather a parameter: every rank must call.
    """
    differing: list[str] = []
    for name, parameter in engine.module.mlm.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=is_zero_param(parameter)):
            # Compared on the rank that has them; the others only lend their parts.
            if name in weights and not torch.equal(weights[name].to(parameter.dtype), parameter.detach().cpu()):
                differing.append(name)
    return differing
