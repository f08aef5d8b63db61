"""Comparison of what several ranks hold a copy of: weights, at ZeRO 0 also fp32 masters and moments.

A memory or network fault on one rank leaves its copy unlike the others', and no loss says so. What is replicated:

| ZeRO | compared |
|---|---|
| 0 | the model's weights, fp32 masters, moments |
| 1, 2 | the model's weights; masters and moments exist once |
| 3 | the weights that every rank keeps (DeepSpeed's stage3_param_persistence_threshold); all others exist once |

Hashes are made where the tensors are, one per tensor. Collectives: one all-reduce of int64 [W] (W ranks) per
comparison; only if copies differ, object all-gathers of hashes and host names.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskvr_ds import hashing
from maskvr_ds.engine.finite import held_tensors
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.distributed import ReplicaError

# Elements hashed at a time: a hash needs several int64 tensors of this size.
_CHUNK = 1 << 22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_replicas(engine: Any, step: int) -> None:
    """Compare the copies of all ranks. Collective: call on all ranks, between steps. Raises ReplicaError on all ranks,
    naming the ranks unlike the most common ones, their hosts, and tensors."""
    ranks = distributed.world_size()
    if ranks == 1:
        return
    tensors = replicated_tensors(engine)
    hashes = [bits_hash(tensor).to(distributed.device()) for _, tensor in tensors]
    mine = bits_hash(torch.stack(hashes)) if hashes else torch.zeros((), dtype=torch.int64)
    of_ranks = torch.zeros(ranks, dtype=torch.int64, device=distributed.device())
    of_ranks[distributed.rank()] = mine
    found: list[int] = distributed.all_reduce_sum(of_ranks).tolist()
    if len(set(found)) == 1:
        return
    listed = distributed.gather_objects([int(value) for value in hashes])
    names = [name for name, _ in tensors]
    raise ReplicaError(_describe(step, found, listed, names, distributed.gather_objects(socket.gethostname())))


def replicated_tensors(engine: Any) -> list[tuple[str, Tensor]]:
    """Name and tensor of everything that all ranks hold a copy of; the same names in the same order on all ranks."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [entry for of_kind in held_tensors(engine).values() for entry in of_kind]
    weights = [(name, parameter.detach()) for name, parameter in engine.module.named_parameters()]
    if stage < 3:
        return weights
    return [
        (name, parameter.detach())
        for name, parameter in engine.module.named_parameters()
        if parameter.ds_persist and parameter.numel() == parameter.ds_numel
    ]


def bits_hash(tensor: Tensor) -> Tensor:
    """int64 []: hash of a tensor's bits, depending on their order."""
    flat = tensor.detach().reshape(-1)
    flat = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        bits = flat[start : start + _CHUNK].long()
        total += hashing.mix(hashing.mix(bits) ^ torch.arange(start, start + len(bits), device=flat.device)).sum()
    return total


def _describe(
    step: int, found: Sequence[int], listed: Sequence[Sequence[int]], names: Sequence[str], hosts: Sequence[str]
) -> str:
    """found: hash by rank; listed: hashes of all tensors, by rank."""
    # If several are equally frequent, that of the lowest rank.
    (common, count), *_ = Counter(found).most_common(1)
    reference = found.index(common)
    different = [rank for rank, value in enumerate(found) if value != common]
    who = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in different)
    unlike = [
        name
        for number, name in enumerate(names)
        if any(listed[rank][number] != listed[reference][number] for rank in different)
    ]
    what = ", ".join(unlike[:3]) + (f" and {len(unlike) - 3} more" if len(unlike) > 3 else "")
    doubt = "" if count > len(found) / 2 else "; there is no majority, so the fault may be on either side"
    return (
        f"step {step}: {what} on {who} unlike those on rank {reference} ({hosts[reference]}), due to a memory or "
        f"network fault{doubt}. Not saved; resume from the last checkpoint, without that host. If GPUs of several "
        "kinds compute unlike copies at ZeRO 0, replicas.enabled: false stops the comparison"
    )
