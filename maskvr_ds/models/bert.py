"""transformers' BertForMaskedLM with the prediction head evaluated on the K masked positions only.

B sequences, L positions, K predictions a sequence, D hidden, V vocabulary. Of L = 128 positions K = 19 are
predicted: the head's [B, K, V] logits, not [B, L, V], is what makes large vocabularies affordable.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.config import ModelConfig
from maskvr_ds.data.batch import MaskedBatch


def bert_config(model: ModelConfig, *, vocab_size: int, pad_id: int) -> BertConfig:
    """The transformers configuration that the section describes."""
    return BertConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_id,
        num_hidden_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size or 4 * model.hidden_size,
        hidden_act=model.hidden_act,
        hidden_dropout_prob=model.hidden_dropout_prob,
        attention_probs_dropout_prob=model.attention_probs_dropout_prob,
        max_position_embeddings=model.max_position_embeddings,
        type_vocab_size=model.type_vocab_size,
        layer_norm_eps=model.layer_norm_eps,
        initializer_range=model.initializer_range,
        attn_implementation="sdpa",
    )


class MaskedLanguageModel(nn.Module):
    """BertForMaskedLM whose forward takes a mask's positions and returns each prediction's loss.

    observer: called in every training forward pass with h [B, K, D], the hidden states that enter the prediction head,
    and the losses [B, K], for hooks on both (gradient_norm.py); None: nobody looks.
    """

    observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def __init__(self, config: BertConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.mlm = BertForMaskedLM(config)
        if activation_checkpointing:
            self.mlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """h: input_ids int64 [B, L], positions int64 [B, K], attention_mask bool [B, L] or None → [B, K, D]."""
        hidden = self.mlm.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of every prediction in nats: labels int64 [B, K] → float32 [B, K].

        Without labels: logits [B, K, V].

        Under ZeRO 3 everything that computes goes through here: the hooks that gather a module's parameters follow the
        order of a whole forward pass.
        """
        hidden = self.hidden(input_ids, positions, attention_mask)
        logits = self.mlm.cls(hidden)
        if labels is None:
            return logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        if self.observer is not None and losses.requires_grad:
            self.observer(hidden, losses)
        return losses


def weighted_loss(model: nn.Module, masked: MaskedBatch) -> torch.Tensor:
    """Σ w_i ℓ_i over a batch: float32 scalar. Divide by the global batch's number of predictions."""
    losses = model(masked.input_ids, masked.positions, masked.labels, masked.attention_mask)
    return (losses * masked.weights).sum()


def flops_per_sequence(config: BertConfig, sequence_length: int, predictions: int) -> float:
    """Floating-point operations of one sequence's forward and backward pass (backward = 2 × forward).

    Matrix products only, a multiply-add counting as two: in each of the layers QKVO 8LD², attention 4L²D, feed-forward
    4LDI; in the head 2KD² + 2KDV (Narayanan et al. 2021, arXiv 2104.04473, appendix, without recomputation).
    """
    L, K, D, V = sequence_length, predictions, config.hidden_size, config.vocab_size
    layer = 8 * L * D * D + 4 * L * L * D + 4 * L * D * config.intermediate_size
    return 3.0 * (config.num_hidden_layers * layer + 2 * K * D * D + 2 * K * D * V)
