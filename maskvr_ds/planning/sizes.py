"""Sizes of an encoder that memory and time depend on, from its configuration. Loads no torch.

Symbols: n layers, L positions, K predictions per sequence, D hidden size, I intermediate size, H heads, V vocabulary.
FLOPs are those of the model: of sliding windows, what lies inside of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.config.base import shown

# Largest value of a setting: that of `Width` in config/base.py.
_LARGEST = 2**20


@dataclass(frozen=True)
class EncoderSizes:
    """An encoder with a masked language model's head on K positions.

    parameters: elements by group of tensors; tied tensors count once. tensors: number of them. largest: elements of the
    largest one.
    token_flops, pair_flops, prediction_flops: forward pass of all layers per token, and per ordered pair of positions;
    of the head per prediction. Matrix products only; a multiply-add counts as two.
    saved: elements that a layer keeps per token for its backward pass, in the precision of the model, with fused
    attention. masked: elements per token and layer that dropout keeps a mask of. embedded: elements kept per token
    before the first layer. of_head: elements kept per prediction before the logits. widest: elements per token of a
    layer's widest tensor.
    moved: elements that a layer's pointwise operations read or write per token, forward and backward, not fused.
    windowed: share of the layers that attend to at most `reach` positions on either side.
    """

    parameters: Mapping[str, int]
    tensors: int
    largest: int
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    token_flops: float
    pair_flops: float
    prediction_flops: float
    saved: float
    masked: float
    embedded: float
    of_head: float
    widest: float
    moved: float
    windowed: float = 0.0
    reach: int = 0

    @property
    def total(self) -> int:
        """Number of parameters, P."""
        return sum(self.parameters.values())

    def flops(self, length: int, predictions: int, pairs: float | None = None, late: tuple[int, int] = (0, 0)) -> float:
        """Model FLOPs of one sequence, forward and backward (backward = 2 × forward), without recomputation.

        pairs: ordered pairs of positions of which one attends to the other; None: all, length². late: as for
        `positions`.
        """
        of_tokens = self.positions(length, late) * self.token_flops
        attention = self.attended(length, pairs, late) * self.pair_flops
        return 3 * (of_tokens + attention + predictions * self.prediction_flops)

    def positions(self, length: int, late: tuple[int, int]) -> float:
        """Positions of a sequence that a layer computes, the mean over the layers. late: number of layers below late
        mask tokens, and positions that they have less of."""
        below, hidden = late
        return length - below / self.layers * hidden

    def attended(self, length: int, pairs: float | None, late: tuple[int, int], windows: bool = True) -> float:
        """Pairs of positions that a layer computes, the mean over the layers; those below late mask tokens have as many
        of `pairs` (None: all, length²) as on average. windows: of layers with sliding windows, only pairs inside."""
        below, hidden = late
        missing = below / self.layers * (1 - (1 - hidden / length) ** 2)
        found = length**2 if pairs is None else pairs
        if windows and self.windowed:
            r = min(self.reach, length - 1)
            # Of documents, at most: no pair of a document shorter than a window is outside of it.
            found += self.windowed * (min(found, length * (2 * r + 1) - r * (r + 1)) - found)
        return (1 - missing) * found


def encoder_sizes(model: ModelConfig, vocabulary: int) -> EncoderSizes:
    """The sizes of the encoder that `model` describes. Raises ConfigError for an architecture that has no entry, and
    for a model to start from whose config.json has not been read."""
    if model.architecture == "bert" and not model.knows("hidden_size", "num_attention_heads"):
        raise ConfigError(
            f"model.initialize_from {model.initialize_from}: the sizes are in its config.json, which this folder does "
            "not have; give the folder of the model"
        )
    if model.architecture not in _SIZES:
        raise ConfigError(
            f"model.architecture {model.architecture!r}: `maskvr plan` knows the sizes of {', '.join(_SIZES)} only; "
            "measure with `maskvr train` instead: metrics.jsonl has tokens per second"
        )
    return _SIZES[model.architecture](model, vocabulary)


# Defaults of transformers' configuration classes of these architectures.
_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
}


def _bert(model: ModelConfig, vocabulary: int) -> EncoderSizes:
    values = {key: getattr(model, key) for key in _DEFAULTS}
    return _post_norm({**values, "intermediate_size": model.intermediate_size or 4 * model.hidden_size}, vocabulary)


def _roberta(model: ModelConfig, vocabulary: int) -> EncoderSizes:
    """RoBERTa and its relatives: the layers and the head of BERT."""
    given = {key: model.merged.get(key, default) for key, default in _DEFAULTS.items()}
    for key, value in given.items():
        low = 0 if key == "hidden_dropout_prob" else 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= _LARGEST:
            raise ConfigError(f"model.settings.{key} is {shown(value)}; a number from {low} to {_LARGEST:,} expected")
    return _post_norm(given, vocabulary)


def _post_norm(values: Mapping[str, Any], vocabulary: int) -> EncoderSizes:
    """Of BERT's layers: attention and two feed-forward layers, each followed by dropout, residual and LayerNorm."""
    n, D, I = (values[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))  # noqa: E741
    H, V = values["num_attention_heads"], vocabulary
    dropout = (values["hidden_dropout_prob"] > 0) * 2
    return EncoderSizes(
        parameters={
            "token embeddings": V * D,
            "other embeddings": (values["max_position_embeddings"] + values["type_vocab_size"] + 2) * D,
            # Q, K, V, output; two feed-forward layers; two LayerNorms
            "layers": n * (4 * (D * D + D) + (D * I + I) + (I * D + D) + 4 * D),
            # The decoder's weights are the token embeddings.
            "head": (D * D + D) + 2 * D + V,
        },
        tensors=5 + 16 * n + 5,
        largest=max(V * D, D * I),
        layers=n,
        hidden=D,
        heads=H,
        vocabulary=V,
        token_flops=n * (8 * D * D + 4 * D * I),
        pair_flops=n * 4 * D,
        prediction_flops=2 * D * D + 2 * D * V,
        # Inputs of: Q, K, V; attention (3); its output layer; both LayerNorms; the feed-forward layer. Input and output
        # of the activation.
        saved=8 * D + 2 * I,
        masked=dropout * D,
        embedded=D,
        of_head=4 * D,
        widest=I,
        # Forward 15 D + 2 I, of which dropout 2 × 2.5, residuals 2 × 3, LayerNorm 2 × 2; backward 28 D + 5 I.
        moved=43 * D + 7 * I if dropout else 33 * D + 7 * I,
    )


def _modernbert(model: ModelConfig, vocabulary: int) -> EncoderSizes:
    """ModernBERT (Warner et al. 2024, arXiv 2412.13663): pre-norm, rotary positions, gated feed-forward layers, sliding
    windows in most layers, no biases but the decoder's."""
    given = {**_MODERNBERT, **{key: model.merged[key] for key in _MODERNBERT if key in model.merged}}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise ConfigError(f"model.settings.{key} is {shown(value)}; a whole number from 1 to {_LARGEST:,} expected")
    for key in _MODERNBERT_WITHOUT:
        if model.merged.get(key):
            raise ConfigError(
                f"model.settings.{key} is {shown(model.merged[key])}: `maskvr plan` knows ModernBERT without it"
            )
    n, D, I = (given[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))  # noqa: E741
    every, V = given["global_attn_every_n_layers"], vocabulary
    kinds = model.merged.get("layer_types")
    everywhere = -(-n // every) if kinds is None else sum(kind == "full_attention" for kind in kinds)
    return EncoderSizes(
        parameters={
            "token embeddings": V * D,
            "other embeddings": D,
            # Q, K, V, output; both halves of the gated layer, the one after it; two LayerNorms, of which the first
            # layer lacks one and the last one is followed by another.
            "layers": n * (4 * D * D + 3 * D * I + 2 * D),
            "head": D * D + D + V,
        },
        tensors=2 + 6 * n + 3,
        largest=max(V * D, 2 * D * I),
        layers=n,
        hidden=D,
        heads=given["num_attention_heads"],
        vocabulary=V,
        token_flops=n * (8 * D * D + 6 * D * I),
        pair_flops=n * 4 * D,
        prediction_flops=2 * D * D + 2 * D * V,
        # Inputs of: both LayerNorms; Q, K, V; attention (rotated Q and K, and V, which holds the product that all three
        # are parts of: 5); its output layer; the gated layer (D); activation and gate (2 I); the activation's output,
        # and the last layer's input (2 I).
        saved=10 * D + 4 * I,
        masked=0,
        embedded=D,
        of_head=4 * D,
        widest=2 * I,
        # Forward 26 D + 5 I, of which rotations 16, LayerNorm 4, residuals 6; backward 30 D + 13 I.
        moved=56 * D + 18 * I,
        windowed=1 - everywhere / n,
        reach=given["local_attention"] // 2,
    )


# Defaults of transformers' ModernBertConfig.
_MODERNBERT = {
    "num_hidden_layers": 22,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
}
_MODERNBERT_WITHOUT = (
    "norm_bias",
    "attention_bias",
    "mlp_bias",
    "classifier_bias",
    "embedding_dropout",
    "mlp_dropout",
    "attention_dropout",
)

_SIZES: dict[str, Callable[[ModelConfig, int], EncoderSizes]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "modernbert": _modernbert,
}
