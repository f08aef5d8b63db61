"""Sizes computed from a configuration against transformers' models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
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

MODERNBERT: list[dict[str, Any]] = [
    {"preset": "modernbert-base"},
    {"preset": "modernbert-large"},
    {
        "architecture": "modernbert",
        "settings": {
            "num_hidden_layers": 4,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "intermediate_size": 80,
            "local_attention": 10,
        },
    },
]


@pytest.mark.parametrize("values", [*SMALL, *LARGE, *RELATIVES, *MODERNBERT])
def test_parameters_are_those_of_the_model(values: dict[str, object]) -> None:
    model = ModelConfig.model_validate(values)
    sizes = encoder_sizes(model, 30_522)
    with torch.device("meta"):
        found = MaskedLanguageModel(transformers_config(model, vocab_size=30_522, pad_id=0))
    parameters = list(found.parameters())
    assert sizes.total == sum(p.numel() for p in parameters)
    assert sizes.tensors == len(parameters)
    assert sizes.largest == max(p.numel() for p in parameters)
    encoder = found.mlm.base_model
    layers = (encoder.encoder,) if hasattr(encoder, "encoder") else (encoder.layers, encoder.final_norm)
    by_group = {"token embeddings": (found.mlm.get_input_embeddings(),), "layers": layers}
    for name, modules in by_group.items():
        assert sizes.parameters[name] == sum(p.numel() for module in modules for p in module.parameters())


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


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 5),
    heads=st.integers(1, 3),
    width=st.integers(1, 6),
    inner=st.integers(1, 40),
    every=st.integers(1, 4),
    window=st.integers(1, 12).map(lambda reach: 2 * reach),
    length=st.integers(2, 24),
    predictions=st.integers(1, 6),
)
def test_flops_of_modernbert_with_sliding_windows(
    n: int, heads: int, width: int, inner: int, every: int, window: int, length: int, predictions: int
) -> None:
    """Windows leave out the pairs that training does not count either."""
    values = {
        "num_hidden_layers": n,
        "hidden_size": 2 * heads * width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "global_attn_every_n_layers": every,
        "local_attention": window,
    }
    model = ModelConfig(architecture="modernbert", settings=values)
    config = transformers_config(model, vocab_size=50, pad_id=0)
    expected = flops_per_sequence(config, length, predictions, batch=1)
    found = encoder_sizes(model, 50).flops(length, predictions)
    # Older transformers compute the angles of each kind of rotation as a matrix product, once for a batch.
    angles = 3 * len(set(config.layer_types)) * (2 * width * length)
    assert expected - found in (pytest.approx(0, abs=1e-6), pytest.approx(angles))


def test_windows_of_documents_are_at_most_the_documents() -> None:
    sizes = encoder_sizes(ModelConfig(preset="modernbert-base"), 100)
    # Global layers: 8 of 22. Documents of 50 tokens, all within 64 positions.
    assert sizes.attended(1000, 20 * 50**2, (0, 0)) == 20 * 50**2
    # Each position of a long row sees 64 on either side of itself, at the ends fewer.
    inside = sum(min(i + 64, 999) - max(i - 64, 0) + 1 for i in range(1000))
    assert sizes.attended(1000, None, (0, 0)) == pytest.approx((8 * 1000**2 + 14 * inside) / 22)
    assert sizes.attended(1000, None, (0, 0), windows=False) == 1000**2


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="'deberta-v2': `maskvr plan` knows the sizes of bert, roberta"):
        encoder_sizes(ModelConfig(architecture="deberta-v2"), 100)


def test_a_model_whose_sizes_are_not_known_here_is_refused(tmp_path: Path) -> None:
    """Not planned as BERT-base."""
    with pytest.raises(ConfigError, match=r"initialize_from .*: the sizes are in its config\.json"):
        encoder_sizes(ModelConfig(initialize_from=tmp_path), 100)


def test_dropout_of_modernbert_is_refused() -> None:
    model = ModelConfig(architecture="modernbert", settings={"mlp_dropout": 0.1})
    with pytest.raises(ConfigError, match=r"settings\.mlp_dropout is 0\.1: `maskvr plan` knows ModernBERT without it"):
        encoder_sizes(model, 100)


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
    assert_saved(model, recomputed)


def test_activations_of_modernbert_are_what_autograd_saves() -> None:
    values = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    assert_saved(ModelConfig(architecture="modernbert", settings=values), 0)


def assert_saved(model: ModelConfig, recomputed: int) -> None:
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
    temporary = max(B * K * (12 * V + 16 * 64), 2 * B * L * int(sizes.widest) * 4)
    head = B * K * (4 * V + 16 * 64)
    assert kept == pytest.approx(planned - temporary + head, rel=0.06)
