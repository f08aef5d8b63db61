"""RunConfig: the complete configuration of a run, validated before training starts. Loads no torch.

One section per component; a component receives its own section, never the entire configuration. Values come from YAML,
and single ones from `--set section.field=value` (loading.py). ds_configs/*.json hold the rest: ZeRO stage, precision,
communication, offload.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from maskvr_ds.config.base import ConfigError, PathSetting, Section, Seed, faults_of
from maskvr_ds.config.data import DataConfig
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.config.loading import assign, read_yaml
from maskvr_ds.config.masking import MaskingConfig
from maskvr_ds.config.model import ModelConfig
from maskvr_ds.config.objectives import Objectives, check_pair_model
from maskvr_ds.config.phases import OF_PHASES, Phase, check_phases, resolve, take_from_phases
from maskvr_ds.config.reliability import CheckpointConfig, DivergenceConfig, HangsConfig, ReplicasConfig
from maskvr_ds.config.training import (
    BatchConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from maskvr_ds.run_folder.migration import SCHEMA, renamed


class RunConfig(Section):
    """The configuration of a run. Only output_dir, data and the length of the training are required."""

    output_dir: PathSetting
    """Directory of the run: config.yaml, metrics.jsonl, loss.png, checkpoints/, monitors."""
    seed: Seed = 0
    """Seed of initial weights, data order, masks and dropout."""
    deepspeed: str = "zero1_fp32"
    """Name of a file in ds_configs/, or path of a JSON file."""
    # With phases: the corpora of the first one, and in `training` the sum of all steps.
    data: DataConfig
    """Corpora; with phases, set by each of them."""
    model: ModelConfig = ModelConfig()
    """Sizes of the model, or an existing model to start from."""
    masking: MaskingConfig = MaskingConfig()
    """Choice of the predicted tokens."""
    objectives: Objectives | None = None
    """Weights of masked tokens and sentence pairs in the loss; null: masked tokens, on corpora without pairs."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """LAMB or AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate schedule."""
    training: TrainingConfig
    """Length of the training; with phases, set by each of them."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Schedule and retention of checkpoints."""
    divergence: DivergenceConfig = DivergenceConfig()
    """Guard against divergence."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Comparison of the ranks' copies of the weights."""
    hangs: HangsConfig = HangsConfig()
    """Detection of hanging ranks."""
    monitor: MonitorConfig = MonitorConfig()
    """TensorBoard, CSV, Weights & Biases."""
    phases: tuple[Phase, ...] = ()
    """Phases trained one after the other, each with the fields that it changes; empty: a single phase."""

    @model_validator(mode="before")
    @classmethod
    def _take_from_phases(cls, values: Any) -> Any:
        return take_from_phases(values)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.phases:
            check_phases(self.phases)
            for index in range(len(self.phases)):
                self.phase(index)
            return self
        _check_length(self.training, self.schedule)
        if self.checkpoint.keep_best and self.evaluation.every_steps == 0:
            raise ValueError(
                "checkpoint.keep_best needs held-out losses, and evaluation.every_steps is 0; set it above 0"
            )
        if self.training.compile == "model" and self.model.activation_checkpointing:
            raise ValueError(
                "training.compile model: transformers' encoders cannot be compiled as a whole with "
                "model.activation_checkpointing; set it to layers"
            )
        if late := self.masking.late_layer:
            _check_late_layer(late, self.model, self.training.compile)
        if self.masking.auto.late_layers:
            _check_late_layers(self.masking.auto.late_layers, self.model, self.training.compile)
        if self.model.uses_statistics:
            self._check_statistics()
        if (pair := self.pair_objective) is not None:
            check_pair_model(self.model, pair)
            if self.data.attention == "documents":
                raise ValueError(
                    f"data.attention documents: the two segments of a pair attend to each other, and objectives.{pair} "
                    "is set; set data.attention to rows, or objectives to [mlm] with a corpus without pairs"
                )
            if self.masking.strategy == "auto":
                raise ValueError(
                    "masking.strategy auto compares variances of the masked-LM gradient only, and "
                    f"objectives.{pair} adds another; choose another strategy"
                )
        if not (self.schedule.warmup_steps or self.schedule.warmup_share):
            for name, unused in (("initial_lr", 0.0), ("warmup_power", 1.0)):
                if (value := getattr(self.schedule, name)) != unused:
                    raise ValueError(
                        f"schedule.{name} {value:g}: there is no warm-up that it belongs to; set schedule.warmup_steps "
                        "or schedule.warmup_share, or remove it"
                    )
        rate = self.optimizer.lr
        for name in ("initial_lr", "final_lr"):
            if (bound := getattr(self.schedule, name)) > rate:
                raise ValueError(f"schedule.{name} {bound} exceeds optimizer.lr {rate}")
        if (copies := self.masking.fully_explored.segments_per_sequence) and self.batch.global_size % copies:
            raise ValueError(
                f"batch.global_size {self.batch.global_size} is not a multiple of "
                f"masking.fully_explored.segments_per_sequence {copies}: the segments of a sequence share a global "
                "batch"
            )
        return self

    def _check_statistics(self) -> None:
        """Raise ValueError for what does not work with statistics of the batch."""
        refused = {
            "training.compile": (self.training.compile, "none", "the statistics are summed over ranks within layers"),
            "data.attention": (self.data.attention, "rows", "padding is not marked there"),
            "masking.late_layer": (
                self.masking.late_layer,
                0,
                "the lower layers have other positions than padding marks",
            ),
        }
        for name, (value, needed, reason) in refused.items():
            if value != needed:
                raise ValueError(
                    f"model.normalization {self.model.normalization}: {name} is {value}, and {reason}; set "
                    f"it to {needed}"
                )
        if self.masking.strategy == "auto":
            raise ValueError(
                f"model.normalization {self.model.normalization}: masking.strategy auto measures gradients of single "
                "rows, which depend on the others here; choose another strategy"
            )
        if self.batch.is_auto:
            raise ValueError(
                f"model.normalization {self.model.normalization}: the statistics are those of one pass, so that "
                "batch.micro_size auto would change the training; set it to batch.global_size ÷ ranks"
            )

    def phase(self, index: int) -> "RunConfig":
        """One phase resolved to a configuration without phases; the run itself if it has none.

        If schedules continue, training.schedule_steps is their joint length. Raises ValueError naming the phase.
        """
        if not self.phases:
            return self
        values = resolve(self.model_dump(exclude={"phases"}), self.phases, index)
        values["model"] = self.model  # not dumped: it knows which sizes were set explicitly
        try:
            return validated(values)
        except ConfigError as error:
            raise ValueError(f"phases.{self.phases[index].name}: {error}") from None

    def named_phases(self) -> list[tuple[str, "RunConfig"]]:
        """The phases in order, resolved, each after the start of a message that names it; of a run without phases
        itself, after no text."""
        if not self.phases:
            return [("", self)]
        return [(f"phase {phase.name!r}: ", self.phase(index)) for index, phase in enumerate(self.phases)]

    @property
    def pair_objective(self) -> str | None:
        """Objective trained on sentence pairs: nsp, sop or None."""
        return None if self.objectives is None else self.objectives.pair

    @property
    def schedule_steps(self) -> int:
        return self.training.schedule_steps or self.training.known_steps

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per step and rank; with micro_size auto, at most. Raises ConfigError if the global batch is not
        divisible."""
        size, micro = self.batch.global_size, 1 if self.batch.is_auto else self.batch.micro_size
        per_pass = micro * world_size
        if size % per_pass:
            nearest = _multiples(size, per_pass)
            remedy = f"set batch.global_size to {nearest}"
            if size % world_size == 0:
                share = size // world_size
                fits = next(rows for rows in range(min(micro, share), 0, -1) if share % rows == 0)
                remedy = f"set batch.micro_size to {fits}, or batch.global_size to {nearest}"
            elif micro > 1:
                remedy += f", or to {_multiples(size, world_size)} with a batch.micro_size that divides a rank's share"
            raise ConfigError(
                f"batch.global_size {size} is not a multiple of batch.micro_size {micro} × {world_size} ranks = "
                f"{per_pass}; {remedy}"
            )
        return size // per_pass


def _multiples(size: int, of: int) -> str:
    """The positive multiples next to `size`, which is none, in words."""
    return " or ".join(map(str, sorted({max(1, size // of) * of, (size // of + 1) * of})))


def _check_late_layers(layers: tuple[int, ...], model: ModelConfig, how: str) -> None:
    """Raise ValueError if strategy auto could not let [MASK] enter at one of `layers`. how: training.compile."""
    if how != "none":
        raise ValueError(
            f"training.compile {how}: compiled layers have rows of fixed lengths, which change with "
            "masking.auto.late_layers; set it to none, or fix the layer by masking.late_layer"
        )
    _check_late_layer(max(layers), model, how, "masking.auto.late_layers")


def _check_late_layer(late: int, model: ModelConfig, how: str, name: str = "masking.late_layer") -> None:
    """Raise ValueError if [MASK] cannot enter at layer `late`. Of other architectures than BERT, the model itself knows
    (models/late_masks.py). how: training.compile. name: of the setting."""
    if how == "model":
        raise ValueError(
            "training.compile model: an encoder cannot be compiled as a whole with masking.late_layer; set it to layers"
        )
    count = model.num_hidden_layers
    if model.knows("num_hidden_layers") and late >= count:
        raise ValueError(
            f"{name} {late}: [MASK] must enter before the last layer, and bert has {count} layers; set it "
            f"to at most {count - 1}"
        )


def _check_length(training: TrainingConfig, schedule: ScheduleConfig) -> None:
    given = training.model_dump(include={"steps", "epochs", "tokens"}, exclude_none=True)
    if not given:
        raise ValueError("training.steps: required, but not given; set it, or training.epochs or training.tokens")
    if len(given) > 1:
        listed = " and ".join(f"training.{name} {value:,g}" for name, value in given.items())
        raise ValueError(
            f"{listed} {'both' if len(given) == 2 else 'all'} set the length of the training; keep one of them and set "
            f"the other{'s' * (len(given) > 2)} to null"
        )
    end = training.schedule_steps or training.steps
    if end is None:
        return
    if training.steps is not None and training.steps > end:
        raise ValueError(f"training.steps {training.steps} exceeds training.schedule_steps {end}")
    if schedule.warmup_steps > end:
        raise ValueError(f"schedule.warmup_steps {schedule.warmup_steps} exceeds the schedule's {end} steps")
    if schedule.decay_from == "warmup" and (start := schedule.decay_start(end)) < (warmup := schedule.warmup(end)):
        raise ValueError(
            f"schedule.cooldown_steps or cooldown_share: the decay takes {end - start} of the schedule's {end} steps "
            f"and the warm-up {warmup}; shorten one of them"
        )


def load_config(config: str | Path, assignments: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file or recipe, apply `section.field=value` assignments (values in YAML), and validate.

    Raises ConfigError with one line per fault: location, rule, value.
    """
    values = read_yaml(config)
    for assignment in assignments:
        assign(values, assignment)
    if old := renamed(values):
        raise ConfigError(f"config {config}:\n  " + "\n  ".join(old))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"config {config}:\n  " + "\n  ".join(faults_of(error, RunConfig))) from None


def validated(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of these raw values. Raises ConfigError with all faults on one line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(faults_of(error, RunConfig))) from None


def raw_values(config: RunConfig) -> dict[str, Any]:
    """Values from which `validated` makes an equal RunConfig, to change some of them."""
    # The model is not dumped: it knows which sizes were set explicitly.
    return {**_dumped(config), "model": config.model}


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back as an equal RunConfig, with the number of its schema."""
    return yaml.safe_dump({"schema": SCHEMA, **_dumped(config)}, sort_keys=False, allow_unicode=True)


def _dumped(config: RunConfig) -> dict[str, Any]:
    """In JSON types."""
    values = {**config.model_dump(mode="json"), "masking": config.masking.dump()}
    if config.model.initialize_from is not None:  # explicit defaults would contradict the folder's sizes
        values["model"] = config.model.model_dump(mode="json", exclude_unset=True)
    if config.phases:  # belong to the phases, and are taken from them on reading
        values["training"] = {"compile": config.training.compile}
        values["data"] = {key: value for key, value in values["data"].items() if key not in OF_PHASES}
        values["phases"] = [phase.model_dump(mode="json", exclude_defaults=True) for phase in config.phases]
    return values


def deepspeed_config_path(name: str) -> Path:
    """The JSON file that RunConfig.deepspeed names. Raises ConfigError if there is none."""
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("ds_configs")))
    packaged = folder / f"{name}.json"
    if Path(name).name == name and packaged.is_file():
        return packaged
    known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
    raise ConfigError(f"deepspeed: {name!r} is neither a file nor one of {known}")


def run_deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run (`read_deepspeed_config`). Raises ConfigError if the two do not fit."""
    path = deepspeed_config_path(config.deepspeed)
    compiled = config.training.compile != "none"
    return read_deepspeed_config(path, guarded=config.divergence.enabled, compiled=compiled)
