"""transformers' BertForMaskedLM with the prediction head evaluated only at the K masked positions.

Shapes: B sequences, L positions, K predictions per sequence, D hidden, V vocabulary. With L = 128 and K = 19, logits
[B, K, V] instead of [B, L, V] make large vocabularies affordable.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.config import ModelConfig


def bert_config(model: ModelConfig, *, vocab_size: int, pad_id: int) -> BertConfig:
    """The transformers configuration for the `model` section."""
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
    """BertForMaskedLM whose forward takes the masked positions and returns the loss of each prediction.

    observer: called in every training forward pass with h [B, K, D], the input of the prediction head, and the losses
    [B, K], to register hooks on both (masking/gradient_norms.py); None to disable.
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
        """Input of the head, h [B, K, D], for input_ids int64 [B, L], positions int64 [B, K], mask bool [B, L]."""
        hidden = self.mlm.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy per prediction in nats, float32 [B, K], for labels int64 [B, K]; without labels, logits
        [B, K, V].

        Under ZeRO 3 all computation must go through this method: the hooks that gather a module's parameters expect a
        complete forward pass.
        """
        hidden = self.hidden(input_ids, positions, attention_mask)
        logits = self.mlm.cls(hidden)
        if labels is None:
            return logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        if self.observer is not None and losses.requires_grad:
            self.observer(hidden, losses)
        return losses
