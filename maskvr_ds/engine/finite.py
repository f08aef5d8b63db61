"""Check that everything a checkpoint stores is finite: weights, fp32 masters, moments, additional tensors.

Tensors are read where they are, each by the rank that owns it: minima and maxima, which need no temporary tensors, and
one flag per kind, for which the host waits once.

Collectives: one all-reduce of int64 [4]; only if something is not finite, an object all-gather of names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor

from maskvr_ds.optim import lamb
from maskvr_ds.optim.partitions import Layout, layout_of, trainable
from maskvr_ds.runtime import distributed

_KINDS = ("weights", "fp32 weights", "moments", "further")
# Kind -> (name, tensor).
_Tensors = dict[str, list[tuple[str, Tensor]]]


@torch.no_grad()
def nonfinite(engine: deepspeed.DeepSpeedEngine, further: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity on any rank, sorted, identical on all ranks.

    further: name -> tensor of this rank. Padding of partitions, which holds garbage, is ignored. Collective: call on
    all ranks.
    """
    tensors = held_tensors(engine)
    tensors["further"] = list(further.items())
    flags = torch.stack([_any_nonfinite(tensors[kind]) for kind in _KINDS])
    if not any(distributed.all_reduce_sum(flags).tolist()):
        return []
    found = [name for of_kind in tensors.values() for name, tensor in of_kind if not _is_finite([tensor])]
    return sorted({name for of_rank in distributed.gather_objects(found) for name in of_rank})


def _any_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
    """int64 scalar on this rank's device: 0, or 1 if a value is not finite. The host does not wait."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    finite = [_is_finite(of_device).to(distributed.device()) for of_device in by_device.values()]
    flag = torch.zeros((), dtype=torch.int64, device=distributed.device())
    return flag + ~torch.stack(finite).all() if finite else flag


def _is_finite(tensors: list[Tensor]) -> Tensor:
    """Bool scalar. tensors: on one device. `aminmax` propagates NaN, and reads at ten times the speed of a copy."""
    extremes = [torch.stack(torch.aminmax(t)).double() for t in tensors if t.is_floating_point() and t.numel()]
    return torch.isfinite(torch.stack(extremes)).all() if extremes else torch.tensor(True)


def held_tensors(engine: Any) -> _Tensors:
    """Kind -> (name, tensor) of everything that this rank holds or, from ZeRO 1 on, owns."""
    optimizer = engine.basic_optimizer
    tensors: _Tensors = {kind: [] for kind in _KINDS}
    if engine.zero_optimization_stage() == 0:  # whole tensors on every rank, flat ones in bf16 with a fused optimizer
        tensors["weights"] += engine.module.named_parameters()
        for group in optimizer.param_groups:
            names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
            for name, master in zip(names, group["params"], strict=False):
                if engine.optimizer is not optimizer:  # else it is the model's own
                    tensors["fp32 weights"].append((f"fp32 weights of {name}", master.detach()))
                tensors["moments"] += [(f"{key} of {name}", t) for key, t in _state(optimizer, master)]
        return tensors
    given = [p for group in lamb.parameter_groups(engine.module) for _, p in group["params"]]
    layout = layout_of(engine, trainable([{"params": given}]), optimizer.param_groups, check=False)
    for flat in layout.partitions:
        _add_partition(tensors, optimizer, layout, flat)
    return tensors


def _add_partition(tensors: _Tensors, optimizer: torch.optim.Optimizer, layout: Layout, flat: Tensor) -> None:
    fragments = layout.partitions[flat].fragments
    names = [layout.names[fragment.tensor] for fragment in fragments]
    for name, fragment in zip(names, fragments, strict=True):
        tensors["weights"].append((name, fragment.of_model(layout.tensors[fragment.tensor])))
        tensors["fp32 weights"].append((f"fp32 weights of {name}", fragment.of_partition(flat.detach())))
    for key, value in _state(optimizer, flat):
        if value.numel() == flat.numel():
            views = zip(names, fragments, strict=True)
            tensors["moments"] += [(f"{key} of {name}", fragment.of_partition(value)) for name, fragment in views]
        elif value.numel() == 1:  # a step counter
            tensors["moments"].append((key, value))


def _state(optimizer: torch.optim.Optimizer, flat: Tensor) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in optimizer.state.get(flat, {}).items() if isinstance(value, Tensor)]
