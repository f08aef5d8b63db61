"""LAMB's update in two Triton kernels: 42 bytes of memory traffic per parameter instead of 108, and no buffer for u.

The first kernel scales the gradients, updates the moments and sums the squares of weights and of u; after the norms
were summed over the ranks (layerwise.py), the second computes u again, subtracts it, and writes the weights in bf16 too
where the model trains in it. Both run over blocks of at most BLOCK elements, each
of which lies in one fragment of one tensor, so that the sums of a block belong to one tensor. Sums are taken by a table
in a fixed order: results do not depend on scheduling.

Equal to the list operations of lamb.py up to rounding. Runs on GPUs, and by Triton's interpreter on a CPU
(TRITON_INTERPRET=1) for tests. Imported only if asked for: Triton comes with torch for GPUs only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskvr_ds.optim.partitions import Partition

BLOCK = 4096
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Coefficients:
    """Scalars of u = m / (root · √v + eps) + decay · w, and of the moments."""

    beta1: float
    beta2: float
    root: float
    eps: float
    decay: float


@triton.jit
def _advance(
    weights, gradients, firsts, seconds, blocks, scale, sums, count,
    one_minus_beta1, beta2, one_minus_beta2, root, eps, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments of one block, and Σw² and Σu². blocks: int64 [3, count]: partition, first element, elements."""
    block = tl.program_id(0).to(tl.int64)
    partition = tl.load(blocks + block)
    start, length = tl.load(blocks + count + block), tl.load(blocks + 2 * count + block)
    offsets = start + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < length
    w = tl.load(tl.load(weights + partition).to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    g = tl.load(tl.load(gradients + partition).to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    g = g * tl.load(scale)
    m_at = tl.load(firsts + partition).to(tl.pointer_type(tl.float32)) + offsets
    v_at = tl.load(seconds + partition).to(tl.pointer_type(tl.float32)) + offsets
    m = tl.load(m_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    u = tl.where(inside, m / (root * tl.sqrt(v) + eps) + decay * w, 0.0)
    tl.store(sums + block, tl.sum(w * w, axis=0))
    # One more column, a zero, pads the table of tensors with fewer blocks.
    tl.store(sums + count + 1 + block, tl.sum(u * u, axis=0))


@triton.jit
def _bfloat16_bits(x):
    """fp32 rounded to bf16, ties to even, as int16. By integers, since Triton's interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _subtract(
    weights, firsts, seconds, copies, blocks, tensors, ratios, count, lr, root, eps, decay,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w ← w − lr · ratio · u in one block, and its bf16 copy. tensors: int64 [count], index of each block's tensor in
    `ratios`."""
    block = tl.program_id(0).to(tl.int64)
    partition = tl.load(blocks + block)
    start, length = tl.load(blocks + count + block), tl.load(blocks + 2 * count + block)
    offsets = start + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < length
    w_at = tl.load(weights + partition).to(tl.pointer_type(tl.float32)) + offsets
    w = tl.load(w_at, mask=inside, other=0.0)
    m_at = tl.load(firsts + partition).to(tl.pointer_type(tl.float32)) + offsets
    v_at = tl.load(seconds + partition).to(tl.pointer_type(tl.float32)) + offsets
    m = tl.load(m_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    u = tl.where(inside, m / (root * tl.sqrt(v) + eps) + decay * w, 0.0)
    ratio = tl.load(ratios + tl.load(tensors + block))
    w = w - lr * (ratio * u)
    tl.store(w_at, w, mask=inside)
    if COPY:
        copy_at = tl.load(copies + partition).to(tl.pointer_type(tl.int16)) + offsets
        tl.store(copy_at, _bfloat16_bits(w), mask=inside)


class FusedUpdate:
    """Pending update of some partitions with equal coefficients: moments are updated, weights are not yet."""

    def __init__(
        self,
        partitions: Sequence[Tensor],
        gradients: Sequence[Tensor],
        firsts: Sequence[Tensor],
        seconds: Sequence[Tensor],
        layouts: Sequence[Partition],
        coefficients: Coefficients,
        scale: Tensor | None,
        copies: Sequence[Tensor] = (),
    ) -> None:
        """Update the moments. All tensors fp32 and contiguous, on one device. scale: of the gradients, fp32 scalar.
        copies: of the partitions, bf16 and contiguous, written by `subtract`; none or one for each."""
        device = partitions[0].device
        check_tensors([*partitions, *gradients, *firsts, *seconds])
        if any(c.dtype != torch.bfloat16 or not c.is_contiguous() for c in copies):
            raise RuntimeError("fused LAMB writes copies of the weights in contiguous bf16 tensors only")
        self._tensors = (partitions, firsts, seconds, copies or partitions)  # keeps the memory of the addresses
        self._copies = bool(copies)
        self._coefficients = coefficients
        self._addresses = [_addresses(tuple(t.data_ptr() for t in tensors), device) for tensors in self._tensors]
        key = tuple(tuple((f.tensor, f.partition_start, f.length) for f in layout.fragments) for layout in layouts)
        self._blocks, self._owners, self._order = _block_table(key, device)
        self._count = len(self._owners)
        self._sums = torch.zeros(2, self._count + 1, device=device)
        if self._count:
            c = coefficients
            _advance[(self._count,)](
                self._addresses[0], _addresses(tuple(g.data_ptr() for g in gradients), device),
                self._addresses[1], self._addresses[2], self._blocks,
                torch.ones((), device=device) if scale is None else scale.float(), self._sums, self._count,
                1 - c.beta1, c.beta2, 1 - c.beta2, c.root, c.eps, c.decay, BLOCK=BLOCK,
            )  # fmt: skip

    def add_squares(self, squares: Tensor) -> None:
        """Add Σw² and Σu² of this update's fragments to fp32 [2, T]."""
        if self._count:
            present, table = self._order
            squares[:, present] += self._sums[:, table].sum(2)

    def subtract(self, ratios: Tensor, lr: float) -> None:
        """w ← w − lr · ratio · u, also in the copies. ratios: fp32 [T]."""
        if self._count:
            c = self._coefficients
            _subtract[(self._count,)](
                *self._addresses, self._blocks, self._owners, ratios, self._count, lr, c.root, c.eps, c.decay,
                COPY=self._copies, BLOCK=BLOCK,
            )  # fmt: skip


def check_tensors(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for tensors that the kernels do not take."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            found = (
                tensor.dtype if tensor.is_contiguous() else f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"
            )
            raise RuntimeError(f"fused LAMB needs contiguous fp32 tensors, found {found}; set fused=False")
        if tensor.device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(f"fused LAMB needs tensors on a GPU, found {tensor.device}; set fused=False")


@lru_cache(maxsize=64)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses of tensors as int64 on the device, copied only if they have changed."""
    return torch.tensor(pointers, dtype=torch.int64).to(device)


@lru_cache(maxsize=16)
def _block_table(fragments: Any, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Blocks of partitions whose fragments are ((tensor, first element, elements), …) each.

    Returns int64 [3, N] (partition, first element, elements), int64 [N] (tensor), and how to sum by tensor: the tensors
    with blocks, int64 [P], and the blocks of each, int64 [P, most], padded with N.
    """
    rows: list[tuple[int, int, int]] = []
    owners: list[int] = []
    for partition, parts in enumerate(fragments):
        for tensor, start, length in parts:
            for first in range(0, length, BLOCK):
                rows.append((partition, start + first, min(BLOCK, length - first)))
                owners.append(tensor)
    places: dict[int, list[int]] = {}
    for block, tensor in enumerate(owners):
        places.setdefault(tensor, []).append(block)
    most = max(map(len, places.values()), default=0)
    table = [blocks + [len(owners)] * (most - len(blocks)) for blocks in places.values()]
    return (
        torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.contiguous().to(device),
        torch.tensor(owners, dtype=torch.int64).to(device),
        (torch.tensor(list(places), dtype=torch.int64).to(device), torch.tensor(table, dtype=torch.int64).to(device)),
    )
