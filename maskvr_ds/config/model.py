"""Section `model`: sizes given explicitly, by preset, or by an existing model. Loads no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ModelWrapValidatorHandler, model_validator

from maskvr_ds.config.base import Epsilon, PathSetting, PositiveCount, PositiveRatio, Section, Share, Width

# Layers, hidden size, heads: Turc et al. 2019 (arXiv 1908.08962), base and large: Devlin et al. 2018.
PRESETS: dict[str, tuple[int, int, int]] = {
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
_OF_PRESET = ("num_hidden_layers", "hidden_size", "num_attention_heads")

BERT_CONFIG = "config.json"
# Keys of an existing model's config.json that its weights depend on -> value if the file lacks the key.
_FIXED: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}
# Keys that a run may override.
_FREE: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# Values that the model trained here supports; the first one applies if the file lacks the key.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "auto_map": (None,),
}


def read_bert_config(folder: Path) -> dict[str, Any] | None:
    """A Hugging Face folder's config.json, checked to describe a BERT that can be trained here; None if there is none.

    Raises ValueError naming the key that is not supported.
    """
    path = folder / BERT_CONFIG
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object expected, found {type(content).__name__}")
    for key, allowed in _ONLY.items():
        if (value := content.get(key, allowed[0])) not in allowed:
            expected = "no such key" if allowed[0] is None else repr(allowed[0])
            raise ValueError(
                f"{path}: {key} is {value!r}, {expected} expected: only weights of transformers' BertForMaskedLM are "
                "supported"
            )
    return content


def _sizes(folder: Path) -> dict[str, Any]:
    """Fields of ModelConfig that an existing model's config.json sets; none if there is no such file."""
    content = read_bert_config(folder)
    if content is None:
        return {}
    return {key: content.get(key, default) for key, default in {**_FIXED, **_FREE}.items()}


class ModelConfig(Section):
    """transformers' BertConfig; the size of the vocabulary comes from the corpus."""

    preset: Literal["bert-tiny", "bert-mini", "bert-small", "bert-medium", "bert-base", "bert-large"] | None = None
    """Sets num_hidden_layers, hidden_size and num_attention_heads, which override it if given; null: no preset."""
    # Resuming does not need the folder, so it may be missing when a configuration is read.
    initialize_from: PathSetting | None = None
    """Hugging Face folder (config.json, model.safetensors) whose weights training starts from. The sizes below are then
    those of the folder; only the dropout probabilities may differ. null: random weights from the seed."""
    num_hidden_layers: PositiveCount = 12
    """Transformer layers."""
    hidden_size: Width = 768
    """Hidden size D, a multiple of num_attention_heads."""
    num_attention_heads: PositiveCount = 12
    """Attention heads per layer."""
    intermediate_size: Width | None = None
    """Width of the feed-forward layers; null: 4 × hidden_size."""
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"
    """Activation of the feed-forward layers and of the prediction head."""
    hidden_dropout_prob: Share = 0.1
    """Dropout of embeddings and layer outputs."""
    attention_probs_dropout_prob: Share = 0.1
    """Dropout of attention weights."""
    max_position_embeddings: Width = 512
    """Maximum sequence length, in tokens."""
    type_vocab_size: PositiveCount = 2
    """Number of token types (segments)."""
    layer_norm_eps: Epsilon = 1e-12
    """ε of LayerNorm."""
    initializer_range: PositiveRatio = 0.02
    """Standard deviation of the initial weights."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @model_validator(mode="wrap")
    @classmethod
    def _take_sizes(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in missing sizes from the preset, then from the folder; given sizes must match the folder's."""
        if not isinstance(values, Mapping):
            return validate(values)
        values = dict(values)
        preset = values.get("preset")
        if preset in PRESETS:
            values = {**dict(zip(_OF_PRESET, PRESETS[preset], strict=True)), **values}
        folder = values.get("initialize_from")
        sizes = {}
        if isinstance(folder, (str, Path)):
            sizes = _sizes(Path(folder))
            values = {**sizes, **{key: v for key, v in values.items() if v is not None or key not in _FIXED}}
        model = validate(values)
        for key in _FIXED:
            if key in sizes and (given := getattr(model, key)) != sizes[key]:
                by_preset = f" (preset {preset})" if preset and key in _OF_PRESET else ""
                raise ValueError(
                    f"{key} is {given!r}{by_preset}, and {folder}/{BERT_CONFIG} has {sizes[key]!r}, which its weights "
                    f"require; remove {key}{' and preset' if by_preset else ''}, or set it to null"
                )
        return model

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        # If the folder is gone, only the checkpoint knows the sizes.
        known = self.initialize_from is None or {"hidden_size", "num_attention_heads"} <= self.model_fields_set
        if known and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self
