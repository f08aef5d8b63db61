"""DeepSpeed's optimizers without their loops over tensors, and with one wait for the device per step.

ZeRO 1 in bf16 with fp32 accumulation (ds_configs/zero1_bf16.json) runs DeepSpeed's BF16_Optimizer. Per parameter tensor
it launches a cast and an addition in each micro-batch, a norm and a multiplication in each step: 808 of the 2,073
kernels of a BERT-base step; and it reads the norm three times on the host. Here the same arithmetic is done on lists of
tensors or on the flat partition, and the norm is read once, together with the loss (`norm_reader`). The other
optimizers of stages 1 and 2 get a norm without casts and loops, and clip without reading it on the host.

Same results: every element is computed by the same operations, and norms are summed in the same order. On GPUs the
norms of a list of tensors may be rounded differently from single norms.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime import utils as deepspeed_utils
from deepspeed.runtime.zero.utils import get_norm_dtype

from maskvr_ds.engine.one_rank import check_one_rank, hold_gradients, skip_reduction
from maskvr_ds.engine.patch_checks import check_part, part
from maskvr_ds.optim.lamb import Lamb
from maskvr_ds.optim.layerwise import LayerwiseAdaptive

# Elements of fp32 that gradients of later micro-batches are widened to at a time: 128 MiB.
_WIDENED = 1 << 25
# Elements that a CPU widens to float64 at a time: 512 KiB.
_WIDENED_ON_CPU = 1 << 16
_METHODS = ("update_hp_grads", "step", "get_grads_for_norm", "update_lp_params", "clear_hp_grads", "clear_lp_grads")
_STATE = (
    "bf16_groups",
    "fp32_groups_gradients",
    "fp32_groups_has_gradients",
    "fp32_groups_flat_partition",
    "fp32_groups_gradient_flat_partition",
    "bf16_groups_flat",
    "bf16_partitioned_groups",
    "real_dp_process_group",
    "nccl_start_alignment_factor",
    "allgather_bucket_size",
    "_lazy_init_hp_params_optimizer_state",
)
_GATHERED = (
    "groups_flat",
    "partitioned_param_groups",
    "dp_process_group",
    "start_alignment_factor",
    "allgather_bucket_size",
)


def check_streamlined() -> None:
    """Raise RuntimeError if DeepSpeed's optimizers lack a method that is replaced or used here."""
    bf16 = part("streamline", "deepspeed.runtime.bf16_optimizer", "BF16_Optimizer")
    for name in _METHODS:
        check_part("streamline", bf16, name)
    check_part("streamline", bf16, "update_hp_grads", "self", "clear_lp_grads")
    check_part("streamline", bf16, "step", "self", "closure")
    check_part("streamline", deepspeed_utils, "all_gather_dp_groups", *_GATHERED)
    zero = part("streamline", "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
    check_part("streamline", zero, "get_grad_norm_direct", "self", "gradients", "params", "norm_type")
    check_part("streamline", zero, "unscale_and_clip_grads", "self", "grad_groups_flat", "total_norm")
    check_one_rank()


def streamline(engine: Any) -> None:
    """Replace what loops over tensors in the optimizer of an engine, and on one rank what reduces gradients
    (one_rank.py); does nothing for optimizers without such loops.

    BF16_Optimizer: `update_hp_grads` and `step`, unless one of its special cases is used (gradients accumulated in
    bf16, immediate updates, model or expert parallelism). Adds the attribute `norm_reader`: called once per step with
    the global gradient norm before clipping (scalar tensor), returns it as a float. Fused LAMB clips the gradients as
    it reads them, and writes the weights of the model.
    DeepSpeedZeroOptimizer: `get_grad_norm_direct` and `unscale_and_clip_grads`. An optimizer of this project may use
    the memory of the gradients if nothing reads them after its step.
    """
    optimizer, basic = engine.optimizer, engine.basic_optimizer
    name = type(optimizer).__name__
    skip_reduction(engine)
    if name == "BF16_Optimizer" and _is_plain(optimizer):
        for attribute in _STATE:
            check_part("streamline", optimizer, attribute)
        optimizer.norm_reader = float
        optimizer.update_hp_grads = _Gradients(optimizer).accumulate
        optimizer.step = MethodType(_step, optimizer)
        if isinstance(basic, Lamb) and basic.fused:
            basic.copies = _model_partitions(optimizer)
    elif name == "DeepSpeedZeroOptimizer" and optimizer.mpu is None:
        optimizer.get_grad_norm_direct = MethodType(_partition_norm, optimizer)
        optimizer.unscale_and_clip_grads = MethodType(_unscale_and_clip, optimizer)
        hold_gradients(optimizer)
    if isinstance(basic, LayerwiseAdaptive):
        basic.overwrites_gradients = not _keeps_gradients(engine)


def _keeps_gradients(engine: Any) -> bool:
    """Whether gradients are read again after the optimizer's step, or might be."""
    optimizer = engine.optimizer
    if type(optimizer).__name__ == "DeepSpeedZeroOptimizer":
        return bool(optimizer.cpu_offload)
    # Both clear them next: BF16_Optimizer its sums, the engine the gradients of the model at ZeRO 0 in fp32.
    return type(optimizer).__name__ != "BF16_Optimizer" and optimizer is not engine.basic_optimizer


def _is_plain(optimizer: Any) -> bool:
    return (
        optimizer.using_real_optimizer
        and optimizer.grad_acc_dtype == torch.float32
        and not optimizer.immediate_grad_update
        and not optimizer.has_moe_layers
        and not optimizer._uses_muon
        and optimizer.mpu is None
        and optimizer.norm_type == 2
    )


class _Gradients:
    """Adds bf16 gradients to the fp32 sums of a BF16_Optimizer, list by list."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._widened: torch.Tensor | None = None

    @torch.no_grad()
    def accumulate(self, clear_lp_grads: bool = False) -> None:
        """The sum is over the micro-batches of a step; the first one is copied, since the sums are zero."""
        optimizer = self._optimizer
        for index, group in enumerate(optimizer.bf16_groups):
            sums, has_gradients = optimizer.fp32_groups_gradients[index], optimizer.fp32_groups_has_gradients[index]
            present = [j for j, parameter in enumerate(group) if parameter.grad is not None]
            for j in present:
                group[j]._hp_grad = sums[j]
            first = [j for j in present if not has_gradients[j]]
            later = [j for j in present if has_gradients[j]]
            if first:
                torch._foreach_copy_([sums[j] for j in first], [group[j].grad.view(-1) for j in first])
            self._add([sums[j] for j in later], [group[j].grad.view(-1) for j in later])
            for j in present:
                has_gradients[j] = True
            if clear_lp_grads and present:
                torch._foreach_zero_([group[j].grad for j in present])

    def _add(self, sums: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """sums += gradients, widened in pieces: adding bf16 to fp32 directly would be one kernel per tensor."""
        if not sums:
            return
        if self._widened is None:
            largest = max(tensor.numel() for tensor in sums)
            self._widened = sums[0].new_empty(max(largest, min(_WIDENED, sum(tensor.numel() for tensor in sums))))
        bounds, filled = [0], 0
        for number, tensor in enumerate(sums):
            if filled + tensor.numel() > self._widened.numel():
                bounds.append(number)
                filled = 0
            filled += tensor.numel()
        for start, end in pairwise([*bounds, len(sums)]):
            sizes = [tensor.numel() for tensor in sums[start:end]]
            wide = list(self._widened[: sum(sizes)].split(sizes))
            torch._foreach_copy_(wide, gradients[start:end])
            torch._foreach_add_(sums[start:end], wide)


@torch.no_grad()
def _step(self: Any, closure: Callable[[], Any] | None = None) -> None:
    """BF16_Optimizer.step: norm, clipping, update of the fp32 partition, all-gather of bf16 weights."""
    if closure is not None:
        raise NotImplementedError("BF16_Optimizer does not support closures")
    gradients, _ = self.get_grads_for_norm()
    norm = torch.stack(torch._foreach_norm(gradients)).pow(2).sum().pow(0.5)
    self._global_grad_norm = self.norm_reader(norm)
    self.overflow = not math.isfinite(self._global_grad_norm)
    if self.overflow:
        self._global_grad_norm = math.inf
        self.clear_hp_grads()
        self.clear_lp_grads()
        return
    for weights, gradient in zip(
        self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
    ):
        weights.grad = gradient
    basic, factor = self.optimizer, None
    fused = isinstance(basic, Lamb) and bool(basic.copies)
    # Rounding decides near the limit, so do it on the device; there the factor is at most 1.
    if self.clip_grad > 0 and self._global_grad_norm > self.clip_grad * (1 - 1e-4):
        factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1)
    if fused:
        basic.gradient_factor = factor
    elif factor is not None:
        for gradient in self.fp32_groups_gradient_flat_partition:
            gradient.mul_(factor)
    basic.step()
    # Possible only after the first update, which creates the state.
    self._lazy_init_hp_params_optimizer_state()
    if fused:
        deepspeed_utils.all_gather_dp_groups(
            groups_flat=self.bf16_groups_flat,
            partitioned_param_groups=self.bf16_partitioned_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )
    else:
        self.update_lp_params()
    self.clear_hp_grads()


def _model_partitions(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """Of a BF16_Optimizer: this rank's fp32 partitions → the same elements of the model in bf16."""
    return {
        partition: parts[dist.get_rank(group=group)].data
        for partition, parts, group in zip(
            optimizer.fp32_groups_flat_partition,
            optimizer.bf16_partitioned_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
    }


def _sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Summed in DeepSpeed's dtype for norms, rounded to fp32: scalar. On CPUs large tensors are widened in pieces that
    stay in the cache."""
    dtype, large = get_norm_dtype(), []
    if tensors[0].device.type == "cpu":
        large = [tensor for tensor in tensors if tensor.numel() > _WIDENED_ON_CPU]
        tensors = [tensor for tensor in tensors if tensor.numel() <= _WIDENED_ON_CPU]
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)) if tensors else torch.zeros(0, dtype=dtype)
    total = norms.pow(2).sum()
    for tensor in large:
        for piece in tensor.flatten().split(_WIDENED_ON_CPU):
            wide = piece.to(dtype)
            total = total + wide.dot(wide)
    return total.float()


@torch.no_grad()
def _partition_norm(self: Any, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
    """DeepSpeedZeroOptimizer.get_grad_norm_direct: L2 norm over the partitions of all ranks; -1 if it is not finite."""
    if norm_type != 2:
        raise NotImplementedError(f"norm of order {norm_type}; only 2 is used")
    mine = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    mine = [gradient for gradient, _ in zip(mine, params, strict=False)]
    squared = _sum_of_squares(mine).to(self.device) if mine else torch.zeros((), device=self.device)
    dist.all_reduce(squared, group=self.dp_process_group)
    norm = squared.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


@torch.no_grad()
def _unscale_and_clip(self: Any, grad_groups_flat: Any, total_norm: torch.Tensor) -> None:
    """DeepSpeedZeroOptimizer.unscale_and_clip_grads; a norm that is negative or NaN counts as infinite, as there."""
    factor = self.loss_scale
    if self.clip_grad > 0:
        norm = torch.where(total_norm >= 0, total_norm, math.inf)
        factor = ((norm / self.loss_scale + 1e-6) / self.clip_grad).clamp(min=1.0) * self.loss_scale
    elif factor == 1.0:
        return
    for found in grad_groups_flat:
        for gradient in found if isinstance(found, list) else [found]:
            gradient.mul_(1.0 / factor)
