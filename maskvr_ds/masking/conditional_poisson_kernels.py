"""The three scans of conditional_poisson.py as Triton kernels, one program per row: 3 launches instead of 2,274.

The scans have L dependent steps. As list operations each step is a few kernels over all rows, so that a GPU spends its
time on launches: 40% of a BERT-base step at L = 128 (docs/results/benchmarks.md). Here one program does all steps of a
row.

Equal to the bit to the list operations: products and sums of float64 in the same order, and no fused multiply-add
(`enable_fp_fusion=False`), since masks must not depend on the device.
"""

import importlib.util
from typing import Any

import torch

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _suffixes(p, q, table, rows, length, used: tl.constexpr, BLOCK: tl.constexpr):
        """table[b, i, j + 1] = T_i(j). p, q: [L, B]; table: [B, L + 1, BLOCK], of which `used` = K + 2 columns."""
        row = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, BLOCK)
        table += row * (length + 1) * BLOCK
        tl.store(table + length * BLOCK + j, tl.where(j == 1, 1.0, 0.0).to(tl.float64))
        inside = (j > 0) & (j < used)
        for step in range(0, length):
            i = length - 1 - step
            heads, tails = tl.load(p + i * rows + row), tl.load(q + i * rows + row)
            tl.debug_barrier()  # other threads read what these have stored
            below = tl.load(table + (i + 1) * BLOCK + j - 1, mask=inside, other=0.0)
            same = tl.load(table + (i + 1) * BLOCK + j, mask=inside, other=0.0)
            tl.store(table + i * BLOCK + j, same * tails + below * heads)

    @triton.jit
    def _take(p, u, counts, table, taken, rows, length, BLOCK: tl.constexpr):
        """taken[i, b] = 1 if position i is drawn. p, u, taken: [L, B]."""
        row = tl.program_id(0).to(tl.int64)
        table += row * (length + 1) * BLOCK
        state = tl.load(counts + row) + 1
        for i in range(0, length):
            here = tl.load(u + i * rows + row) * tl.load(table + i * BLOCK + state)
            take = here < tl.load(p + i * rows + row) * tl.load(table + (i + 1) * BLOCK + state - 1)
            tl.store(taken + i * rows + row, take.to(tl.int8))
            state = tl.where(take, state - 1, state)

    @triton.jit
    def _joint(
        p, q, counts, table, before, joint, total, rows, length, used: tl.constexpr, BLOCK: tl.constexpr,
        POSITIONS: tl.constexpr,
    ):  # fmt: skip
        """total[i, b] = P(i heads with exactly k in all) / p_i. before: [B, 2, BLOCK + 1]; joint: [B, BLOCK, L]."""
        row = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, BLOCK)
        table += row * (length + 1) * BLOCK
        before += row * 2 * (BLOCK + 1)
        joint += row * BLOCK * length
        count = tl.load(counts + row)
        tl.store(before + j, tl.where(j == count + 1, 1.0, 0.0).to(tl.float64))
        for i in range(0, length):
            heads, tails = tl.load(p + i * rows + row), tl.load(q + i * rows + row)
            now = before + (i % 2) * (BLOCK + 1)
            tl.debug_barrier()
            same = tl.load(now + j, mask=j < used, other=0.0)
            above = tl.load(now + j + 1, mask=j < used - 1, other=0.0)
            after = tl.load(table + (i + 1) * BLOCK + j, mask=j < used - 1, other=0.0)
            tl.store(joint + j * length + i, above * after, mask=j < used - 1)
            tl.store(before + ((i + 1) % 2) * (BLOCK + 1) + j, same * tails + above * heads, mask=j < used)
        tl.debug_barrier()
        positions = tl.arange(0, POSITIONS)
        inside = positions < length
        total_of_row = tl.zeros((POSITIONS,), tl.float64)
        for k in range(0, used - 1):
            total_of_row += tl.load(joint + k * length + positions, mask=inside, other=0.0)
        tl.store(total + positions * rows + row, total_of_row, mask=inside)


class Kernels:
    """The scans of a design of B rows: p, q float64 [L, B] contiguous, counts int64 [B], width K."""

    def __init__(self, p: torch.Tensor, q: torch.Tensor, counts: torch.Tensor, width: int) -> None:
        self._length, self._rows = p.shape
        self._p, self._q, self._counts, self._used = p, q, counts, width + 2
        self._block = triton.next_power_of_2(width + 2)
        self.table = p.new_empty(self._rows, self._length + 1, self._block)
        """T, float64 [B, L + 1, ≥ K + 2]: entry [b, i, j + 1] is T_i(j)."""
        self._launch(_suffixes, p, q, self.table, self._rows, self._length, self._used)

    def taken(self, u: torch.Tensor) -> torch.Tensor:
        """Drawn positions: u float64 [L, B] contiguous → bool [L, B]."""
        taken = torch.empty(self._length, self._rows, dtype=torch.int8, device=u.device)
        self._launch(_take, self._p, u, self._counts, self.table, taken, self._rows, self._length)
        return taken.bool()

    def total(self) -> torch.Tensor:
        """π_i T_0(k) / p_i: float64 [L, B]."""
        before = self._p.new_zeros(self._rows, 2, self._block + 1)
        joint = self._p.new_empty(self._rows, self._block, self._length)
        total = torch.empty_like(self._p)
        self._launch(
            _joint, self._p, self._q, self._counts, self.table, before, joint, total, self._rows, self._length,
            self._used, POSITIONS=triton.next_power_of_2(self._length),
        )  # fmt: skip
        return total

    def _launch(self, kernel: Any, *arguments: Any, **constants: int) -> None:
        if self._rows and self._length:
            kernel[(self._rows,)](*arguments, BLOCK=self._block, **constants, enable_fp_fusion=False)
