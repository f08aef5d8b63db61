"""Loss of masked predictions."""

import torch
from torch import nn
from torch.nn import functional as F

from maskvr_ds.data.batch import MaskedBatch


def weighted_loss(model: nn.Module, masked: MaskedBatch) -> torch.Tensor:
    """Σ w_i ℓ_i over a batch: float32 scalar. Divide by the number of predictions in the global batch."""
    losses = model(masked.input_ids, masked.positions, masked.labels, masked.attention_mask)
    return (losses * masked.weights).sum()


def losses_and_hits(model: nn.Module, masked: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """For each prediction: cross-entropy in nats, float32 [B, K], equal to the model's own; whether the most probable
    token is the right one, bool [B, K]."""
    logits = model(masked.input_ids, masked.positions, attention_mask=masked.attention_mask)
    labels = masked.labels
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses, logits.argmax(-1) == labels
