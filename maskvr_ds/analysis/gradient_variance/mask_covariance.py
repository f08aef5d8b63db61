"""Covariance of the gradients of two masks of one sequence as a function of their Hamming distance.

"Improving Self-supervised Pre-training via a Fully-Explored Masked Language Model" (arXiv 2010.06040) bounds the
covariance of two masks' gradients by their distance: the larger the distance, the smaller the covariance, so that a
mean over disjoint masks has the lowest variance.

N sequences, W windows. Pairs at a given distance: the maskable positions are randomly permuted, and mask h of a round
is the window of k positions that starts at h k/(W − 2), h = 0 … W − 2; each is a uniform mask. Windows 0 and h differ
in 2 h k/(W − 2) positions. The window at 0 occurs twice, with independent corruption: distance 0. No collectives.
"""

from dataclasses import replace

import torch

from maskvr_ds import hashing
from maskvr_ds.masking.pareto import ascending, never, position_bits
from maskvr_ds.masking.strategies import SELECTION, Parameters, Rows, Selection, row_keys

WINDOWS = 8
_STEPS = WINDOWS - 2


def windows(rows: Rows, _: Parameters) -> Selection:
    """Masking strategy: epoch e selects window e mod W of round e div W. Weights 1.

    At rates above 1/2 the distance of the last windows is limited to what the row allows.
    """
    number = rows.batch.epochs % WINDOWS
    round_ = rows.batch.epochs.div(WINDOWS, rounding_mode="floor")
    keys = row_keys(rows.seed, replace(rows.batch, epochs=round_))[:, None]
    bits = hashing.stream(keys, rows.places + SELECTION)
    low = position_bits(bits.shape[1])
    mask = (1 << low) - 1
    order = ascending((bits & ~mask).masked_fill_(~rows.maskable, never(low)) + rows.places) & mask
    slots = torch.arange(rows.width, device=order.device)
    positions = order.gather(1, (shifts(rows.n, rows.counts, number)[:, None] + slots) % order.shape[1])
    return Selection(positions, slots < rows.counts[:, None], torch.ones_like(positions, dtype=torch.float64))


def shifts(n: torch.Tensor, counts: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Start of window `number`, int64 [B]: the number of its positions that are not in window 0."""
    farthest = torch.minimum(counts, n - counts)
    # Halves up.
    return (2 * (number - 1).clamp(min=0) * farthest + _STEPS).div(2 * _STEPS, rounding_mode="floor")


def covariances(sketches: torch.Tensor) -> torch.Tensor:
    """Gradient sketches float32 [rounds, W, G, s] of one sequence → float64 [W]: the variance, then the covariances of
    window 0 and window h + 1.

    Covariance of two masks given the sequence: E⟨g, g'⟩ − ‖E g‖², the latter from masks of different rounds. Unbiased.
    """
    rounds = len(sketches)
    flat = sketches.double().flatten(2)
    mean = flat.mean(1)
    total = mean.sum(0)
    apart = (total.square().sum() - mean.square().sum()) / (rounds * (rounds - 1))
    square = flat.square().sum(2).mean()
    products = (flat[:, :1] * flat[:, 1:]).sum(2).mean(0)
    return torch.cat([square[None], products]) - apart
