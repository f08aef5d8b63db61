"""Layout of the model's tensors in the partitions that DeepSpeed passes to an optimizer.

Stage 0: full tensors (fp32), or full fp32 master copies of them (bf16: FP16_UnfusedOptimizer).
Stages 1, 2 and BF16_Optimizer: one flat fp32 partition per parameter group and rank. The group's tensors are
concatenated, padded, and split into equal shares, so that tensors start, end and straddle ranks anywhere.
Stage 3: one flat fp32 partition per sub-group and rank. Every tensor is split into equal shares separately, the last
ones padded, and a partition is the concatenation of this rank's shares. The padding holds garbage.

With CPU offload the partitions are in host memory while the model, and perhaps the process group, is on the device.

No collectives.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one tensor inside one partition of this rank, without padding; all in elements."""

    tensor: int  # index in Layout.tensors
    tensor_start: int
    partition_start: int
    length: int

    def of_partition(self, flat: Tensor) -> Tensor:
        if self.length == flat.numel():
            return flat  # a full tensor keeps its shape: foreach kernels need no flattening
        return flat.narrow(0, self.partition_start, self.length)

    def of_model(self, tensor: Tensor) -> Tensor:
        """The fragment in the weights that the model computes with, in their dtype, on their device."""
        if hasattr(tensor, "ds_tensor"):
            return tensor.ds_tensor.detach().narrow(0, 0, self.length)  # this rank's share, without its padding
        return tensor.detach().view(-1).narrow(0, self.tensor_start, self.length)


@dataclass(frozen=True)
class Partition:
    """One of the tensors in an optimizer's `param_groups`."""

    fragments: list[Fragment]  # on this rank, in order of position; empty if it holds only padding
    members: list[int]  # all tensors with a fragment in it on any rank: indices in Layout.tensors

    def views(self, flat: Tensor) -> list[Tensor]:
        """Fragments of a tensor that is laid out like this partition: `Fragment.of_partition` of each, in one call."""
        if len(self.fragments) == 1:
            return [self.fragments[0].of_partition(flat)]
        sizes, used = self._cuts
        return list(compress(flat.narrow(0, 0, sum(sizes)).split(sizes), used)) if sizes else []

    @property
    def is_dense(self) -> bool:
        """Whether the fragments are contiguous from the first element on."""
        return all(self._cuts[1])

    @property
    def end(self) -> int:
        """End of the last fragment, exclusive."""
        return sum(self._cuts[0])

    @cached_property
    def _cuts(self) -> tuple[list[int], list[bool]]:
        """Sizes of fragments and gaps up to the end of the last fragment, and which of them are fragments."""
        sizes: list[int] = []
        used: list[bool] = []
        end = 0
        for fragment in self.fragments:
            if gap := fragment.partition_start - end:
                assert gap > 0, "fragments must be in order"
                sizes.append(gap)
                used.append(False)
            sizes.append(fragment.length)
            used.append(True)
            end = fragment.partition_start + fragment.length
        return sizes, used


@dataclass(frozen=True)
class Layout:
    """All partitions of an optimizer, and the process group to sum over."""

    tensors: list[Tensor]  # the model's T parameters, in the same order on all ranks
    names: list[str]
    partitions: dict[Tensor, Partition]
    process_group: dist.ProcessGroup | None = None  # None: all ranks hold full tensors
    device: torch.device | None = None  # of the process group's collectives

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor, before partitioning."""
        # Stage 3 replaces a partitioned tensor with an empty one.
        return [int(getattr(t, "ds_numel", t.numel())) for t in self.tensors]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share the tensors: one all-reduce, or none if each rank holds full tensors."""
        if self.process_group is None:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, group=self.process_group)
        return moved.to(values.device)


def trainable(param_groups: list[dict[str, Any]]) -> list[Tensor]:
    """Tensors of the groups that DeepSpeed's optimizers own: trainable, with at least one element."""
    # Stage 3 replaces a partitioned tensor with an empty one.
    return [
        p for group in param_groups for p in group["params"] if p.requires_grad and getattr(p, "ds_numel", p.numel())
    ]


def whole_tensors(param_groups: list[dict[str, Any]]) -> Layout:
    """Layout without DeepSpeed: every "partition" is a parameter."""
    tensors = [p for group in param_groups for p in group["params"]]
    names: list[str] = []
    for number, group in enumerate(param_groups):
        names += group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
    return _one_to_one(tensors, tensors, names)


def _one_to_one(present: list[Tensor], tensors: list[Tensor], names: list[str]) -> Layout:
    partitions = {p: Partition([Fragment(i, 0, 0, p.numel())], [i]) for i, p in enumerate(present)}
    return Layout(tensors, names, partitions)


def layout_of(engine: Any, given: list[Tensor], param_groups: list[dict[str, Any]], *, check: bool = True) -> Layout:
    """Layout of an optimizer's partitions after `deepspeed.initialize`.

    Args:
        engine: a `deepspeed.DeepSpeedEngine`.
        given: the parameters that the optimizer was constructed with.
        param_groups: the optimizer's, with DeepSpeed's partitions in them.
        check: compare every fragment with the model's weights, for which the host waits.

    Raises:
        ValueError: if the engine uses a feature that would give wrong norms or is untested.
        RuntimeError: if a fragment differs from the model's weights at its place.
    """
    _check_supported(engine)
    tensors = trainable([{"params": given}])
    names = [engine.param_names[t] for t in tensors]
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        present = trainable(param_groups)
        if [p.shape for p in present] != [t.shape for t in tensors]:
            raise ValueError(f"not supported at ZeRO stage 0: {type(engine.optimizer).__name__}")
        return _one_to_one(present, tensors, names)
    if stage == 3:
        partitions = _stage3_partitions(engine.optimizer, tensors)
        groups = {t.ds_process_group for t in tensors}  # type: ignore[attr-defined]
    else:
        partitions = _flat_partitions(param_groups, engine.optimizer, tensors)
        groups = {t._dp_group for t in tensors}  # type: ignore[attr-defined]
    if len(groups) > 1:
        raise ValueError("not supported: parameters partitioned over different process groups")
    layout = Layout(tensors, names, partitions, groups.pop(), torch.device(engine.device))
    if check:
        _check(layout)
    return layout


def _check(layout: Layout) -> None:
    """Raise RuntimeError if a fragment, rounded to the model's dtype, differs from the model's weights: the layout
    relies on DeepSpeed's internals, which may change."""
    for flat, partition in layout.partitions.items():
        for fragment in partition.fragments:
            in_model = fragment.of_model(layout.tensors[fragment.tensor])
            if not torch.equal(fragment.of_partition(flat.detach()).to(in_model), in_model):
                raise RuntimeError(
                    f"{layout.names[fragment.tensor]}: the optimizer's fragment differs from the model's weights. "
                    "Either the weights were changed after deepspeed.initialize (call bind before), or this version "
                    "of DeepSpeed partitions differently (tested with 0.19)"
                )


def _check_supported(engine: Any) -> None:
    stage = int(engine.zero_optimization_stage())
    offload = engine.zero_offload_optimizer()
    where, ratio = (str(getattr(offload.device, "value", offload.device)), offload.ratio) if offload else ("none", 1.0)
    scalers = (engine.torch_autocast_z0_gradscaler, getattr(engine.optimizer, "torch_autocast_gradscaler", None))
    parameters = engine.zero_offload_param()
    sharding = engine._config.zero_config
    unsupported = {
        f"ZeRO stage {stage}": stage not in (0, 1, 2, 3),
        f"optimizer offload to {where}": where not in ("none", "cpu"),
        # DeepSpeed 0.19 divides the gradients by a loss scale that it never applied: deepspeedai/DeepSpeed#8393.
        "fp16 without ZeRO": stage == 0 and engine.fp16_enabled(),
        # DeepSpeed would ignore it.
        "optimizer offload without ZeRO": stage == 0 and where != "none",
        f"partial optimizer offload (ratio {ratio})": ratio != 1.0,
        "SuperOffload": bool(offload and offload.super_offload),
        "parameter offload": bool(parameters) and str(getattr(parameters.device, "value", parameters.device)) != "none",
        # It may skip the step of one partition, for which the others would wait.
        "torch_autocast in fp16": any(scaler is not None for scaler in scalers),
        "hpZ": sharding.zero_hpz_partition_size > 1,
        "quantized weights": bool(sharding.zero_quantized_weights),
        "ZenFlow": bool(engine.zenflow),
        "mixture of experts": engine.has_moe_layers,
        "model parallelism": engine.mp_world_size > 1,
        "pipeline parallelism": engine.pipeline_parallelism,
    }
    if found := [what for what, used in unsupported.items() if used]:
        raise ValueError(
            f"not supported: {', '.join(found)}; supported: data parallelism in fp32 and bf16 at ZeRO stages 0 to 3 "
            "and in fp16 at stages 1 to 3, with the optimizer on the device or (stages 1 to 3) entirely on the CPU"
        )


def _flat_partitions(
    param_groups: list[dict[str, Any]], zero_optimizer: Any, tensors: list[Tensor]
) -> dict[Tensor, Partition]:
    """Stages 1 and 2: one partition per group, a share of the group's concatenated tensors."""
    index = {t: i for i, t in enumerate(tensors)}
    partitions = {}
    for number, group in enumerate(param_groups):
        (flat,) = group["params"]
        fragments = []
        if hasattr(zero_optimizer, "round_robin_bit16_groups"):
            # In storage order. `_hp_mapping`, which DeepSpeed's own accessors use, is wrong with round_robin_gradients
            # (0.19: link_hp_params counts in the order of the model).
            parameters = zero_optimizer.round_robin_bit16_groups[number]
            share_start = flat.numel() * dist.get_rank(zero_optimizer.real_dp_process_group[number])
            for parameter, offset in zip(parameters, zero_optimizer.round_robin_bit16_offsets[number], strict=True):
                start, end = max(offset, share_start), min(offset + parameter.numel(), share_start + flat.numel())
                if start < end:
                    fragments.append(Fragment(index[parameter], start - offset, start - share_start, end - start))
        else:  # BF16_Optimizer
            parameters = zero_optimizer.bf16_groups[number]
            for parameter in parameters:
                if (mapping := parameter._hp_mapping) is not None:  # None: entirely on other ranks
                    inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
                    fragments.append(Fragment(index[parameter], outside.start, inside.start, inside.numel))
        partitions[flat] = Partition(fragments, [index[p] for p in parameters])
    return partitions


def _stage3_partitions(zero_optimizer: Any, tensors: list[Tensor]) -> dict[Tensor, Partition]:
    """Stage 3: one partition per sub-group, the concatenation of this rank's shares of its parameters."""
    index = {t: i for i, t in enumerate(tensors)}
    partitions = {}
    for flat, parameters in zip(zero_optimizer.fp32_partitioned_groups_flat, zero_optimizer.fp16_groups, strict=True):
        fragments, offset = [], 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = share * dist.get_rank(parameter.ds_process_group)
            length = min(share, parameter.ds_numel - start)  # the rest is padding
            if length > 0:
                fragments.append(Fragment(index[parameter], start, offset, length))
            offset += share
        assert offset == flat.numel()
        partitions[flat] = Partition(fragments, [index[p] for p in parameters])
    return partitions
