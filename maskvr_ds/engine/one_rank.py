"""Gradients of a world of one rank: nothing to reduce, hence nothing to copy.

DeepSpeed treats one rank as any number. Per step it copies the gradients to a buffer for the reduction, divides them by
one, reduces them, copies them back, then to a buffer of its own, and flattens them: fresh buffers of the size of the
model each time, which take longer to be mapped by a CPU's kernel than to be written.

ZeRO 1 and 2 in fp32: gradients lie in the flat buffer that the optimizer reads, and the backward passes add to it
(`hold_gradients`). Everywhere else but at ZeRO 3, the engine's all-reduce is skipped (`skip_reduction`).

Same results: every element is computed by the same operations, except that a gradient of −0 may become 0.
"""

from types import MethodType
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from maskvr_ds.engine.patch_checks import check_part, part

_METHODS = {
    "process_gradients": ("self", "param", "i"),
    "reduce_gradients": ("self", "pipeline_parallel"),
    "overlapping_partition_gradients_reduce_epilogue": ("self",),
    "zero_grad": ("self", "set_to_none"),
    "step": ("self", "closure"),
    "scaled_global_norm": ("self", "norm_type"),
    "_update_scale": ("self", "has_overflow"),
}
_STATE = (
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "bit16_groups_flat",
    "single_partition_of_fp32_groups",
    "averaged_gradients",
    "params_in_partition",
)


def check_one_rank() -> None:
    """Raise RuntimeError if DeepSpeed lacks a method that is replaced or used here."""
    zero = part("one_rank", "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
    for name, arguments in _METHODS.items():
        check_part("one_rank", zero, name, *arguments)
    engine = part("one_rank", "deepspeed.runtime.engine", "DeepSpeedEngine")
    check_part("one_rank", engine, "buffered_allreduce_fallback", "self", "grads", "elements_per_buffer")
    check_part("one_rank", engine, "_get_gradients_for_reduction", "self")


def skip_reduction(engine: Any) -> None:
    """Skip the engine's own all-reduce on one rank: that of ZeRO 0, and of BF16_Optimizer."""
    if dist.get_world_size() > 1 or engine.has_moe_layers or engine.pipeline_parallelism:
        return

    def fill(grads: Any = None, elements_per_buffer: int = 0) -> None:
        # Parameters without a gradient get one of zeros, as they do from a reduction.
        if grads is None and not hasattr(engine.optimizer, "get_grads_for_reduction"):
            engine._get_gradients_for_reduction()

    engine.buffered_allreduce_fallback = fill


def hold_gradients(optimizer: Any) -> None:
    """Keep the gradients of a DeepSpeedZeroOptimizer on one rank in flat buffers, unless a special case is used."""
    if not _is_plain(optimizer):
        return
    for attribute in _STATE:
        check_part("one_rank", optimizer, attribute)
    gradients = _FlatGradients(optimizer)
    optimizer.process_gradients = lambda param, i: None
    optimizer.reduce_gradients = lambda pipeline_parallel=False: None
    optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: None
    optimizer.zero_grad = gradients.zero
    optimizer.held_gradients = gradients
    optimizer.step = MethodType(_step, optimizer)


def _is_plain(optimizer: Any) -> bool:
    return bool(
        dist.get_world_size(group=optimizer.dp_process_group) == 1
        and optimizer.mpu is None
        and {optimizer.dtype, optimizer.gradient_accumulation_dtype, optimizer.communication_data_type}
        == {torch.float32}
        and optimizer.compute_grad_norm
        and not optimizer.check_grad_overflow
        and not optimizer.cpu_offload
        and not optimizer.has_moe_layers
        and not optimizer.zenflow
        and not optimizer.custom_loss_scaler
        and optimizer.torch_autocast_gradscaler is None
        and optimizer.loss_scale == 1.0
        and "Muon" not in type(optimizer.optimizer).__name__
    )


class _FlatGradients:
    """One flat fp32 buffer per parameter group; the parameters' gradients are views of it.

    Autograd adds to a gradient that is there already. Whoever replaces one, or sets it to None, has it copied back, or
    zeroed, by `flat`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._flat = [torch.zeros_like(weights) for weights in optimizer.single_partition_of_fp32_groups]
        self._places: list[list[tuple[Tensor, Tensor]]] = []
        for flat, parameters, offsets in zip(
            self._flat, optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
        ):
            places = zip(parameters, offsets, strict=True)
            self._places.append([(p, flat.narrow(0, at, p.numel()).view_as(p)) for p, at in places])
        self._attach()

    def _attach(self) -> None:
        for group in self._places:
            for parameter, place in group:
                parameter.grad = place

    @torch.no_grad()
    def flat(self) -> list[Tensor]:
        """The buffers, by group, with what the parameters' gradients are now."""
        for group in self._places:
            for parameter, place in group:
                if parameter.grad is place:
                    continue
                if parameter.grad is None:
                    place.zero_()
                else:
                    place.copy_(parameter.grad)
                parameter.grad = place
        return self._flat

    def views(self, group: int) -> list[Tensor]:
        """Gradients of a group's parameters, in the order of storage."""
        return [place for _, place in self._places[group]]

    @torch.no_grad()
    def zero(self, set_to_none: bool = True) -> None:
        """Replaces zero_grad: the gradients stay where they are."""
        for flat in self._flat:
            flat.zero_()
        self._attach()


@torch.no_grad()
def _step(self: Any, closure: Any = None) -> None:
    """DeepSpeedZeroOptimizer.step: norm, clipping, update of the fp32 partitions, copy to the model."""
    gradients = self.held_gradients.flat()
    for group in range(len(gradients)):
        self.averaged_gradients[group] = self.held_gradients.views(group)
    norm = self.scaled_global_norm()
    for group in range(len(gradients)):
        self.averaged_gradients[group] = None
    self.overflow = not bool(torch.isfinite(norm))
    self._update_scale(self.overflow)
    if self.overflow:
        self._global_grad_norm = float("inf")
        return
    self._global_grad_norm = norm
    if self.clip_grad > 0:
        limit = torch.clamp((norm + 1e-6) / self.clip_grad, min=1.0)
        if limit > 1:  # the host has read the norm already
            for flat in gradients:
                flat.mul_(1.0 / limit)
    for weights, flat in zip(self.single_partition_of_fp32_groups, gradients, strict=True):
        weights.grad = flat
    # All groups at once: what is updated in one call need not be copied to the model twice.
    self.optimizer.step()
    for weights, model in zip(self.single_partition_of_fp32_groups, self.bit16_groups_flat, strict=True):
        weights.grad = None
        model.data.copy_(weights.data)
