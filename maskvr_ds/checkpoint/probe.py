"""The probe: a few rows whose logits a checkpoint stores, and which a resume and an export must reproduce."""

from typing import Any

import torch

from maskvr_ds.models.compiled import uncompiled


@torch.no_grad()
def probe_logits(
    module: Any, input_ids: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The module's logits [B, K, V] at the positions, without dropout. Collective under ZeRO 3: call on all ranks.

    input_ids: int64 [B, L]; positions: int64 [B, K]; attention_mask: bool [B, L] or None.
    """
    training = module.training
    module.eval()
    try:
        with uncompiled(module):
            return module(input_ids, positions, attention_mask=attention_mask)
    finally:
        module.train(training)
