"""Conditional Poisson sampling: masks of fixed size with exactly known probability.

B sequences, L positions, K predictions per sequence at most. n_b is the number of maskable positions of row b,
k_b ≤ min(n_b, K) the number drawn. o_i ≥ 0 are the odds of position i, 0 if it is not maskable.

Toss a coin with odds o_i at every position and repeat until exactly k show heads ("rejective" sampling:
Hájek 1964, "Asymptotic theory of rejective sampling with varying probabilities from a finite population"). Then

    q(M) = Π_{i∈M} o_i / e_k(o)   for every set M of k positions,

e_k being the k-th elementary symmetric polynomial, and of all designs with the same inclusion probabilities this
one has the largest entropy (Chen, Dempster & Liu 1994, "Weighted finite population sampling to maximize entropy").
q is invariant to scaling all odds of a row by a constant.

Differences from the paper: the table stores a probability instead of e_j, which neither over- nor underflows. With
x_i = o_i / o_(k), o_(k) the k-th largest of the row, p = x/(1 + x) and q = 1/(1 + x), the table holds

    T_i(j) = P(j heads among the positions i, i+1, …, L−1) = e_j(x_i, …, x_{L−1}) / Π_{l≥i} (1 + x_l),
    T_i(j) = q_i T_{i+1}(j) + p_i T_{i+1}(j − 1).

The k largest have p ≥ 1/2 and the others q ≥ 1/2, hence T_0(k) ≥ 2^−n. An entry that underflows (below 2^−1022)
belongs to a state that the sampler reaches with probability below 2^−(1022−n): for n ≤ 512 never. In longer rows, whose
T_0(k) itself would underflow, the x are divided by a power of 2, with which Σ p is nearly the k that is wanted: T_0(k)
is then above 10^−220 up to the longest rows.
Logarithms are taken only at the end. The recursion consists of sums and products of non-negative numbers: there is no
cancellation, and rounding is identical on every device and in every batch layout, unlike for logarithms (torch uses
different routines for the body and the tail of a vector).

Time O(L·K) per row in L steps, memory 8·(L + 1)·(K + 2) bytes per row. No host-device synchronisation, hence no checks
of values: a row needs at least k positive odds, all finite.
"""

import importlib.util
import logging
from functools import lru_cache

import torch

from maskvr_ds import hashing
from maskvr_ds.masking.conditional_poisson_kernels import Kernels

logger = logging.getLogger(__name__)

# π is clamped just below 1: every set keeps a positive probability, and odds stay finite.
_HIGHEST = 1 - 2.0**-53
# And above 0, by enough that sums of products of such numbers stay far from underflow.
_LOWEST = 2.0**-200
# Longest rows whose x are relative to the k-th largest alone; the power of 2 by which those of longer ones are divided
# or multiplied at most; parts of 1 in which p is counted: sums of them are exact.
_SHORT, _POWERS, _UNITS = 512, 64, 2.0**40


def odds_of(inclusion: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    """o_i = π_i / (1 − π_i): float64 [B, L] or [B, 1], bool [B, L] → float64 [B, L], 0 at positions not maskable.

    If Σ π = k, the design's inclusion probabilities are π to within O(1/d), d = Σ π(1 − π) (Hájek 1964);
    `odds_for_inclusion` makes them exact.
    """
    inclusion = inclusion.detach().clamp(min=_LOWEST, max=_HIGHEST)
    return torch.where(maskable, inclusion / (1 - inclusion), 0.0)


def odds_for_inclusion(
    inclusion: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor, width: int, iterations: int = 12
) -> torch.Tensor:
    """Odds whose design has the given inclusion probabilities: float64 [B, L]. Costs `iterations` × `inclusion()`.

    Args: as in ConditionalPoisson; inclusion float64 [B, L], in (0, 1] on maskable positions, Σ over them = counts.

    Chen, Dempster & Liu iterate o_i ← o_i · π_i / π_i(o); if some π_i are near 1 its error falls only as 1/steps.
    Here the ratio of π/(1 − π) replaces that of π, raised to the powers 1 and 1/2 in turn. Reason: the matrix
    ∂ logit π_i / ∂ log o_j has 1 on the diagonal, no positive entry off it (the design is negatively correlated) and
    rows that sum to 0, so its eigenvalues lie in [0, 2]. A pair of steps multiplies the error along the eigenvalue
    λ by (1 − λ)(1 − λ/2), which vanishes at λ = 1, where nearly all of them lie if d is large, and at λ = 2.

    Largest error of π after 12 steps, measured on π = k · softmax(s · normal), capped at 1: 1e-6 for n ≤ 10, s ≤ 3;
    for n = 126, k = 19: 1e-12 at s = 1, 1e-8 at s = 5. Every four further steps gain a factor of about 50. If two
    groups of positions hardly exchange predictions (all π near 0 or 1, d < 1), λ is near 0 and convergence slower.
    """
    wanted = odds_of(inclusion, maskable)
    odds = wanted
    for iteration in range(iterations):
        actual = odds_of(ConditionalPoisson(odds, counts, width).inclusion(), maskable)
        ratio = torch.where(maskable, wanted / actual, 0.0)
        odds = odds * (ratio.sqrt() if iteration % 2 else ratio)
    return odds


class ConditionalPoisson:
    """Sampling design of B rows; the table is computed once, at construction.

    Args:
        odds: float64 [B, L], finite; 0 at positions that must not be drawn. At least `counts` positive ones per row.
        counts: int64 [B], k, at most `width`.
        width: K.
        kernels: use the Triton kernels of conditional_poisson_kernels.py, which give the same bits; None: if they are
            usable on the device.
    """

    def __init__(self, odds: torch.Tensor, counts: torch.Tensor, width: int, *, kernels: bool | None = None) -> None:
        odds = odds.detach().double()
        self.counts, self.width = counts, width
        # [B, 1]. For k = 0 any scale serves.
        descending = odds.sort(dim=1, descending=True).values
        self._scale = descending.gather(1, (counts - 1).clamp(min=0)[:, None])
        self._scale = torch.where(self._scale > 0, self._scale, 1.0)
        if odds.shape[1] > _SHORT:
            self._scale *= _power(odds / self._scale, counts)
        self._x = odds / self._scale
        x = self._x.T.contiguous()
        small = torch.minimum(x, 1 / x)
        larger = 1 / (1 + small)
        smaller = small * larger
        # [L, B]: with rows last, every step below is one operation on contiguous memory.
        self._p = torch.where(x > 1, larger, smaller)
        self._q = torch.where(x > 1, smaller, larger)
        if kernels is None:
            kernels = kernels_are_usable(odds.device)
        self._kernels = Kernels(self._p, self._q, counts, width) if kernels else None
        # Float64 [B, L + 1, K + 2 or more] of the kernels, else [L + 1, K + 2, B].
        self._table = self._suffixes() if self._kernels is None else self._kernels.table

    def _suffixes(self) -> torch.Tensor:
        """T, float64 [L + 1, K + 2, B]: entry [i, j + 1] is T_i(j); [i, 0] is T_i(−1) = 0, to avoid a special case."""
        length, rows = self._p.shape
        table = self._p.new_empty(length + 1, self.width + 2, rows)
        table[length] = 0
        table[length, 1] = 1
        table[:, 0] = 0
        drawn = self._p.new_empty(self.width + 1, rows)
        for i in range(length - 1, -1, -1):
            torch.mul(table[i + 1, :-1], self._p[i], out=drawn)
            torch.mul(table[i + 1, 1:], self._q[i], out=table[i, 1:])
            table[i, 1:] += drawn
        return table

    def log_normaliser(self) -> torch.Tensor:
        """log e_k(o): float64 [B]."""
        return self._log_tilted() + self.counts * self._scale[:, 0].log()

    def log_probability(self, positions: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """log q(M) of the sets M = positions[used]: int64 [B, K], bool [B, K] → float64 [B].

        M must consist of k distinct positions; −∞ if one of them has odds 0.
        """
        log_x = torch.where(used, self._x.gather(1, positions).log(), 0.0).sum(1)
        return log_x - self._log_tilted()

    def sample(self, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one mask per row, by a scan: with j still to draw, i is taken with probability
        p_i T_{i+1}(j − 1) / T_i(j).

        Args:
            bits: int64 [B, L], independent random bits.

        Returns: positions int64 [B, K] and used bool [B, K]: slot j is used if j < count. The drawn positions come
        first, ascending, then others, so that no position occurs twice. A function of (bits, odds) alone.
        """
        length, rows = self._p.shape
        u = hashing.unit_interval(bits).T.contiguous()
        if self._kernels is not None:
            return _compact(self._kernels.taken(u).T, self.counts, self.width)
        taken = torch.empty(length, rows, dtype=torch.bool, device=bits.device)
        state = self.counts[None] + 1
        for i in range(length):
            next_state = state - 1
            # If all remaining positions must be drawn, both sides differ only by the factor u < 1.
            take = u[i] * self._table[i].gather(0, state) < self._p[i] * self._table[i + 1].gather(0, next_state)
            state = torch.where(take, next_state, state)
            taken[i] = take[0]
        return _compact(taken.T, self.counts, self.width)

    def inclusion(self) -> torch.Tensor:
        """Exact π_i = P(i ∈ M): float64 [B, L], 0 where the odds are 0."""
        total = self._joint() if self._kernels is None else self._kernels.total()
        inclusion = self._p * total / self._probability_of_k()
        return inclusion.clamp(max=1).T.contiguous()

    def _joint(self) -> torch.Tensor:
        """P(k heads in all | head at i): float64 [L, B]."""
        length, rows = self._p.shape
        # before[j + 1]: probability of k − j heads at the positions 0, …, i − 1.
        before = self._p.new_zeros(self.width + 2, rows)
        before.scatter_(0, self.counts[None] + 1, 1.0)
        after, heads = torch.zeros_like(before), self._p.new_empty(self.width + 1, rows)
        joint = self._p.new_empty(length, self.width + 1, rows)
        for i in range(length):
            # P(k − j heads before i, j − 1 after i): together with a head at i, k.
            torch.mul(before[1:], self._table[i + 1, :-1], out=joint[i])
            torch.mul(before[1:], self._p[i], out=heads)
            torch.mul(before, self._q[i], out=after)
            after[:-1] += heads
            before, after = after, before
        # Slice by slice: the summation order of sum() depends on the batch layout.
        total = self._p.new_zeros(length, rows)
        for part in joint.unbind(1):
            total += part
        return total

    def _probability_of_k(self) -> torch.Tensor:
        """T_0(k): float64 [B]."""
        if self._kernels is not None:
            return self._table[:, 0].gather(1, self.counts[:, None] + 1)[:, 0]
        return self._table[0].gather(0, self.counts[None] + 1)[0]

    def _log_tilted(self) -> torch.Tensor:
        """log e_k(x): float64 [B]."""
        return self._probability_of_k().log() + torch.log1p(self._x).sum(1)


def _power(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """float64 [B, 1]: for each row of x, float64 [B, L], the smallest power of 2 by which it can be divided to have
    Σ x/(1 + x) ≤ k. By bisection with exact sums: the same on every device and in every batch layout."""
    powers = torch.tensor([2.0**i for i in range(-_POWERS, _POWERS + 1)], dtype=torch.float64, device=x.device)
    low = torch.zeros_like(counts)
    high = torch.full_like(counts, len(powers) - 1)
    for _ in range(len(powers).bit_length()):
        middle = (low + high) // 2
        scaled = x / powers[middle][:, None]
        enough = (scaled / (1 + scaled) * _UNITS).round().long().sum(1) <= counts * int(_UNITS)
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
    return powers[high][:, None]


def _compact(taken: torch.Tensor, counts: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, L] with `counts` True in each row → their positions [B, K], padded with others, and used [B, K]."""
    rows, length = taken.shape
    others = counts[:, None] + (~taken).cumsum(1)
    # Slot `width` collects all surplus positions and is dropped.
    slot = (torch.where(taken, taken.cumsum(1), others) - 1).clamp(max=width)
    index = torch.arange(length, device=taken.device).expand(rows, length)
    positions = torch.zeros(rows, width + 1, dtype=torch.int64, device=taken.device).scatter_(1, slot, index)
    used = torch.arange(width, device=counts.device) < counts[:, None]
    return positions[:, :width], used


@lru_cache(maxsize=8)
def kernels_are_usable(device: torch.device) -> bool:
    """Whether tensors on this device can use the kernels: on GPUs, if Triton is installed and a small design comes out
    equal to the bit. Logs a warning if it does not."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    random = torch.Generator().manual_seed(0)
    odds = torch.rand(3, 40, dtype=torch.float64, generator=random).mul(6).exp()
    bits = torch.randint(-(2**63), 2**63 - 1, (3, 40), generator=random)
    counts = torch.tensor([6, 5, 0])
    try:
        expected, found = (
            ConditionalPoisson(odds.to(place), counts.to(place), 6, kernels=kernels)
            for place, kernels in (("cpu", False), (device, True))
        )
        pairs = [
            (expected.inclusion(), found.inclusion()),
            *zip(expected.sample(bits), found.sample(bits.to(device)), strict=True),
        ]
        if all(torch.equal(theirs, ours.cpu()) for theirs, ours in pairs):
            return True
        fault = "their results differ from a CPU's"
    except Exception as error:  # of Triton's compiler, of any kind
        fault = f"{type(error).__name__}: {error}"
    logger.warning("conditional Poisson sampling uses no Triton kernels (slower, same masks): %s", fault[:300])
    return False
