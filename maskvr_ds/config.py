"""RunConfig: everything a run is, checked before anything is spent. Loads no torch.

One section a component; a component is given its own section, never the whole. YAML gives the values,
`--set section.field=value` changes single ones. ds_configs/*.json own what is not here: ZeRO stage, precision,
communication, offload.
"""

import argparse
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

Probability = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A fault in the configuration, in words for its author."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Corpora as `python -m data_pipeline build` writes them."""

    path: Path
    # None: `path`/held_out where it exists.
    held_out_path: Path | None = None
    # "full" reads every shard once at the start and compares its SHA-256, the work divided among the ranks.
    verify: Literal["full", "size"] = "full"
    # Steps that each rank reads ahead.
    prefetch: PositiveInt = 2


# Layers, hidden size, heads: Turc et al. 2019 (arXiv 1908.08962), base and large: Devlin et al. 2018.
PRESETS: dict[str, tuple[int, int, int]] = {
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}


class ModelConfig(Section):
    """transformers' BertConfig; the vocabulary comes from the corpus. A preset gives sizes, fields override it."""

    preset: Literal["bert-tiny", "bert-mini", "bert-small", "bert-medium", "bert-base", "bert-large"] | None = None
    num_hidden_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    # None: 4 × hidden_size.
    intermediate_size: PositiveInt | None = None
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    activation_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            layers, hidden, heads = PRESETS[values["preset"]]
            sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
            return {**sizes, **values}
        return values

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class MaskingConfig(Section):
    strategy: Literal["uniform"] = "uniform"
    # Share of the maskable positions to predict.
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    # Of the positions to predict, how many show [MASK], how many a random token; the rest stay as they are.
    mask_probability: Probability = 0.8
    random_probability: Probability = 0.1

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if (total := self.mask_probability + self.random_probability) > 1:
            raise ValueError(f"mask_probability + random_probability is {total:g}, more than 1")
        return self


class BatchConfig(Section):
    """Sequences. global_size is what the optimizer sees; gradient accumulation fills it up."""

    global_size: PositiveInt = 256
    # Sequences a forward pass on one rank.
    micro_size: PositiveInt = 32


class OptimizerConfig(Section):
    """lamb: `maskvr_ds.lamb`; adam: DeepSpeed's own AdamW (torch's on a CPU), as a baseline."""

    name: Literal["lamb", "adam"] = "lamb"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    # Not applied to biases and LayerNorm.
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # Largest global gradient norm; 0 turns clipping off.
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0


class ScheduleConfig(Section):
    """Linear warm-up to optimizer.lr, then final + (lr − final)(1 − t)^power."""

    warmup_steps: NonNegativeInt = 0
    power: Annotated[float, Field(gt=0)] = 1.0
    final_lr: Annotated[float, Field(ge=0)] = 0.0


class TrainingConfig(Section):
    steps: PositiveInt
    # The step at which the schedule ends; None: `steps`. Set it to train only the first part of a longer run.
    schedule_steps: PositiveInt | None = None


class EvaluationConfig(Section):
    """Loss on held-out rows under uniform masks that never change; also after the last step. 0 steps: never."""

    every_steps: NonNegativeInt = 500
    # At most; the whole held-out corpus where it is smaller.
    rows: PositiveInt = 1024


class CheckpointConfig(Section):
    """After every n-th step and after the last; 0: only after the last."""

    every_steps: NonNegativeInt = 1000
    keep_last: PositiveInt = 3


class WandbConfig(Section):
    project: str
    group: str | None = None
    team: str | None = None


class MonitorConfig(Section):
    """DeepSpeed's monitors, beside metrics.jsonl which is always written."""

    tensorboard: bool = True
    csv: bool = False
    wandb: WandbConfig | None = None


class RunConfig(Section):
    # The run's folder: config.yaml, metrics.jsonl, loss.png, checkpoints/, monitors.
    output_dir: Path
    # Keys initial weights, data order, masks and dropout.
    seed: NonNegativeInt = 0
    # A name from ds_configs/ or the path of a JSON file.
    deepspeed: str = "zero1_fp32"
    data: DataConfig
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        end = self.schedule_steps
        if self.training.steps > end:
            raise ValueError(f"training.steps {self.training.steps} exceeds training.schedule_steps {end}")
        if self.schedule.warmup_steps > end:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds the schedule's {end} steps")
        if self.schedule.final_lr > self.optimizer.lr:
            raise ValueError(f"schedule.final_lr {self.schedule.final_lr} exceeds optimizer.lr {self.optimizer.lr}")
        return self

    @property
    def schedule_steps(self) -> int:
        return self.training.schedule_steps or self.training.steps

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches a step on each rank. Raises ConfigError where the global batch does not divide."""
        size, micro = self.batch.global_size, self.batch.micro_size
        if size % (micro * world_size):
            per_pass = micro * world_size
            nearest = sorted({max(1, size // per_pass) * per_pass, (size // per_pass + 1) * per_pass})
            raise ConfigError(
                f"batch.global_size {size} is not a multiple of batch.micro_size {micro} × {world_size} ranks = "
                f"{per_pass}; set batch.global_size to {' or '.join(map(str, nearest))}, or change batch.micro_size"
            )
        return size // (micro * world_size)


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("maskvr_ds.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe. Raises ConfigError where there is none of that name."""
    if name not in recipes():
        raise ConfigError(f"{name!r}: no such recipe; there are {', '.join(recipes())}")
    return (resources.files("maskvr_ds.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(config: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in the recipe of that name. Raises ConfigError where there is none."""
    path = Path(config)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(config) in recipes():
        text = recipe_text(str(config))
    else:
        raise ConfigError(f"config {str(config)!r}: neither a file nor a recipe ({', '.join(recipes())})")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {config}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {config}: a mapping of sections expected, found {type(values).__name__}")
    return values


def load_config(config: str | Path, assignments: Sequence[str] = ()) -> RunConfig:
    """YAML file or recipe, then `section.field=value` assignments (values in YAML), checked.

    Raises ConfigError with one line a fault: where, what, which rule.
    """
    values = read_yaml(config)
    for assignment in assignments:
        _assign(values, assignment)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors(include_url=False)]
        raise ConfigError(f"config {config}:\n  " + "\n  ".join(faults)) from None


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which run: for `maskvr train` and `python -m maskvr_ds.train` alike."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of a recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="assignments", help="change a value"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: go on from the newest complete checkpoint of output_dir, or begin; PATH: a checkpoint or a run",
    )


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {assignment}: section.field=value expected")
    *sections, field = key.strip().split(".")
    for section in sections:
        nested = values.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--set {assignment}: {section} is a value, not a section")
        values = nested
    try:
        values[field] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not YAML: {error}") from None


def _describe(fault: Any) -> str:
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; known here: {', '.join(_known_keys(fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: required, but not given"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f" (given: {fault['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to the same RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def deepspeed_config_path(name: str) -> Path:
    """The JSON file behind RunConfig.deepspeed. Raises ConfigError where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("ds_configs")))
    packaged = folder / f"{name}.json"
    if Path(name).name == name and packaged.is_file():
        return packaged
    known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
    raise ConfigError(f"deepspeed: {name!r} is neither a file nor one of {known}")
