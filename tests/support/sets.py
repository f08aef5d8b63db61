"""Sampling designs over fixed-size sets by enumeration, and rows of odds to test them on."""

import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Row:
    """One row: odds per position (0: not maskable), and the sample size k."""

    odds: list[float]
    k: int

    @property
    def maskable(self) -> list[int]:
        return [i for i, o in enumerate(self.odds) if o > 0]

    def sets(self) -> list[tuple[int, ...]]:
        return list(itertools.combinations(self.maskable, self.k))

    def normaliser(self) -> float:
        return math.fsum(math.prod(self.odds[i] for i in s) for s in self.sets())

    def probabilities(self) -> torch.Tensor:
        """q(M) of all sets by definition: float64 [number of sets]."""
        normaliser = self.normaliser()
        products = [math.prod(self.odds[i] for i in s) for s in self.sets()]
        return torch.tensor([product / normaliser for product in products], dtype=torch.float64)

    def members(self) -> torch.Tensor:
        """float64 [number of sets, L]: 1 if the position belongs to the set."""
        members = torch.zeros(len(self.sets()), len(self.odds), dtype=torch.float64)
        for row, positions in enumerate(self.sets()):
            members[row, list(positions)] = 1
        return members


@st.composite
def rows(draw, low: float = -12.0, high: float = 12.0, largest: int = 10) -> Row:
    """n ≤ largest, k ≤ 5, odds between 10^low and 10^high; up to three positions that are not maskable."""
    n = draw(st.integers(1, largest))
    odds = [10.0**e for e in draw(st.lists(st.floats(low, high), min_size=n, max_size=n))]
    for _ in range(draw(st.integers(0, 3))):
        odds.insert(draw(st.integers(0, len(odds))), 0.0)
    return Row(odds, draw(st.integers(1, min(n, 5))))


def capped(scores: torch.Tensor, k: int) -> torch.Tensor:
    """π ∝ exp(scores), capped at 1, Σ = k: float64 [B, L] → float64 [B, L]."""
    inclusion = k * torch.softmax(scores, 1)
    for _ in range(100):
        free = inclusion < 1
        room = k - (~free).sum(1, keepdim=True)
        inclusion = torch.where(free, inclusion * room / (inclusion * free).sum(1, keepdim=True), 1.0).clamp(max=1)
    return inclusion
