"""Small models of all tested architectures."""

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from maskvr_ds.config.architectures import TESTED

# An older transformers lacks some.
INSTALLED = tuple(name for name in TESTED if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES)

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ROBERTA = {**_SIZES, **_NO_DROPOUT, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
# As DeBERTa-v3: relative positions only, in both directions, in buckets.
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}
# Model type -> model.settings, without dropout. Narrow embeddings, windows and gated layers where the type has them.
SMALL: dict[str, dict[str, Any]] = {
    "albert": {**_SIZES, "embedding_size": 16},
    "bert": {**_SIZES, **_NO_DROPOUT},
    "camembert": _ROBERTA,
    "deberta-v2": {**_SIZES, **_NO_DROPOUT, **_DEBERTA},
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "electra": {**_SIZES, **_NO_DROPOUT, "embedding_size": 16},
    "ernie": {**_SIZES, **_NO_DROPOUT},
    "eurobert": {**_SIZES, "num_key_value_heads": 1},  # grouped queries, as in EuroBERT-610m
    "gte": {**_SIZES, **_NO_DROPOUT},
    "modernbert": {**_SIZES, "local_attention": 8},
    "mpnet": {**_SIZES, **_NO_DROPOUT},
    "nomic_bert": _SIZES,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
assert set(SMALL) == set(TESTED)
# Different in kind: positions from pad + 1, shared layers, relative positions by eager attention, windows and rotation.
FOUR = ("albert", "deberta-v2", "modernbert", "roberta")


def section(architecture: str, **settings: Any) -> dict[str, Any]:
    """The section `model` of a configuration."""
    return {"architecture": architecture, "settings": {**SMALL[architecture], **settings}}
