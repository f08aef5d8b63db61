"""Reading and writing the fp32 master weights of an engine."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.utils import safe_get_full_fp32_param
from torch._utils import _unflatten_dense_tensors

from maskvr_ds.models.normalization import statistics
from maskvr_ds.optim import lamb
from maskvr_ds.optim.partitions import layout_of, trainable
from maskvr_ds.runtime import distributed


def partition_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Element counts of this rank's flat ZeRO partitions, equal on all ranks; empty at stage 0."""
    if engine.zero_optimization_stage() == 0:
        return []
    groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    if engine.zero_optimization_stage() == 3:
        groups = [engine.optimizer.fp32_partitioned_groups_flat]
    return [flat.numel() for flats in groups for flat in flats]


def full_fp32_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Parameter name → fp32 weights on the CPU: master weights in bf16 and fp16. Tied parameters appear once. Running
    statistics of batch normalisations too.

    Collective: call on all ranks; under ZeRO one collective per parameter over the data-parallel group. The result is
    on rank 0, empty on the others.
    """
    separate = _separate_masters(engine.optimizer)
    weights = {}
    for name, parameter in engine.module.mlm.named_parameters():
        master = _frozen(parameter) if not parameter.requires_grad else safe_get_full_fp32_param(parameter)
        if master is None:
            master = separate.get(parameter, parameter)
        assert master.dtype == torch.float32, f"{name}: no fp32 master weights in {type(engine.optimizer).__name__}"
        if distributed.rank() == 0:
            # Copied: safetensors rejects tensors that share storage, as DeepSpeed's flattened ones do.
            weights[name] = master.detach().to("cpu", copy=True)
    if distributed.rank() == 0:
        weights |= {name: buffer.to("cpu", copy=True) for name, buffer in statistics(engine.module.mlm).items()}
    return weights


def _frozen(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of a parameter without gradient, which has no master, in fp32."""
    with deepspeed.zero.GatheredParameters(parameter, enabled=is_zero_param(parameter)):
        return parameter.detach().float().clone()


def _separate_masters(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """Parameter → unpartitioned fp32 master, which ZeRO 0 in bf16 keeps in separate lists; empty otherwise."""
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
def undo_initial_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo the step that DeepSpeed makes during `deepspeed.initialize` at ZeRO 0 in 16 bits. Not a collective.

    FP16_Optimizer and FP16_UnfusedOptimizer step once on zero gradients, only to allocate the state. AdamW decays the
    masters in it by 1 − ηλ at the peak learning rate, and counts it: every bias correction is that of the next step.
    Call it before anything is loaded into the engine. Does nothing for other optimizers.
    """
    masters = _separate_masters(engine.optimizer)
    if not masters:
        return
    for parameter, master in masters.items():
        master.copy_(parameter)
    for state in engine.basic_optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif key == "step":
                state[key] = 0
    for group in engine.basic_optimizer.param_groups:
        if "step" in group:  # FusedAdam
            group["step"] = 0


@torch.no_grad()
def set_masters(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` (fp32, by parameter name) into the fp32 masters; the engine's parameters are their rounded values.
    Not a collective."""
    if separate := _separate_masters(engine.optimizer):
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                separate[parameter].copy_(weights[name])
        return
    given = [p for group in lamb.parameter_groups(engine.module) for _, p in group["params"]]
    layout = layout_of(engine, trainable([{"params": given}]), engine.basic_optimizer.param_groups)
    for flat, partition in layout.partitions.items():
        for fragment in partition.fragments:
            source = weights[layout.names[fragment.tensor]].view(-1)
            target = fragment.of_partition(flat.detach())
            target.copy_(source.narrow(0, fragment.tensor_start, fragment.length).view(target.shape))


def not_rounded(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of parameters that differ from their rounded fp32 weights. weights: from `full_fp32_weights`.

    Collective: call on all ranks; under ZeRO 3 one all-gather per parameter. The result is on rank 0, empty on the
    others.
    """
    differing: list[str] = []
    for name, parameter in engine.module.mlm.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=is_zero_param(parameter)):
            # Only rank 0 has weights to compare; the others take part in the all-gather.
            if name in weights and not torch.equal(weights[name].to(parameter.dtype), parameter.detach().cpu()):
                differing.append(name)
    return differing
