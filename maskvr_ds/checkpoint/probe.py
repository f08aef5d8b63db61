"""The probe: a few rows whose logits a checkpoint stores, and which a resume and an export must reproduce."""

from collections.abc import Mapping
from typing import Any

import torch

from maskvr_ds.models.compiled import uncompiled
from maskvr_ds.models.encoder import ordinary


@torch.no_grad()
def probe_logits(module: Any, probe: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The module's logits [B, K, V] at the positions and, with segment_starts, [B, 2] of the sentence pairs, without
    dropout, and with [MASK] in all layers, as an export computes them. Collective under ZeRO 3: call on all ranks.

    probe: input_ids int64 [B, L]; positions int64 [B, K]; optionally attention_mask bool [B, L] and segment_starts
    int64 [B].
    """
    training = module.training
    module.eval()
    options = {name: probe[name] for name in ("attention_mask", "segment_starts") if name in probe}
    try:
        with uncompiled(module), ordinary(module):
            logits = module(probe["input_ids"], probe["positions"], **options)
        return logits if "segment_starts" in options else (logits, None)
    finally:
        module.train(training)
