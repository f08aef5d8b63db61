"""Sizes computed from a configuration against transformers' models."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.planning.memory import Pass, activations
from maskvr_ds.planning.sizes import encoder_sizes

SMALL = [
    {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 40},
    {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 50,
        "type_vocab_size": 1,
    },
]
LARGE = [{"preset": name} for name in ("bert-base", "bert-large", "roberta-base", "roberta-large")]
RELATIVES: list[dict[str, Any]] = [
    {"architecture": name, "settings": {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80}}
    for name in ("roberta", "xlm-roberta", "camembert")
]


@pytest.mark.parametrize("values", [*SMALL, *LARGE, *RELATIVES])
def test_parameters_are_those_of_the_model(values: dict[str, object]) -> None:
    model = ModelConfig.model_validate(values)
    sizes = encoder_sizes(model, 30_522)
    with torch.device("meta"):
        found = MaskedLanguageModel(transformers_config(model, vocab_size=30_522, pad_id=0))
    parameters = list(found.parameters())
    assert sizes.total == sum(p.numel() for p in parameters)
    assert sizes.tensors == len(parameters)
    assert sizes.largest == max(p.numel() for p in parameters)
    by_group = {
        "token embeddings": found.mlm.base_model.embeddings.word_embeddings,
        "layers": found.mlm.base_model.encoder,
    }
    for name, module in by_group.items():
        assert sizes.parameters[name] == sum(p.numel() for p in module.parameters())


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 4),
    width=st.integers(2, 12),
    inner=st.integers(1, 90),
    length=st.integers(2, 24),
    predictions=st.integers(1, 6),
    vocabulary=st.integers(8, 200),
)
def test_flops_are_those_that_torch_counts(
    n: int, heads: int, width: int, inner: int, length: int, predictions: int, vocabulary: int
) -> None:
    sizes_of = {"num_hidden_layers": n, "hidden_size": heads * width, "num_attention_heads": heads}
    model = ModelConfig(**sizes_of, intermediate_size=inner, max_position_embeddings=24)
    config = transformers_config(model, vocab_size=vocabulary, pad_id=0)
    config._attn_implementation = "eager"  # torch does not count fused attention on a CPU
    with torch.device("meta"):
        encoder = MaskedLanguageModel(config)
        ids = torch.zeros((1, length), dtype=torch.long)
        positions = torch.zeros((1, predictions), dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(ids, positions)
    assert encoder_sizes(model, vocabulary).flops(length, predictions) == 3 * counter.get_total_flops()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="'modernbert': `maskvr plan` knows the sizes of bert, roberta"):
        encoder_sizes(ModelConfig(preset="modernbert-base"), 100)


@pytest.mark.parametrize("value", ["many", True, 0, 1e30, None])
def test_a_setting_that_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.settings\.num_hidden_layers is"):
        encoder_sizes(ModelConfig(architecture="roberta", settings={"num_hidden_layers": value}), 100)


@pytest.mark.parametrize(("dropout", "recomputed"), [(0.0, 0), (0.1, 0), (0.0, 2)])
def test_activations_are_what_autograd_saves(dropout: float, recomputed: int) -> None:
    """The bytes of all distinct storages that autograd keeps, without the weights."""
    model = ModelConfig(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    B, L, K, V = 4, 48, 7, 50
    config = transformers_config(model, vocab_size=V, pad_id=0)
    encoder = MaskedLanguageModel(config, activation_checkpointing=recomputed or False).train()
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder(torch.randint(5, V, (B, L)), torch.zeros(B, K, dtype=torch.long), torch.zeros(B, K, dtype=torch.long))
    kept = sum(size for size, _ in saved.values())
    sizes = encoder_sizes(model, V)
    planned = activations(sizes, 4, Pass(L, K, B, 1, recomputed, on_cpu=True))
    # Less what exists at the start of the backward pass only: two of the three tensors of logits, or a layer's.
    temporary = max(B * K * (12 * V + 16 * 64), 2 * B * L * 256 * 4)
    head = B * K * (4 * V + 16 * 64)
    assert kept == pytest.approx(planned - temporary + head, rel=0.06)
