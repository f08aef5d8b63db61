"""Losses of masked predictions and of sentence pairs. B sequences, K predictions per sequence."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from maskvr_ds.data.batch import MaskedBatch


def weighted_loss(model: nn.Module, masked: MaskedBatch) -> torch.Tensor:
    """Σ w_i ℓ_i over a batch: float32 scalar. Divide by the number of predictions in the global batch."""
    return objective_losses(model, masked)[0]


def objective_losses(model: nn.Module, masked: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`weighted_loss`, and Σ of the cross-entropies of sentence pairs in nats, float32 scalar, from one forward pass;
    None if the batch has no pairs."""
    arguments = (masked.input_ids, masked.positions, masked.labels, masked.attention_mask)
    if masked.segment_starts is None:
        losses, pair_loss = model(*arguments), None
    else:
        losses, pair_logits = model(*arguments, masked.segment_starts)
        pair_loss = pair_losses(pair_logits, masked).sum()
    return (losses * masked.weights).sum(), pair_loss


def pair_losses(pair_logits: torch.Tensor, masked: MaskedBatch) -> torch.Tensor:
    """Cross-entropy of each sentence pair in nats, float32 [B], for logits [B, 2]; 0 where the label is negative."""
    assert masked.pair_labels is not None
    return F.cross_entropy(pair_logits.float(), masked.pair_labels.clamp(min=-1), reduction="none", ignore_index=-1)


def losses_and_hits(model: nn.Module, masked: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """For each prediction: cross-entropy in nats, float32 [B, K], equal to the model's own; whether the most probable
    token is the right one, bool [B, K]. Logits of the sentence pairs [B, 2]; None if the batch has no pairs."""
    options: dict[str, Any] = {"attention_mask": masked.attention_mask}
    if masked.segment_starts is None:
        logits, pair_logits = model(masked.input_ids, masked.positions, **options), None
    else:
        options["segment_starts"] = masked.segment_starts
        logits, pair_logits = model(masked.input_ids, masked.positions, **options)
    labels = masked.labels
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses, logits.argmax(-1) == labels, pair_logits
