"""Where the model's tensors lie in what DeepSpeed hands to an optimizer.

Stage 0: whole tensors (fp32), or whole fp32 master copies of them (bf16: FP16_UnfusedOptimizer).
Stages 1, 2 and BF16_Optimizer: one flat fp32 partition per parameter group and rank. The group's tensors are laid end
to end, padded, and cut into equal shares, so that tensors begin, end and straddle ranks anywhere.
Stage 3: one flat fp32 partition per sub-group and rank. Every tensor is cut into equal shares by itself, the last ones
padded, and a partition is the row of this rank's shares. The pads hold garbage.

With CPU offload the partitions are in host memory while the model, and perhaps the process group, is on the device.

Calls no collective.
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
    """One contiguous piece of one tensor inside one partition of this rank; all in elements, pads left out."""

    tensor: int  # index in Layout.tensors
    tensor_start: int
    partition_start: int
    length: int

    def of_partition(self, flat: Tensor) -> Tensor:
        if self.length == flat.numel():
            return flat  # a whole tensor keeps its shape: foreach kernels need no flattening
        return flat.narrow(0, self.partition_start, self.length)

    def of_model(self, tensor: Tensor) -> Tensor:
        """The piece in the weights that the model computes with, in their dtype, on their device."""
        if hasattr(tensor, "ds_tensor"):
            return tensor.ds_tensor.detach().narrow(0, 0, self.length)  # this rank's share and its pad
        return tensor.detach().view(-1).narrow(0, self.tensor_start, self.length)


@dataclass(frozen=True)
class Partition:
    """One of the tensors in an optimizer's `param_groups`."""

    fragments: list[Fragment]  # on this rank, as they lie; none where it holds only padding
    members: list[int]  # every tensor with a piece in it on any rank: indices in Layout.tensors

    def views(self, flat: Tensor) -> list[Tensor]:
        """The fragments of a tensor that is laid out like this partition: as `Fragment.of_partition`, in one call."""
        if len(self.fragments) == 1:
            return [self.fragments[0].of_partition(flat)]
        sizes, held = self._cuts
        return list(compress(flat.narrow(0, 0, sum(sizes)).split(sizes), held)) if sizes else []

    @property
    def is_dense(self) -> bool:
        """Whether the fragments follow each other from the first element on, without a gap."""
        return all(self._cuts[1])

    @property
    def end(self) -> int:
        """Where the last fragment ends."""
        return sum(self._cuts[0])

    @cached_property
    def _cuts(self) -> tuple[list[int], list[bool]]:
        """Sizes of what lies there up to the last fragment's end, fragments and gaps, and which are fragments."""
        sizes: list[int] = []
        held: list[bool] = []
        end = 0
        for fragment in self.fragments:
            if gap := fragment.partition_start - end:
                assert gap > 0, "in the order in which they lie"
                sizes.append(gap)
                held.append(False)
            sizes.append(fragment.length)
            held.append(True)
            end = fragment.partition_start + fragment.length
        return sizes, held


@dataclass(frozen=True)
class Layout:
    """All partitions of an optimizer, and what it takes to add up over the ranks."""

    tensors: list[Tensor]  # the model's parameters, T of them, the same order on every rank
    names: list[str]
    partitions: dict[Tensor, Partition]
    process_group: dist.ProcessGroup | None = None  # None: every rank holds whole tensors
    device: torch.device | None = None  # where the process group can reduce

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share the tensors: one collective, or none where each holds whole ones."""
        if self.process_group is None:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, group=self.process_group)
        return moved.to(values.device)


def trained(param_groups: list[dict[str, Any]]) -> list[Tensor]:
    """The tensors of the groups that DeepSpeed's optimizers own: trainable, with at least one element."""
    # Stage 3 leaves an empty tensor in place of one that it has partitioned.
    return [
        p for group in param_groups for p in group["params"] if p.requires_grad and getattr(p, "ds_numel", p.numel())
    ]


def whole_tensors(param_groups: list[dict[str, Any]]) -> Layout:
    """The layout without DeepSpeed: every "partition" is a parameter."""
    tensors = [p for group in param_groups for p in group["params"]]
    names: list[str] = []
    for number, group in enumerate(param_groups):
        names += group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
    return _one_to_one(tensors, tensors, names)


def _one_to_one(held: list[Tensor], tensors: list[Tensor], names: list[str]) -> Layout:
    partitions = {p: Partition([Fragment(i, 0, 0, p.numel())], [i]) for i, p in enumerate(held)}
    return Layout(tensors, names, partitions)


def layout_of(engine: Any, given: list[Tensor], param_groups: list[dict[str, Any]]) -> Layout:
    """The layout that DeepSpeed made of an optimizer.

    Args:
        engine: a `deepspeed.DeepSpeedEngine`.
        given: the parameters that the optimizer was made for.
        param_groups: the optimizer's, as DeepSpeed left them.

    Raises:
        ValueError: the engine uses something in which norms would be wrong or that is not tested.
    """
    _refuse_unsupported(engine)
    tensors = trained([{"params": given}])
    names = [engine.param_names[t] for t in tensors]
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        held = trained(param_groups)
        if [p.shape for p in held] != [t.shape for t in tensors]:
            raise ValueError(f"not supported at ZeRO stage 0: {type(engine.optimizer).__name__}")
        return _one_to_one(held, tensors, names)
    if stage == 3:
        partitions = _stage3_partitions(engine.optimizer, tensors)
        groups = {t.ds_process_group for t in tensors}  # type: ignore[attr-defined]
    else:
        partitions = _flat_partitions(param_groups, engine.optimizer, tensors)
        groups = {t._dp_group for t in tensors}  # type: ignore[attr-defined]
    if len(groups) > 1:
        raise ValueError("not supported: parameters partitioned over different process groups")
    layout = Layout(tensors, names, partitions, groups.pop(), torch.device(engine.device))
    _check(layout)
    return layout


def _check(layout: Layout) -> None:
    """Raise RuntimeError where a piece is not, rounded, what the model has there: all of this rests on where DeepSpeed
    put things, and it may put them elsewhere one day."""
    for flat, partition in layout.partitions.items():
        for fragment in partition.fragments:
            in_model = fragment.of_model(layout.tensors[fragment.tensor])
            if not torch.equal(fragment.of_partition(flat.detach()).to(in_model), in_model):
                raise RuntimeError(
                    f"{layout.names[fragment.tensor]}: the optimizer's piece of it is not what the model has there. "
                    "Either the model's weights were changed after deepspeed.initialize: call bind before; or this "
                    "version of DeepSpeed partitions otherwise: tested with 0.19"
                )


def _refuse_unsupported(engine: Any) -> None:
    stage = int(engine.zero_optimization_stage())
    offload = engine.zero_offload_optimizer()
    where, ratio = (str(getattr(offload.device, "value", offload.device)), offload.ratio) if offload else ("none", 1.0)
    scalers = (engine.torch_autocast_z0_gradscaler, getattr(engine.optimizer, "torch_autocast_gradscaler", None))
    parameters = engine.zero_offload_param()
    sharding = engine._config.zero_config
    unsupported = {
        f"ZeRO stage {stage}": stage not in (0, 1, 2, 3),
        f"optimizer offload to {where}": where not in ("none", "cpu"),
        # DeepSpeed 0.19 divides the gradients by a loss scale that it has never applied: deepspeedai/DeepSpeed#8393.
        "fp16 without ZeRO": stage == 0 and engine.fp16_enabled(),
        # DeepSpeed would not heed it.
        "optimizer offload without ZeRO": stage == 0 and where != "none",
        f"partial optimizer offload (ratio {ratio})": ratio != 1.0,
        "SuperOffload": bool(offload and offload.super_offload),
        "parameter offload": bool(parameters) and str(getattr(parameters.device, "value", parameters.device)) != "none",
        # A step that it skips for one partition never comes, and the others wait.
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
            f"not supported: {', '.join(found)}; supported: data parallelism in fp32 and bf16 with ZeRO stages 0 to 3, "
            "in fp16 with stages 1 to 3, and with these the optimizer on the device or as a whole on the CPU"
        )


def _flat_partitions(
    param_groups: list[dict[str, Any]], zero_optimizer: Any, tensors: list[Tensor]
) -> dict[Tensor, Partition]:
    """Stages 1 and 2: one partition per group, a share of the group's tensors laid end to end."""
    index = {t: i for i, t in enumerate(tensors)}
    partitions = {}
    for number, group in enumerate(param_groups):
        (flat,) = group["params"]
        fragments = []
        if hasattr(zero_optimizer, "round_robin_bit16_groups"):
            # In the order in which they lie there. `_hp_mapping`, which DeepSpeed's own accessors go by, is wrong with
            # round_robin_gradients (0.19: link_hp_params counts in the order of the model).
            parameters = zero_optimizer.round_robin_bit16_groups[number]
            share_start = flat.numel() * dist.get_rank(zero_optimizer.real_dp_process_group[number])
            for parameter, offset in zip(parameters, zero_optimizer.round_robin_bit16_offsets[number], strict=True):
                start, end = max(offset, share_start), min(offset + parameter.numel(), share_start + flat.numel())
                if start < end:
                    fragments.append(Fragment(index[parameter], start - offset, start - share_start, end - start))
        else:  # BF16_Optimizer
            parameters = zero_optimizer.bf16_groups[number]
            for parameter in parameters:
                if (mapping := parameter._hp_mapping) is not None:  # None: lies wholly on other ranks
                    inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
                    fragments.append(Fragment(index[parameter], outside.start, inside.start, inside.numel))
        partitions[flat] = Partition(fragments, [index[p] for p in parameters])
    return partitions


def _stage3_partitions(zero_optimizer: Any, tensors: list[Tensor]) -> dict[Tensor, Partition]:
    """Stage 3: one partition per sub-group, the row of this rank's shares of the sub-group's parameters."""
    index = {t: i for i, t in enumerate(tensors)}
    partitions = {}
    for flat, parameters in zip(zero_optimizer.fp32_partitioned_groups_flat, zero_optimizer.fp16_groups, strict=True):
        fragments, offset = [], 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = share * dist.get_rank(parameter.ds_process_group)
            length = min(share, parameter.ds_numel - start)  # what follows it is pad
            if length > 0:
                fragments.append(Fragment(index[parameter], start, offset, length))
            offset += share
        assert offset == flat.numel()
        partitions[flat] = Partition(fragments, [index[p] for p in parameters])
    return partitions
