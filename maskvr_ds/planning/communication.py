"""Collectives of a step: bytes on the wire and the time that they take. Loads no torch.

Ring algorithms: of a tensor of S bytes on N ranks, an all-reduce sends 2 (N − 1)/N · S per GPU, an all-gather or a
reduce-scatter (N − 1)/N · S.
"""

import math
from dataclasses import dataclass

from maskvr_ds.planning.hardware import Cluster
from maskvr_ds.planning.sizes import EncoderSizes
from maskvr_ds.planning.zero import Zero

# Seconds per collective and doubling of the ranks (assumed).
LATENCY = 12e-6
# Share of an overlapped reduction that a backward pass hides, and share of the pass that can hide (assumed).
_HIDDEN = 0.6
# Elements per bucket of the engine's own all-reduce (deepspeed/runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
_ENGINE_BUCKET = 500_000_000


@dataclass(frozen=True)
class Collective:
    """size: bytes of the complete tensor. times: calls per step. messages: pieces of a call, for one owner. kind:
    "all-reduce", "all-gather", "reduce-scatter" or "reduce". hidden: whether it runs during a backward pass."""

    kind: str
    what: str
    size: float
    times: int
    messages: int
    hidden: bool = False

    def wire(self, ranks: int) -> float:
        """Bytes that a GPU sends per step."""
        factor = 2 if self.kind == "all-reduce" else 1
        return factor * (ranks - 1) / ranks * self.size * self.times

    def calls(self, ranks: int) -> int:
        """Collectives per step. A bucket that is reduced to owners is one for each owner of a part of it: over all
        buckets, their number + N − 1."""
        return self.times * (self.messages + (ranks - 1 if self.kind == "reduce" else 0))


def collectives(sizes: EncoderSizes, zero: Zero, accumulation: int) -> list[Collective]:
    """The large collectives of a step; those of a few numbers (digests, loss, norms) are counted as messages only."""
    P, e, c = sizes.total, zero.element, zero.communicated
    count = math.ceil(P / zero.bucket)
    norms = Collective("all-reduce", "trust ratios, loss, counters", 8.0 * sizes.tensors, 1, 4)
    weights = Collective("all-gather", "weights", e * P, 1, math.ceil(P / 200_000_000))
    if zero.stage == 0:
        return [Collective("all-reduce", "gradients", c * P, 1, math.ceil(P / _ENGINE_BUCKET)), norms]
    if zero.flat_gradients:
        gradients = Collective("all-reduce", "gradients", c * P, 1, math.ceil(P / _ENGINE_BUCKET))
        return [gradients, weights, norms]
    if zero.stage == 1:
        return [Collective("all-reduce", "gradients", c * P, 1, count), weights, norms]
    if zero.stage == 2:
        kind = "reduce" if zero.to_owner else "all-reduce"
        return [Collective(kind, "gradients", c * P, accumulation, count, zero.overlap), weights, norms]
    # Parameters are gathered in every forward pass, and again in the backward pass if they were released meanwhile.
    gathers = accumulation if zero.live >= P else 2 * accumulation
    layers = sizes.layers + 2
    return [
        Collective("reduce-scatter", "gradients", c * P, accumulation, max(count, 1), zero.overlap),
        Collective("all-gather", "weights", e * P, gathers, layers, zero.overlap),
        norms,
    ]


def seconds(found: list[Collective], cluster: Cluster, passes: float) -> float:
    """Time per step that is not hidden behind computation. passes: seconds of the passes that can hide it."""
    if (ranks := cluster.ranks) == 1:
        return 0.0
    exposed = hideable = 0.0
    for one in found:
        time = one.wire(ranks) / cluster.bus() + one.calls(ranks) * LATENCY * math.log2(ranks)
        exposed += time
        hideable += time if one.hidden else 0.0
    return exposed - _HIDDEN * min(hideable, passes)
