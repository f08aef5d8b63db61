"""Oracle proposals computed from the labels: bounds on the variance that a learned proposal can reach.

B sequences, L positions, K predictions per sequence. For every maskable position i of a row x the oracle estimates
√E[‖g_i‖² | x] from masks that no other measurement uses: rounds of fully_explored, so that every position is predicted
equally often. Then π = (1 − λ) min(1, c · √E‖g_i‖²) + λ k/n, formed like MAPNet's proposal.

    oracle_gradient   ‖g_i‖ = ‖∂ℓ_i/∂θ‖ over all parameters, the quantity in the variance. One pass per prediction.
    oracle_head       ‖g_i‖ = ‖∂ℓ_i/∂h_i‖, the hidden state entering the head: MAPNet's target. Passes of the head only.

The norms are estimates from `rounds` masks each, so a perfectly informed proposal is slightly better still. The third
oracle, oracle_mask, needs no masks of its own: random_effects.whole_mask_variance. No collectives.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.masking.checks import segments
from maskvr_ds.masking.gradient_norms import GradientNorms
from maskvr_ds.masking.mapnet import inclusion_from_scores
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.encoder import MaskedLanguageModel

# norms(masked) → float32 [B, K], ‖g_i‖² of every prediction, arbitrary in unused slots.
Norms = Callable[[MaskedBatch], torch.Tensor]


def gradient_norms(sketcher: Sketcher, micro_size: int) -> Norms:
    """‖∂ℓ_i/∂θ‖², estimated by the sketch: one row per prediction, with the weights of the others 0."""

    def norms(masked: MaskedBatch) -> torch.Tensor:
        batch, width = masked.positions.shape
        single = masked.map(lambda column: column.repeat_interleave(width, 0))
        weights = torch.eye(width, device=masked.positions.device).repeat(batch, 1)
        single = replace(single, weights=weights)
        squares = [sketcher(part).square().sum((1, 2)) for part in single.split(micro_size)]
        return torch.cat(squares).view(batch, width)

    return norms


def head_norms(model: MaskedLanguageModel) -> Norms:
    """‖∂ℓ_i/∂h_i‖², as masking/gradient_norms.py reads it in training."""

    def norms(masked: MaskedBatch) -> torch.Tensor:
        reader = GradientNorms()
        watching, model.observer = model.observer, reader.watch
        with model.head_alone():
            losses = model(masked.input_ids, masked.positions, masked.labels, masked.attention_mask)
        model.observer = watching
        losses.sum().backward()
        return reader.take().square()

    return norms


class TokenOracle:
    """An oracle whose `propose` is a strategies.Proposal for batches of copies of a single row.

    Args:
        norms: squared gradient norms of the predictions of a batch.
        masker: of strategy fully_explored, with its own seed.
        rounds: A, number of predictions of every position.
        floor: λ.

    predictions: number of single-prediction gradients computed so far.
    """

    def __init__(self, norms: Norms, masker: Masker, *, rounds: int, floor: float) -> None:
        self._norms, self._masker, self._rounds, self._floor = norms, masker, rounds, floor
        self.predictions = 0

    def mean_square(self, batch: TokenBatch, maskable: torch.Tensor) -> torch.Tensor:
        """E[‖g_i‖² | x] of the first row: float64 [L], 0 where not maskable."""
        masks = self._rounds * segments(int(maskable[0].sum()), self._masker.rate)
        row = batch.map(lambda column: column[:1].expand(masks, *column.shape[1:]))
        masked = self._masker(replace(row, epochs=torch.arange(masks, device=maskable.device)))
        used = masked.weights != 0
        self.predictions += int(used.sum())
        squares = torch.where(used, self._norms(masked), 0.0).double()
        total = torch.zeros(maskable.shape[1], dtype=torch.float64, device=maskable.device)
        return total.scatter_add_(0, masked.positions.flatten(), squares.flatten()) / self._rounds

    def propose(self, batch: TokenBatch, maskable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """strategies.Proposal: π float64 [B, L]."""
        assert (batch.sample_ids == batch.sample_ids[0]).all(), "an oracle needs batches of a single row"
        if not maskable[0].any():
            return share
        scores = self.mean_square(batch, maskable).clamp(min=torch.finfo(torch.float64).tiny).log() / 2
        counts = (share[:, 0] * maskable.sum(1)).round().long()
        return inclusion_from_scores(scores.expand_as(maskable), maskable, counts, self._floor)
