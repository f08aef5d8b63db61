"""Patterns of attention maps (Kovaleva et al. 2019, arXiv:1908.08593), by a rule on three features. Loads no torch.

A map A [L, L] has rows that sum to 1 (or to 0, for positions that attend to nothing). Features, each 0 for uniform and
about 1 for pure patterns:

- vertical: share of the attention on heavy columns, those with at least max(3/L, 0.1) of it, on which
  half of the rows agree;
- diagonal: share on the best three neighbouring diagonals within ±3, above that of uniform attention;
- block: share inside of the best 2 to 4 blocks along the diagonal, above that of uniform attention.

The rule: vertical + diagonal if both reach 0.15 and together 0.4; else vertical or diagonal if the feature reaches
0.25; else block if that reaches 0.45; else heterogeneous. Thresholds were chosen on every other of 200 maps of a real
model that were labelled by eye (docs/results/attention); tests/unit/analysis/attention has its agreement with the rest
of them, and its accuracy on maps made of pure patterns and noise.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Minimum number of positions of a map.
SHORTEST = 4
CLASSES = ("vertical", "diagonal", "vertical + diagonal", "block", "heterogeneous")

_HEAVY, _HEAVY_BY_LENGTH, _AGREE = 0.1, 3.0, 0.5
_FURTHEST, _BAND = 3, 3
_BLOCKS, _SMALLEST_BLOCK = 4, 0.12
_EACH, _TOGETHER, _ALONE, _BLOCK = 0.15, 0.4, 0.25, 0.45
_SCALES = (0.8, 1.25)
# Boundaries of blocks are looked for at so many places at most.
_PLACES = 64


def features(attention: Floats) -> tuple[float, float, float]:
    """Vertical, diagonal, block of a map [L, L]. Raises ValueError for maps that are not square or have L < 4."""
    if attention.ndim != 2 or attention.shape[0] != attention.shape[1] or len(attention) < SHORTEST:
        raise ValueError(f"a map of shape {attention.shape}: expected a square one of at least {SHORTEST} positions")
    return _vertical(attention), _diagonal(attention), _block(attention)


def classify(attention: Floats) -> str:
    """One of CLASSES for a map [L, L]."""
    return _class_of(features(attention), 1.0)


def classify_surely(attention: Floats) -> str | None:
    """As `classify`; None if the class of a map [L, L] depends on the thresholds: if it is another one with thresholds
    that are a quarter higher, or lower by a fifth."""
    found = {_class_of(features(attention), scale) for scale in (1.0, *_SCALES)}
    return found.pop() if len(found) == 1 else None


def _class_of(found: tuple[float, float, float], scale: float) -> str:
    vertical, diagonal, block = (feature / scale for feature in found)
    if min(vertical, diagonal) >= _EACH and vertical + diagonal >= _TOGETHER:
        return "vertical + diagonal"
    if max(vertical, diagonal) >= _ALONE:
        return "vertical" if vertical >= diagonal else "diagonal"
    return "block" if block >= _BLOCK else "heterogeneous"


def _vertical(attention: Floats) -> float:
    length = len(attention)
    share = attention.mean(0)
    agree = (attention >= share / 3).mean(0)
    heavy = (share >= max(_HEAVY_BY_LENGTH / length, _HEAVY)) & (agree >= _AGREE)
    return float(share[heavy].sum())


def _diagonal(attention: Floats) -> float:
    length = len(attention)
    offsets = range(-_FURTHEST, _FURTHEST + 1)
    shares = np.array([np.trace(attention, offset) for offset in offsets]) / length
    uniform = np.array([length - abs(offset) for offset in offsets]) / length**2
    bands = np.lib.stride_tricks.sliding_window_view
    excess = bands(shares, _BAND).sum(1) - bands(uniform, _BAND).sum(1)
    return float(max(0.0, (excess / (1 - bands(uniform, _BAND).sum(1))).max()))


def _block(attention: Floats) -> float:
    """Best partition by dynamic programming on the attention inside of blocks above uniform attention's."""
    length = len(attention)
    places = np.unique(np.linspace(0, length, min(length, _PLACES) + 1).round().astype(int))
    cumulative = np.zeros((length + 1, length + 1))
    cumulative[1:, 1:] = attention.cumsum(0).cumsum(1)
    sizes = (places[None] - places[:, None]).astype(float)
    corner = np.diag(cumulative)[places]
    crossed = cumulative[np.ix_(places, places)]
    inside = (corner[None] + corner[:, None] - crossed - crossed.T) / length
    # Of a block from place a to place b.
    gain = np.where(sizes >= max(2.0, _SMALLEST_BLOCK * length), inside - sizes**2 / length**2, -np.inf)
    expected = sizes**2 / length**2
    best = gain[0].copy()
    used = expected[0].copy()
    top = 0.0
    for _ in range(1, _BLOCKS):
        choice = best[:, None] + gain
        before = choice.argmax(0)
        columns = np.arange(len(places))
        best, used = choice[before, columns], used[before] + expected[before, columns]
        if np.isfinite(best[-1]) and used[-1] < 1:
            top = max(top, float(best[-1] / (1 - used[-1])))
    return top


def entropy(attention: Floats) -> float:
    """Mean entropy of the rows in nats (Clark et al. 2019, arXiv:1906.04341)."""
    logs = np.log(attention, where=attention > 0, out=np.zeros_like(attention))
    return float(-(attention * logs).sum(1).mean())


def distance(attention: Floats) -> float:
    """Mean distance in tokens between a position and those that it attends to."""
    places = np.arange(len(attention))
    return float((attention * np.abs(places[:, None] - places)).sum(1).mean())
