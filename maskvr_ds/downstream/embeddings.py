"""Embeddings of texts: the mean of an encoder's last hidden states over all tokens of a text, special ones included."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from maskvr_ds.downstream.jobs import visible_devices
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.tasks import Kind, TaskError
from maskvr_ds.runtime.logs import is_quiet

_BATCH = 64


class Embedder:
    """An encoder with its tokenizer. Shapes: n texts, L tokens of the longest, D hidden.

    Raises TaskError if the folder lacks weights of the encoder, or embeddings are not finite.
    """

    def __init__(self, encoder: Encoder, max_length: int) -> None:
        self.name, self.tokenizer, self.max_length = encoder.name, encoder.tokenizer, max_length
        self.device = torch.device("cuda" if visible_devices() else "cpu")
        # Its random head is not used.
        self.model: Any = encoder.load(Kind.CLASSIFICATION, ("a", "b")).base_model.to(self.device)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, D], on the device, with gradients unless they are disabled."""
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        ).to(self.device)
        return mean_over_tokens(self.model(**batch).last_hidden_state, batch["attention_mask"])

    @torch.no_grad()
    def all(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, D] on the CPU, without dropout; in batches of about equal length."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [
            self([texts[i] for i in order[start : start + _BATCH]]).cpu()
            for start in tqdm(
                range(0, len(order), _BATCH), desc="texts embedded", leave=False, disable=True if is_quiet() else None
            )
        ]
        self.model.train(was_training)
        found = torch.cat(parts)
        if not found.isfinite().all():
            raise TaskError(
                f"{self.name}: its embeddings are not finite: the weights are damaged, or training diverged"
            )
        return found[np.argsort(order)]


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """[n, L, D], int64 [n, L] (1: a token, 0: padding) → [n, D]."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)
