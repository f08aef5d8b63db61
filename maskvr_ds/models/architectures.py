"""The `model` section as a configuration of transformers, checked against the configuration class of the architecture.

Nothing is looked up by name of an architecture but what BERT's own fields mean: which keys exist, and which values are
possible, is asked of the installed transformers.
"""

import difflib
import importlib
import inspect
import logging
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, BertConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.config.architectures import TESTED
from maskvr_ds.models.encoder import MaskedLanguageModel, ask_for_pair_head
from maskvr_ds.models.late_masks import LateMasks

logger = logging.getLogger(__name__)

# Version whose architectures the list in maskvr_ds/config/architectures.py was tested with.
TESTED_WITH = "5.23.0"
# How the sources of an architecture read its configuration: as an attribute, by getattr, from keyword arguments.
_READS = (
    re.compile(r"\bconfig\.([a-z]\w*)"),
    re.compile(r"attr\(\s*(?:self\.)?config,\s*[\"'](\w+)[\"']"),
    re.compile(r"\bkwargs\.(?:pop|get)\(\s*[\"'](\w+)[\"']"),
)


def transformers_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    pad_id: int,
    token_ids: Mapping[str, int] | None = None,
    pair_head: bool = False,
) -> PreTrainedConfig:
    """The transformers configuration for the `model` section.

    vocab_size: rows of the embedding table. token_ids: of the corpus' tokenizer, by key of the configuration
    (cls_token_id, …); set where the architecture's class has a default for the key that is not null. pair_head: with a
    pooler and a binary head for sentence pairs.

    Raises ConfigError if transformers does not have the architecture, or not as a masked language model, or its class
    does not have a key, or refuses a value, or has no head for pairs.
    """
    config = _transformers_config(model, vocab_size, pad_id, token_ids or {})
    if pair_head:
        ask_for_pair_head(config)
    return config


def _transformers_config(
    model: ModelConfig, vocab_size: int, pad_id: int, token_ids: Mapping[str, int]
) -> PreTrainedConfig:
    if model.architecture == "bert":
        return _bert_config(model, vocab_size=vocab_size, pad_id=pad_id)
    cls: Any = _configuration_class(model.architecture)
    _check_keys(model, cls)
    known = _keys(cls)
    values = {key: value for key, value in model.merged.items() if key in known}
    if unread := sorted(model.merged.keys() - known):
        logger.info("model.config: %s of transformers has no %s: ignored", cls.__name__, ", ".join(unread))
    defaults = cls().to_dict()
    values |= {key: value for key, value in token_ids.items() if defaults.get(key) is not None}
    return _make(cls, {**values, "vocab_size": vocab_size, "pad_token_id": pad_id})


def check_settings(
    model: ModelConfig,
    *,
    pair_head: bool = False,
    documents: bool = False,
    late_layer: int = 0,
    late_setting: str = "masking.late_layer",
) -> None:
    """Raise ConfigError as `transformers_config` and MaskedLanguageModel do, before a corpus is known; allocates no
    weights. documents: whether attention is within documents. late_layer: at which [MASK] enters, by `late_setting`;
    0: at the first."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"), 1)
    rows = model.settings.get("vocab_size", 1024)
    config = transformers_config(model, vocab_size=rows, pad_id=0, token_ids=special, pair_head=pair_head)
    with torch.device("meta"):
        MaskedLanguageModel(
            config,
            activation_checkpointing=model.activation_checkpointing,
            separator=special["sep_token_id"] if documents else None,
            late=LateMasks(late_layer, special["mask_token_id"], 1, late_setting) if late_layer else None,
        )


def _bert_config(model: ModelConfig, *, vocab_size: int, pad_id: int) -> BertConfig:
    _check_keys(model, BertConfig)
    settings = {key: value for key, value in model.settings.items() if key != "vocab_size"}
    return BertConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_id,
        num_hidden_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size or 4 * model.hidden_size,
        hidden_act=model.hidden_act,
        hidden_dropout_prob=model.hidden_dropout_prob,
        attention_probs_dropout_prob=model.attention_probs_dropout_prob,
        max_position_embeddings=model.max_position_embeddings,
        type_vocab_size=model.type_vocab_size,
        layer_norm_eps=model.layer_norm_eps,
        initializer_range=model.initializer_range,
        attn_implementation="sdpa",
        **settings,
    )


def _configuration_class(architecture: str) -> type[PreTrainedConfig]:
    """Raises ConfigError if the installed transformers does not have the type, or not as a masked language model."""
    if architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES and architecture in CONFIG_MAPPING:
        return CONFIG_MAPPING[architecture]
    where = f"model.architecture {architecture!r}"
    installed = f"transformers {transformers.__version__} (installed)"
    if architecture in TESTED:
        raise ConfigError(
            f"{where}: {installed} does not have it; it was tested with transformers {TESTED_WITH}: update transformers"
        )
    if architecture in CONFIG_MAPPING:
        raise ConfigError(f"{where}: no masked language model in {installed}; tested are {', '.join(TESTED)}")
    close = difflib.get_close_matches(architecture, MODEL_FOR_MASKED_LM_MAPPING_NAMES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(
        f"{where}: {installed} has no such model type{hint}; a later version may have it (the tested architectures are "
        f"those of {TESTED_WITH})"
    )


def _make(cls: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    try:
        return cls(**values)
    # The classes validate types and contradictions, and raise whatever suits them.
    except Exception as error:
        raise ConfigError(
            f"model.settings: {cls.__name__} of transformers refuses them: {' '.join(str(error).split())}"
        ) from error


def _check_keys(model: ModelConfig, cls: Any) -> None:
    """Raise ConfigError for a key of model.settings that the architecture does not read."""
    for key in model.settings:
        if key.endswith("_token_id") or key == "model_type":
            raise ConfigError(
                f"model.settings.{key}: "
                + ("set model.architecture" if key == "model_type" else "comes from the corpus' tokenizer")
                + "; remove it"
            )
        if key in _keys(cls):
            continue
        close = difflib.get_close_matches(key, _keys(cls), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(sorted(cls().to_dict()))}"
        raise ConfigError(f"model.settings.{key}: unknown key of {cls.__name__} ({model.architecture}); {hint}")


@cache
def _keys(cls: type[PreTrainedConfig]) -> frozenset[str]:
    """Keys that an architecture reads: those of its class, and others that its sources ask for (DeBERTa's
    position_buckets has no default)."""
    names = {*cls().to_dict(), *cls.attribute_map, *inspect.signature(cls.__init__).parameters} - {"self", "kwargs"}
    names -= {"args", "model_type", "transformers_version", "architectures", "_name_or_path"}
    for module in (cls.__module__, cls.__module__.replace(".configuration_", ".modeling_")):
        source = inspect.getsource(importlib.import_module(module))
        names |= {name for pattern in _READS for name in pattern.findall(source) if not hasattr(PreTrainedConfig, name)}
    return frozenset(names)
