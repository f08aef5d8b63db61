"""Architectures, presets and `config.json` of models, as plain values. Loads no torch.

Whether a key exists and a value is possible is decided by the configuration class of the installed transformers
(models/architectures.py), not here.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Model types of transformers that the tests train, resume and export; any other needs model.untested.
TESTED = (
    "albert",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "gte",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
)

# Those of RoBERTa's kind: the first position is that after the padding token's id, so that rows are shorter than the
# table of positions.
_POSITIONS_AFTER_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")
_POSITIONS_IN_A_TABLE = (*_POSITIONS_AFTER_PADDING, "albert", "bert", "distilbert", "electra", "ernie")

# Layers, hidden size, heads: Turc et al. 2019 (arXiv 1908.08962), base and large: Devlin et al. 2018.
BERT_PRESETS: dict[str, tuple[int, int, int]] = {
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
OF_BERT_PRESET = ("num_hidden_layers", "hidden_size", "num_attention_heads")


def _sizes(layers: int, hidden: int, heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        **others,
    }


_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_ALBERT = {"embedding_size": 128}
# Preset -> (model type, settings); what is not listed is the default of transformers' configuration class.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # Lan et al. 2019 (arXiv 1909.11942), table 1; heads of xlarge and dropout 0 as in the released version 2.
    "albert-base": ("albert", _sizes(12, 768, 12, 3072, **_ALBERT)),
    "albert-large": ("albert", _sizes(24, 1024, 16, 4096, **_ALBERT)),
    "albert-xlarge": ("albert", _sizes(24, 2048, 16, 8192, **_ALBERT)),
    "albert-xxlarge": ("albert", _sizes(12, 4096, 64, 16384, **_ALBERT)),
    # Liu et al. 2019 (arXiv 1907.11692), table 9. 514 positions: ids start at pad + 1, rows have up to 512 tokens.
    "roberta-base": ("roberta", _sizes(12, 768, 12, 3072, **_ROBERTA)),
    "roberta-large": ("roberta", _sizes(24, 1024, 16, 4096, **_ROBERTA)),
    # Warner et al. 2024 (arXiv 2412.13663), table 4.
    "modernbert-base": ("modernbert", _sizes(22, 768, 12, 1152)),
    "modernbert-large": ("modernbert", _sizes(28, 1024, 16, 2624)),
}

CONFIG_FILE = "config.json"
# Values that a model trained here can have; the first one applies if the file lacks the key.
_ONLY: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "auto_map": (None,),
}
_ONLY_BERT: dict[str, tuple[Any, ...]] = {"position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)}
_WHY = {
    "quantization_config": "quantised weights cannot be trained; use the folder of the full-precision model",
    "auto_map": "code from a model's folder is never run (trust_remote_code); if transformers has the architecture "
    "itself, remove auto_map from the file",
}
# Keys that say how a model was stored, loaded or fine-tuned, not what it computes as a masked language model.
_NOT_OF_THE_MODEL = {
    *("architectures", "auto_map", "dtype", "finetuning_task", "gradient_checkpointing", "id2label", "label2id"),
    *("model_type", "num_labels", "output_attentions", "output_hidden_states", "output_past", "problem_type"),
    *("return_dict", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache"),
    *("quantization_config", "pruned_heads", "language", "name", "vocab_size"),
}
# Largest number of levels of a mapping in a configuration.
_MAX_DEPTH = 10


def read_config_file(path: Path) -> dict[str, Any]:
    """A model's config.json, checked to describe an encoder of transformers that can be trained here.

    Raises ValueError naming the key that is not supported.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object expected, found {type(content).__name__}")
    check_content(content, str(path))
    return content


def check_content(content: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a config.json describes something else than an encoder that can be trained here."""
    kind = content.get("model_type", "bert")
    if not isinstance(kind, str):
        raise ValueError(f"{where}: model_type is {kind!r}; the name of a model type of transformers expected")
    for key, allowed in (_ONLY | (_ONLY_BERT if kind == "bert" else {})).items():
        if (value := content.get(key, allowed[0])) not in allowed:
            expected = "no such key" if allowed[0] is None else repr(allowed[0])
            why = _WHY.get(key, f"only encoders that are masked language models ({kind}) are trained here")
            raise ValueError(f"{where}: {key} is {value!r}, {expected} expected: {why}")
    check_plain(dict(content), where)


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that say what the model computes. The vocabulary's come from the corpus."""
    return {
        key: value
        for key, value in content.items()
        if key not in _NOT_OF_THE_MODEL and not key.startswith("_") and not key.endswith("_token_id")
    }


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError if a value has no equal in JSON: a number that is not finite, a key that is not text, a date."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested in more than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is {type(key).__name__}; put it in quotes")
            check_plain(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_plain(inner, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value}; a finite number expected")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: {value!r} is {type(value).__name__}; text, a number or true and false expected")


def longest_row(architecture: str, positions: int, pad: int) -> int:
    """Tokens of the longest row. positions: max_position_embeddings. pad: id of the padding token."""
    return positions - pad - 1 if architecture in _POSITIONS_AFTER_PADDING else positions


def is_free(key: str, architecture: str) -> bool:
    """Whether a run may change a key of the model that it is initialised from: dropout, and what the positions mean
    where no table of the weights has a row for each."""
    if key == "max_position_embeddings":
        return architecture not in _POSITIONS_IN_A_TABLE
    return "dropout" in key or key == "rope_parameters"
