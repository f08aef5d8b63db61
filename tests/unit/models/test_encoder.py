"""The loss at K positions against transformers' loss at all positions; FLOPs against torch's counter."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.losses import weighted_loss

B, L, K, V = 3, 12, 4, 50


def small(**changes: object) -> ModelConfig:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
    return ModelConfig.model_validate(
        {**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes}
    )


def model(**changes: object) -> MaskedLanguageModel:
    torch.manual_seed(0)
    config = small(**changes)
    return MaskedLanguageModel(
        transformers_config(config, vocab_size=V, pad_id=0), activation_checkpointing=config.activation_checkpointing
    )


def batch(padded: bool) -> MaskedBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (B, L), generator=generator)
    positions = torch.stack([torch.randperm(L // 2, generator=generator)[:K] for _ in range(B)])
    attention_mask = torch.ones(B, L, dtype=torch.bool) if padded else None
    if attention_mask is not None:
        attention_mask[1, L // 2 :] = False
    weights = torch.ones(B, K)
    weights[2, -1] = 0
    return MaskedBatch(ids, positions, torch.randint(5, V, (B, K), generator=generator), weights, attention_mask)


@pytest.mark.parametrize("padded", [False, True])
def test_loss_equals_transformers(padded: bool) -> None:
    ours, masked = model().eval(), batch(padded)
    labels = torch.full((B, L), -100)
    used = masked.weights != 0
    for row in range(B):
        labels[row, masked.positions[row, used[row]]] = masked.labels[row, used[row]]
    reference = BertForMaskedLM(ours.mlm.config).eval()
    reference.load_state_dict(ours.mlm.state_dict())
    mean = reference(input_ids=masked.input_ids, attention_mask=masked.attention_mask, labels=labels).loss
    assert weighted_loss(ours, masked).item() / used.sum().item() == pytest.approx(mean.item(), abs=1e-6)


def test_unused_slots_have_no_gradient() -> None:
    ours, masked = model(), batch(False)
    weighted_loss(ours, masked).backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    masked.positions[2, -1] = 0
    masked.labels[2, -1] = 7
    ours.zero_grad()
    weighted_loss(ours, masked).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(ours.parameters(), expected, strict=True))


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients, passes = [], []
    for checkpointing in (False, True, 1):
        ours = model(activation_checkpointing=checkpointing).train()
        layers = ours.mlm.base_model.encoder.layer
        calls = [0] * len(layers)

        def count(*_: Any, calls: list[int] = calls, number: int) -> None:
            calls[number] += 1

        for number, layer in enumerate(layers):
            layer.attention.register_forward_pre_hook(partial(count, number=number))
        weighted_loss(ours, batch(False)).backward()
        gradients.append([p.grad for p in ours.parameters()])
        passes.append(calls)
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients[0], other, strict=True))
    assert passes == [[1, 1], [2, 2], [2, 1]]


def test_more_recomputed_layers_than_there_are_is_an_error() -> None:
    """Of other architectures than BERT, whose sizes the configuration knows."""
    config = transformers_config(small(), vocab_size=V, pad_id=0)
    with pytest.raises(ConfigError, match="activation_checkpointing is 3, and this bert has 2 layers; set it to true"):
        MaskedLanguageModel(config, activation_checkpointing=3)


def test_flops_equal_torchs_count() -> None:
    # The counter knows matrix products only, so attention must not use the fused CPU kernel.
    config = transformers_config(small(num_hidden_layers=3, hidden_size=32), vocab_size=V, pad_id=0)
    config._attn_implementation = "eager"
    ours, masked = MaskedLanguageModel(config), batch(False)
    with FlopCounterMode(display=False) as counter:
        weighted_loss(ours, masked).backward()
    # Every matrix product has a full backward pass: only the embeddings need no gradient of their input.
    assert counter.get_total_flops() / B == pytest.approx(flops_per_sequence(config, L, K, batch=B), rel=1e-6)
