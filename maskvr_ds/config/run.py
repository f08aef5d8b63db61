"""RunConfig: everything a run is, checked before anything is spent. Loads no torch.

One section a component; a component is given its own section, never the whole. YAML gives the values,
`--set section.field=value` changes single ones (config_file.py). ds_configs/*.json own what is not here: ZeRO stage,
precision, communication, offload.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from maskvr_ds.config.data import DataConfig
from maskvr_ds.config.loading import ConfigError, Section, assign, describe, read_yaml
from maskvr_ds.config.masking import AutoConfig, MaskingConfig
from maskvr_ds.config.model import ModelConfig
from maskvr_ds.config.phases import OF_PHASES, Phase, check_phases, resolve, take_from_phases
from maskvr_ds.config.reliability import CheckpointConfig, DivergenceConfig, HangsConfig
from maskvr_ds.optim.variants import VARIANTS, Variant

Probability = Annotated[float, Field(ge=0, le=1)]


class MapNetConfig(Section):
    """The mask proposal network (mapnet.py), where masking.strategy is mapnet, or auto."""

    layers: PositiveInt = 1
    # Tokens on either side that a token is confronted with before the layers.
    reach: PositiveInt = 4
    # A multiple of the attention heads' size, 32.
    hidden: Annotated[int, Field(ge=32, multiple_of=32)] = 96
    # Of its own AdamW, constant.
    lr: Annotated[float, Field(gt=0)] = 1e-3
    # λ: the uniform part of the proposal; importance weights are at most 1/λ.
    floor: Annotated[float, Field(gt=0, le=1)] = 0.3
    # variance: the second moment of the weighted gradient norm itself; regression: on the norm's logarithm, which has
    # measured worse (docs/variance.md).
    objective: Literal["variance", "regression"] = "variance"
    # Masks by the proposal: always; never (it learns and is measured all the same); auto: while it pays for its time.
    gate: Literal["always", "never", "auto"] = "always"
    # auto: time that MAPNet adds, relative to the rest of a step. None: measured; a run is then not reproducible to
    # the bit, since the clock decides.
    cost: Annotated[float, Field(ge=0)] | None = None
    # Steps between comparisons of the ranks' networks, for which the host waits.
    check_every: PositiveInt = 100


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
    # lamb: whose LAMB, a row of the table in variants.py.
    variant: Literal["paper", "nvidia", "deepspeed"] = "paper"
    # In place of what the variant has; None: the variant's. The ratios bound the trust ratio.
    bias_correction: Literal["moments", "rate", "none"] | None = None
    min_ratio: Annotated[float, Field(ge=0)] | None = None
    max_ratio: Annotated[float, Field(gt=0)] | None = None
    # Not applied to biases and LayerNorm.
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # Largest global gradient norm; 0 turns clipping off.
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _of_lamb(self) -> Self:
        given = (self.variant != "paper", self.bias_correction, self.min_ratio, self.max_ratio)
        if self.name != "lamb" and given != (False, None, None, None):
            raise ValueError(
                f"variant, bias_correction, min_ratio and max_ratio are LAMB's; optimizer.name is {self.name}"
            )
        if (norm := self.lamb_variant().max_grad_norm) and self.gradient_clipping != norm:
            raise ValueError(
                f"variant {self.variant} scales gradients to a norm of at most {norm:g}, gradient_clipping is "
                f"{self.gradient_clipping:g}; set it to {norm:g}"
            )
        return self

    def lamb_variant(self) -> Variant:
        """The named variant with the switches that are set by themselves."""
        switches = self.model_dump(include={"bias_correction", "min_ratio", "max_ratio"}, exclude_none=True)
        return replace(VARIANTS[self.variant], **switches)


class ScheduleConfig(Section):
    """Warm-up from initial_lr to optimizer.lr, then decay towards final_lr; the formulas stand in schedule.py."""

    # The warm-up's length: in steps, or as a share of the schedule's steps (rounded); one of the two.
    warmup_steps: NonNegativeInt = 0
    warmup_share: Probability = 0.0
    # 1: linear; 2: bing_bert's.
    warmup_power: Annotated[float, Field(gt=0)] = 1.0
    initial_lr: Annotated[float, Field(ge=0)] = 0.0
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    decay: Literal["polynomial", "exponential"] = "polynomial"
    # polynomial: (1 − t)^power, where t is 0 at the end of the warm-up, or at the schedule's start (as NVIDIA has it).
    power: Annotated[float, Field(gt=0)] = 1.0
    decay_from: Literal["warmup", "start"] = "warmup"
    # exponential: times decay_rate every decay_steps steps.
    decay_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    decay_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _kinds(self) -> Self:
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_share {self.warmup_share:g} both say how long the "
                "warm-up is; give one of them"
            )
        exponential = (self.decay_rate, self.decay_steps)
        if self.decay == "exponential":
            if None in exponential:
                raise ValueError("decay exponential needs decay_rate and decay_steps")
            if (self.power, self.decay_from) != (1.0, "warmup"):
                raise ValueError("power and decay_from belong to decay polynomial; leave them out")
        elif exponential != (None, None):
            raise ValueError("decay_rate and decay_steps belong to decay exponential; leave them out, or set decay")
        return self

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up in a schedule of `total_steps`."""
        return self.warmup_steps or round(self.warmup_share * total_steps)


class TrainingConfig(Section):
    steps: PositiveInt
    # The step at which the schedule ends; None: `steps`. Set it to train only the first part of a longer run.
    schedule_steps: PositiveInt | None = None


class EvaluationConfig(Section):
    """Loss on held-out rows under uniform masks that never change; also after the last step. 0 steps: never."""

    every_steps: NonNegativeInt = 500
    # At most; the whole held-out corpus where it is smaller.
    rows: PositiveInt = 1024


class WandbConfig(Section):
    project: str
    group: str | None = None
    team: str | None = None


class MonitorConfig(Section):
    """DeepSpeed's monitors, beside metrics.jsonl which is always written."""

    tensorboard: bool = True
    csv: bool = False
    wandb: WandbConfig | None = None
    # Steps between histograms of LAMB's trust ratios (TensorBoard, Weights & Biases) and lines of trust_ratios.jsonl,
    # which has them tensor by tensor; 0: never.
    histogram_every: NonNegativeInt = 100


class RunConfig(Section):
    # The run's folder: config.yaml, metrics.jsonl, loss.png, checkpoints/, monitors.
    output_dir: Path
    # Keys initial weights, data order, masks and dropout.
    seed: NonNegativeInt = 0
    # A name from ds_configs/ or the path of a JSON file.
    deepspeed: str = "zero1_fp32"
    # With phases, data and training are theirs: here stand the first one's corpora and the sum of their steps.
    data: DataConfig
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    mapnet: MapNetConfig = MapNetConfig()
    auto: AutoConfig = AutoConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    hangs: HangsConfig = HangsConfig()
    monitor: MonitorConfig = MonitorConfig()
    # One after the other, each with what it changes in the sections above. None: the run is one phase.
    phases: tuple[Phase, ...] = ()

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
        end, rate = self.schedule_steps, self.optimizer.lr
        if self.training.steps > end:
            raise ValueError(f"training.steps {self.training.steps} exceeds training.schedule_steps {end}")
        if self.schedule.warmup_steps > end:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} exceeds the schedule's {end} steps")
        for name in ("initial_lr", "final_lr"):
            if (bound := getattr(self.schedule, name)) > rate:
                raise ValueError(f"schedule.{name} {bound} exceeds optimizer.lr {rate}")
        if self.masking.strategy == "auto" and self.mapnet.gate != MapNetConfig().gate:
            raise ValueError(
                f"mapnet.gate {self.mapnet.gate} belongs to masking.strategy mapnet; auto opens and shuts it by itself"
            )
        if (copies := self.masking.segments_per_sequence) and self.batch.global_size % copies:
            raise ValueError(
                f"batch.global_size {self.batch.global_size} is not a multiple of masking.segments_per_sequence "
                f"{copies}: the segments of a sequence share a global batch"
            )
        return self

    def phase(self, index: int) -> "RunConfig":
        """A phase as a run of its own, without phases; of a run without, the run itself.

        Where schedules continue, training.schedule_steps is their joint length. Raises ValueError naming the phase.
        """
        if not self.phases:
            return self
        values = resolve(self.model_dump(exclude={"phases"}), self.phases, index)
        values["model"] = self.model  # as it is: it tells sizes that were given from defaults
        try:
            return RunConfig.model_validate(values)
        except ValidationError as error:
            faults = "; ".join(describe(fault, RunConfig) for fault in error.errors(include_url=False))
            raise ValueError(f"phases.{self.phases[index].name}: {faults}") from None

    @property
    def learns_proposal(self) -> bool:
        """Whether MAPNet is trained beside the model."""
        return self.masking.strategy == "mapnet" or (self.masking.strategy == "auto" and self.auto.proposal)

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


def load_config(config: str | Path, assignments: Sequence[str] = ()) -> RunConfig:
    """YAML file or recipe, then `section.field=value` assignments (values in YAML), checked.

    Raises ConfigError with one line a fault: where, what, which rule.
    """
    values = read_yaml(config)
    for assignment in assignments:
        assign(values, assignment)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [describe(fault, RunConfig) for fault in error.errors(include_url=False)]
        raise ConfigError(f"config {config}:\n  " + "\n  ".join(faults)) from None


def add_config_options(parser: argparse.ArgumentParser, of: str = "") -> None:
    """The options that `load_config` takes. of: what their values are for, where that is not one run."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of a recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="assignments",
        help=f"change a value{of}",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which run: for `maskvr train` and `python -m maskvr_ds.train` alike."""
    add_config_options(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: go on from the newest complete checkpoint of output_dir, or begin; PATH: a checkpoint or a run",
    )


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to the same RunConfig."""
    values = config.model_dump(mode="json")
    if config.model.initialize_from is not None:  # defaults written out would stand against the folder's sizes
        values["model"] = config.model.model_dump(mode="json", exclude_unset=True)
    if config.phases:  # theirs, and taken from them when it is read
        del values["training"]
        values["data"] = {key: value for key, value in values["data"].items() if key not in OF_PHASES}
        values["phases"] = [phase.model_dump(mode="json", exclude_defaults=True) for phase in config.phases]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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
