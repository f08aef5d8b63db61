"""Loss of masked predictions."""

import torch
from torch import nn

from maskvr_ds.data.batch import MaskedBatch


def weighted_loss(model: nn.Module, masked: MaskedBatch) -> torch.Tensor:
    """Σ w_i ℓ_i over a batch: float32 scalar. Divide by the number of predictions in the global batch."""
    losses = model(masked.input_ids, masked.positions, masked.labels, masked.attention_mask)
    return (losses * masked.weights).sum()
