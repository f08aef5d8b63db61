"""Attention within documents by Flash Attention, against each document alone in fp32 on the CPU; skipped without a
GPU. Elsewhere a stand-in for the kernel is tested (tests/unit/models/test_documents.py)."""

import copy

import pytest
import torch

from maskvr_ds.models import documents
from tests.unit.models.test_architectures import PAD
from tests.unit.models.test_documents import CAN, L, by_themselves, model, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("architecture", CAN)
def test_flash_attention_is_as_exact_as_attention_under_a_mask(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ids = model(architecture), rows()
    used = ids != PAD
    with torch.no_grad():
        expected = by_themselves(module, ids)[used]
    errors, gradients = {}, {}
    for kernel in ("mask", "varlen"):
        monkeypatch.setattr(documents, "has_varlen", lambda *_, kernel=kernel: kernel == "varlen")
        on_gpu = copy.deepcopy(module).to("cuda", torch.bfloat16)
        found = on_gpu(ids.cuda(), torch.arange(L, device="cuda").expand(2, L)).float().cpu()[used]
        errors[kernel] = (found - expected).norm().item()
        found.square().mean().backward()
        parts = [p.grad.float().flatten() for p in on_gpu.parameters() if p.grad is not None]
        gradients[kernel] = torch.cat(parts)
    # Both round to bf16, in another order.
    assert errors["varlen"] <= 1.5 * errors["mask"]
    assert torch.cosine_similarity(gradients["mask"], gradients["varlen"], dim=0) > 0.99
