"""Section `model`: an architecture of transformers with its settings, a preset, or an existing model. Loads no
torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ModelWrapValidatorHandler, SerializerFunctionWrapHandler, model_serializer, model_validator

from maskvr_ds.config.architectures import (
    BERT_PRESETS,
    CONFIG_FILE,
    OF_BERT_PRESET,
    PRESETS,
    TESTED,
    check_content,
    check_plain,
    is_free,
    longest_row,
    read_config_file,
    settings_of,
)
from maskvr_ds.config.base import (
    AllOrSome,
    Epsilon,
    PathOrMapping,
    PathSetting,
    PositiveCount,
    PositiveRatio,
    Section,
    Share,
    Width,
    readable_path,
)

# Keys of an existing BERT's config.json that its weights depend on -> value if the file lacks the key.
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
# Fields that only BERT has; other architectures have `settings`.
BERT_KEYS = (*_FIXED, *_FREE)


# How the model's vocabulary and the corpus' relate (models/new_vocabulary.py).
Vocabulary = Literal["same", "extend", "match"]


Normalization = Literal["layer", "rms", "batch", "population"]


class ModelConfig(Section):
    """An encoder of transformers; the vocabulary comes from the corpus. The fields from num_hidden_layers on are those
    of BERT; for other architectures, and for further keys of BERT, `settings`."""

    preset: (
        Literal[
            "bert-tiny",
            "bert-mini",
            "bert-small",
            "bert-medium",
            "bert-base",
            "bert-large",
            "albert-base",
            "albert-large",
            "albert-xlarge",
            "albert-xxlarge",
            "roberta-base",
            "roberta-large",
            "modernbert-base",
            "modernbert-large",
        ]
        | None
    ) = None
    """Sets the architecture and its sizes, which override it if given; null: no preset."""
    architecture: str = "bert"
    """Model type of transformers (`model_type` in config.json), unless preset, config or initialize_from says it."""
    settings: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Keys of that architecture's configuration class in transformers, with its names (`hidden_size`,
    `num_hidden_layers`, …); unknown keys are errors. They override preset and config."""
    # A path is replaced by what the file says, so that the run's stored configuration does not depend on it.
    config: PathOrMapping = None
    """Path of a config.json, or its content: architecture and settings."""
    untested: bool = False
    """Allow an architecture that the tests do not cover."""
    # Resuming does not need the folder, so it may be missing when a configuration is read.
    initialize_from: PathSetting | None = None
    """Hugging Face folder (config.json, model.safetensors) whose weights training starts from, or a name on a hub
    (OWNER/NAME, OWNER/NAME@REVISION), which becomes a folder when the run starts. Architecture and sizes are then those
    of the folder; only dropout and the positions may differ. null: random weights from the seed."""
    new_head: bool | None = None
    """With initialize_from: true, the prediction head starts with random weights; false, the folder must have one;
    null, it starts with random weights if the folder has none."""
    vocabulary: Vocabulary = "same"
    """With initialize_from: same, the corpus must have the model's vocabulary; extend, it has all of its tokens under
    the same ids and new ones, which start from the mean of the embeddings of their pieces under the model's tokenizer;
    match, any other vocabulary: tokens in common keep their embeddings, the others start as the new ones do."""
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
    normalization: Normalization = "layer"
    """For studies, from random weights: what normalises in the encoder. layer: what the architecture has; rms, batch,
    population: RMSNorm, batch normalisation, or normalisation by running statistics in place of its LayerNorms. Such
    models exist in no release of transformers: they cannot be exported."""
    gamma_decay: Share = 0.0
    """With normalization population: ζ, the loss has ζ γ² added for every gain γ (Luo et al. 2019)."""
    activation_checkpointing: AllOrSome = False
    """Recompute activations in the backward pass: less memory, more time. A number: of so many layers, the lowest."""

    @property
    def merged(self) -> dict[str, Any]:
        """Keys for the configuration class of transformers, other than BERT's own fields."""
        content = self.config if isinstance(self.config, dict) else {}
        return {**content, **self.settings}

    def knows(self, *sizes: str) -> bool:
        """Whether these fields of BERT hold. If the folder of initialize_from is gone, or a name that has not been
        resolved, only a checkpoint knows the sizes, and the fields have their defaults."""
        return self.architecture == "bert" and (self.initialize_from is None or self.model_fields_set.issuperset(sizes))

    @property
    def positions(self) -> int | None:
        """max_position_embeddings; None: only transformers knows its default, or only a checkpoint (`knows`)."""
        if self.architecture == "bert":
            return self.max_position_embeddings if self.knows("max_position_embeddings") else None
        found = self.merged.get("max_position_embeddings")
        return found if isinstance(found, int) else None

    def row_fault(self, length: int, pad: int | None) -> str | None:
        """Why rows of `length` tokens are too long, as the end of a message; None if they are not, or if only
        transformers knows. pad: id of the padding token; None: not known, no row is shorter for it."""
        if (positions := self.positions) is None:
            return None
        longest = positions if pad is None else longest_row(self.architecture, positions, pad)
        if length <= longest:
            return None
        limit = f"model.max_position_embeddings {positions}"
        if self.initialize_from is not None:
            limit += f" of {self.initialize_from}"
        if longest < positions:
            limit += f", of which {self.architecture} uses {longest} (it counts them from pad_token_id + 1)"
        return f"sequences of {length} tokens exceed {limit}; build the corpus with --sequence-length {longest} or less"

    @property
    def attention_dropout(self) -> tuple[str, float]:
        """Setting and value of the dropout of attention weights; 0 where only transformers knows its default."""
        if self.architecture == "bert":
            return "model.attention_probs_dropout_prob", self.attention_probs_dropout_prob
        keys = [key for key in ("attention_probs_dropout_prob", "attention_dropout") if self.merged.get(key)]
        return (f"model.settings.{keys[0]}", self.merged[keys[0]]) if keys else ("", 0.0)

    @property
    def uses_statistics(self) -> bool:
        """Whether rows depend on each other through statistics of the batch."""
        return self.normalization in ("batch", "population")

    def identity(self) -> dict[str, Any]:
        """What must not change within a run, in the layout that checkpoints store: of BERT, its own fields."""
        switch = {"normalization": self.normalization, "gamma_decay": self.gamma_decay}
        # Checkpoints of earlier versions lack it.
        more = switch if self.normalization != "layer" else {}
        if self.architecture != "bert":
            return {"architecture": self.architecture, "config": self.merged} | more
        settings = {"settings": self.settings} if self.settings else {}
        return self.model_dump(include=set(BERT_KEYS)) | settings | more

    @model_validator(mode="wrap")
    @classmethod
    def _resolve(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in what preset, config and folder say; what is given must match the folder."""
        if not isinstance(values, Mapping):
            return validate(values)
        values = dict(values)
        sources = _sources(values)
        if values.get("initialize_from") and not sources and not values.keys() & {"preset", "architecture"}:
            return validate(values)  # the folder is gone: only the checkpoint knows what the settings belong to
        architecture = _architecture(values, sources)
        if architecture != "bert":
            _take_settings(values, architecture, sources)
            return validate(values)
        _take_bert_settings(values)
        values, sizes = _with_sizes(values, sources)
        model = validate(values)
        if model.initialize_from is not None:
            _check_sizes(model, sizes, next(iter(sources), ""))
        return model

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_plain(self.settings, "settings")
        if self.architecture not in TESTED and not self.untested:
            raise ValueError(
                f"architecture is {self.architecture!r}, which is not tested here; tested are {', '.join(TESTED)}. "
                "Set untested=true to try it: what it cannot do is checked at the start"
            )
        if self.new_head is not None and self.initialize_from is None:
            raise ValueError("new_head needs initialize_from: without it all weights are new")
        if self.normalization != "layer" and self.initialize_from is not None:
            raise ValueError(
                f"normalization {self.normalization}: the weights of initialize_from were trained with LayerNorm; set "
                "normalization to layer, or train from random weights"
            )
        if self.gamma_decay and self.normalization != "population":
            raise ValueError(
                f"gamma_decay {self.gamma_decay} belongs to normalization population, and it is {self.normalization}"
            )
        if self.uses_statistics and self.activation_checkpointing:
            raise ValueError(
                f"normalization {self.normalization}: activation_checkpointing would compute the statistics of a batch "
                "twice; set it to false"
            )
        if self.vocabulary != "same" and self.initialize_from is None:
            raise ValueError(
                f"vocabulary {self.vocabulary} needs initialize_from: without it the vocabulary is the corpus'"
            )
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        if self.knows("hidden_size", "num_attention_heads") and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")
        if self.knows("num_hidden_layers") and self.activation_checkpointing > layers:
            raise ValueError(
                f"activation_checkpointing {self.activation_checkpointing} exceeds the {layers} layers; set it to true "
                "for all of them"
            )
        return self

    @model_serializer(mode="wrap")
    def _applicable(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields of BERT where the architecture is another."""
        values = dump(self)
        unused = BERT_KEYS if self.architecture != "bert" else ()
        return {key: value for key, value in values.items() if key not in unused}


# Where architecture and settings come from: name of the source -> content of a config.json.
_Sources = dict[str, dict[str, Any]]


def _sources(values: dict[str, Any]) -> _Sources:
    """The contents of `config` and of the folder's config.json, if there are such."""
    sources: _Sources = {}
    given = values.get("config")
    if isinstance(given, (str, Path)) and _is_path(given):
        path = Path(given)
        content = read_config_file(path / CONFIG_FILE if path.is_dir() else path)
        sources[str(given)] = {"model_type": "bert", **content}
    elif isinstance(given, Mapping):
        content = {"model_type": values.get("architecture", "bert"), **given}
        check_content(content, "config")
        sources["config"] = content
    folder = values.get("initialize_from")
    if isinstance(folder, (str, Path)) and (Path(folder) / CONFIG_FILE).is_file():
        content = {"model_type": "bert", **read_config_file(Path(folder) / CONFIG_FILE)}
        if sources and settings_of(content) != settings_of(next(iter(sources.values()))):
            raise ValueError(
                f"config and {folder}/{CONFIG_FILE} differ, whose weights require its own; remove config, and set "
                "dropout in settings"
            )
        sources = {f"{folder}/{CONFIG_FILE}": content}
    return sources


def _is_path(given: str | Path) -> bool:
    """Whether the field's own check will pass; its error is better than one of a file that cannot be read."""
    try:
        readable_path(given)
    except ValueError:
        return False
    return True


def _architecture(values: dict[str, Any], sources: _Sources) -> str:
    """The architecture, which is also set in `values`; it must be the same in all places that name one."""
    named = {name: content["model_type"] for name, content in sources.items()}
    if (preset := values.get("preset")) in PRESETS:
        named[f"preset {preset}"] = PRESETS[preset][0]
    elif preset in BERT_PRESETS:
        named[f"preset {preset}"] = "bert"
    if isinstance(given := values.get("architecture"), str):
        named["architecture"] = given
    if len(set(named.values())) > 1:
        raise ValueError(
            f"different architectures: {', '.join(f'{kind} ({name})' for name, kind in named.items())}; keep one of "
            "them (preset=null removes the preset of a base)"
        )
    found = next(iter(named.values()), "bert")
    if found != "bert":
        values["architecture"] = found
    return found


def _take_settings(values: dict[str, Any], architecture: str, sources: _Sources) -> None:
    """Of architectures other than BERT: set `config` and `settings`, and compare them with the folder."""
    misplaced = [key for key in BERT_KEYS if values.get(key) is not None]
    # A name that is no architecture is the fault to report, which the validation finds.
    if misplaced and (architecture in TESTED or values.get("untested")):
        if values.get("initialize_from") and sources and not is_free(misplaced[0], architecture):
            raise ValueError(
                f"{misplaced[0]} {values[misplaced[0]]!r}: sizes are those of {next(iter(sources))} ({architecture}); "
                "remove the setting"
            )
        raise ValueError(
            f"{misplaced[0]} is a field of bert; for {architecture}, write settings.{misplaced[0]}, or what its "
            "configuration class calls it"
        )
    for key in BERT_KEYS:
        values.pop(key, None)
    settings = dict(given) if isinstance(given := values.get("settings") or {}, Mapping) else {}
    of_preset = PRESETS[values["preset"]][1] if values.get("preset") in PRESETS else {}
    for name, content in sources.items():
        values["config"] = settings_of(content)
        if not values.get("initialize_from"):
            continue
        for key, value in {**of_preset, **settings}.items():
            if value != content.get(key, ...) and not is_free(key, architecture):
                stored = f"has {content[key]!r}" if key in content else "does not have it"
                raise ValueError(
                    f"settings.{key} is {value!r}{'' if key in settings else ' by preset'}, and {name} {stored}; its "
                    "weights require its own value: remove the setting"
                )
    values["settings"] = {**of_preset, **settings} if isinstance(given, Mapping) else given


def _take_bert_settings(values: dict[str, Any]) -> None:
    """Of BERT: settings that are fields of this section become fields."""
    if not isinstance(settings := values.get("settings") or {}, Mapping):
        return
    for key in settings:
        if key in BERT_KEYS:
            if values.get(key) is not None and values[key] != settings[key]:
                raise ValueError(f"{key} is {values[key]!r}, and settings.{key} {settings[key]!r}; give one of them")
            values[key] = settings[key]
    if settings:
        values["settings"] = {key: value for key, value in settings.items() if key not in BERT_KEYS}


def _with_sizes(values: dict[str, Any], sources: _Sources) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of BERT: values with missing sizes filled in from the preset, then from the file; the sizes of the file."""
    if (preset := values.get("preset")) in BERT_PRESETS:
        values = {**dict(zip(OF_BERT_PRESET, BERT_PRESETS[preset], strict=True)), **values}
    sizes: dict[str, Any] = {}
    for content in sources.values():
        sizes = {key: content.get(key, default) for key, default in {**_FIXED, **_FREE}.items()}
        values = {**sizes, **{key: v for key, v in values.items() if v is not None or key not in _FIXED}}
        values.pop("config", None)
    return values, sizes


def _check_sizes(model: ModelConfig, sizes: dict[str, Any], name: str) -> None:
    """Of BERT: raise ValueError if a given size is not that of the folder's config.json, whose path is `name`."""
    for key in _FIXED:
        if key in sizes and (given := getattr(model, key)) != sizes[key]:
            by_preset = f" (preset {model.preset})" if model.preset and key in OF_BERT_PRESET else ""
            raise ValueError(
                f"{key} is {given!r}{by_preset}, and {name} has {sizes[key]!r}, which its weights "
                f"require; remove {key}{' and preset' if by_preset else ''}, or set it to null"
            )
