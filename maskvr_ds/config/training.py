"""Sections `batch`, `optimizer`, `schedule`, `training`, `evaluation` and `monitor`. Loads no torch."""

from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from maskvr_ds.config.base import (
    Decay,
    Epochs,
    Epsilon,
    Exponent,
    GlobalBatch,
    LearningRate,
    LearningRateOrZero,
    MicroBatch,
    PositiveRatio,
    PositiveRows,
    PositiveShare,
    PositiveSteps,
    Ratio,
    Section,
    Share,
    Steps,
    Tokens,
)
from maskvr_ds.optim.variants import VARIANTS, Variant


class BatchConfig(Section):
    """Batch sizes, in sequences. Gradient accumulation makes up the difference."""

    global_size: GlobalBatch = 256
    """Sequences per optimizer step, over all ranks."""
    micro_size: MicroBatch = 32
    """Sequences per forward pass on one rank. auto: on GPUs, the largest number that fits into their memory and divides
    a rank's share of global_size, found by trying at the start, and written into the run's config.yaml."""

    @property
    def is_auto(self) -> bool:
        """Whether micro_size is yet to be found (training/micro_size.py); its type says int for what comes after."""
        return isinstance(self.micro_size, str)


# Measured by tests/distributed/test_muon.py.
_NO_MUON = (
    "muon is not supported: at ZeRO stages 1 to 3 DeepSpeed 0.19 applies gradient_clipping to Muon's finished update "
    "instead of the gradients, and reports that update's norm as the gradient norm, so that a run differs from one at "
    "stage 0 and from Muon in one process; choose lamb, adamw or stable_adamw"
)


class OptimizerConfig(Section):
    """The optimizer. Biases and LayerNorm have no weight decay."""

    name: Literal["lamb", "adamw", "stable_adamw"] = "lamb"
    """lamb: LAMB with exact trust ratios; adamw: AdamW (DeepSpeed's FusedAdam, on a CPU torch's), also called adam;
    stable_adamw: AdamW with updates clipped per tensor, arXiv:2304.13013."""
    lr: LearningRate = 1e-3
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: Epsilon = 1e-6
    """Added to the square root of the second moment."""
    variant: Literal["paper", "nvidia", "deepspeed"] = "paper"
    """lamb: whose LAMB, a row of the table in optim/variants.py."""
    bias_correction: Literal["moments", "rate", "none"] | None = None
    """lamb: overrides the variant's bias correction; null: the variant's."""
    min_ratio: Ratio | None = None
    """lamb: lower bound of the trust ratio; null: the variant's."""
    max_ratio: PositiveRatio | None = None
    """lamb: upper bound of the trust ratio; null: the variant's."""
    fused: bool = False
    """lamb: update by two Triton kernels: GPUs, without offload of the optimizer; equal up to rounding."""
    weight_decay: Ratio = 0.01
    """Decoupled weight decay λ."""
    gradient_clipping: Ratio = 1.0
    """Maximum global gradient norm; 0: no clipping."""

    @field_validator("name", mode="before")
    @classmethod
    def _known_name(cls, name: Any) -> Any:
        if name == "muon":
            raise ValueError(_NO_MUON)
        return "adamw" if name == "adam" else name  # its name in earlier versions

    @model_validator(mode="after")
    def _of_lamb(self) -> Self:
        given = (self.variant != "paper", self.fused, self.bias_correction, self.min_ratio, self.max_ratio)
        if self.name != "lamb" and given != (False, False, None, None, None):
            raise ValueError(
                "variant, fused, bias_correction, min_ratio and max_ratio belong to LAMB; optimizer.name is "
                f"{self.name}"
            )
        if (norm := self.lamb_variant().max_grad_norm) and self.gradient_clipping != norm:
            raise ValueError(
                f"variant {self.variant} scales gradients to a norm of at most {norm:g}, gradient_clipping is "
                f"{self.gradient_clipping:g}; set it to {norm:g}"
            )
        return self

    def lamb_variant(self) -> Variant:
        """The variant with the overrides given here."""
        overrides = self.model_dump(include={"bias_correction", "min_ratio", "max_ratio"}, exclude_none=True)
        return replace(VARIANTS[self.variant], **overrides)


class ScheduleConfig(Section):
    """Learning rate: warm-up from initial_lr to optimizer.lr, then decay towards final_lr (training/schedule.py), at
    once or, with a cooldown, in the last steps of the schedule only (warm-up, stable, decay)."""

    warmup_steps: Steps = 0
    """Length of the warm-up in steps; alternative to warmup_share."""
    warmup_share: Share = 0.0
    """Length of the warm-up as a fraction of the schedule's steps, rounded."""
    warmup_power: Exponent = 1.0
    """Exponent of the warm-up; 1: linear, 2: as in bing_bert."""
    initial_lr: LearningRateOrZero = 0.0
    """Learning rate at the start of the warm-up."""
    final_lr: LearningRateOrZero = 0.0
    """Learning rate that the decay approaches."""
    decay: Literal["polynomial", "linear", "cosine", "1-sqrt", "exponential", "constant"] = "polynomial"
    """With t from 0 to 1 over the decay, polynomial: (1 − t)^power; linear: 1 − t; cosine: (1 + cos πt) / 2; 1-sqrt:
    1 − √t (ModernBERT). exponential: times decay_rate every decay_steps steps; constant: none."""
    cooldown_steps: PositiveSteps | None = None
    """Length of the decay at the end of the schedule in steps; the rate stays at its peak until then. Alternative to
    cooldown_share; null for both: the decay starts with the end of the warm-up. Not with exponential and constant."""
    cooldown_share: PositiveShare | None = None
    """Length of the decay as a fraction of the schedule's steps, rounded, at least one step."""
    power: Exponent = 1.0
    """polynomial: exponent."""
    decay_from: Literal["warmup", "start"] = "warmup"
    """polynomial: t is 0 at the end of the warm-up, or at the start of the schedule (NVIDIA)."""
    decay_rate: PositiveShare | None = None
    """exponential: factor, required."""
    decay_steps: PositiveSteps | None = None
    """exponential: steps per factor, required."""

    @model_validator(mode="after")
    def _kinds(self) -> Self:
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_share {self.warmup_share:g} both set the length of the "
                "warm-up; set one of them"
            )
        exponential = (self.decay_rate, self.decay_steps)
        if self.decay == "exponential" and None in exponential:
            raise ValueError("decay exponential needs decay_rate and decay_steps")
        if self.decay != "exponential" and exponential != (None, None):
            raise ValueError("decay_rate and decay_steps belong to decay exponential; remove them, or set decay")
        if self.decay != "polynomial" and (self.power, self.decay_from) != (1.0, "warmup"):
            raise ValueError("power and decay_from belong to decay polynomial; remove them")
        if self.decay == "constant" and self.final_lr:
            raise ValueError(f"final_lr {self.final_lr:g}: decay constant never reaches it; remove it, or set decay")
        self._check_cooldown()
        return self

    def _check_cooldown(self) -> None:
        if self.cooldown_steps is None and self.cooldown_share is None:
            return
        if self.cooldown_steps is not None and self.cooldown_share is not None:
            raise ValueError(
                f"cooldown_steps {self.cooldown_steps} and cooldown_share {self.cooldown_share:g} both set the length "
                "of the decay; set one of them"
            )
        if self.decay in ("exponential", "constant"):
            raise ValueError(f"cooldown_steps and cooldown_share: decay {self.decay} has no end; set another decay")
        if self.decay_from == "start":
            raise ValueError(
                "cooldown_steps and cooldown_share: decay_from start begins the decay elsewhere; remove it"
            )

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up in a schedule of `total_steps`."""
        return self.warmup_steps or round(self.warmup_share * total_steps)

    def decay_start(self, total_steps: int) -> int:
        """Step at which the decay starts in a schedule of `total_steps`: the rate of that step is the peak still."""
        if self.decay_from == "start":
            return 0
        if self.cooldown_share is not None:
            return total_steps - max(1, round(self.cooldown_share * total_steps))
        return self.warmup(total_steps) if self.cooldown_steps is None else total_steps - self.cooldown_steps


# What torch.compile compiles (models/compiled.py).
Compile = Literal["none", "layers", "model"]


class TrainingConfig(Section):
    """Length of the training, and what is compiled. The length is exactly one of steps, epochs and tokens. The last two
    are converted to steps at the start (training/length.py), rounded up; the number of ranks does not matter."""

    steps: PositiveSteps | None = None
    """Optimizer steps to train."""
    epochs: Epochs | None = None
    """Passes over the corpus, of a mixture with its weights; not with masking.strategy auto, which changes how often a
    row is repeated."""
    tokens: Tokens | None = None
    """Tokens to train on, padding included, as `tokens` in metrics.jsonl counts them."""
    schedule_steps: PositiveSteps | None = None
    """Step at which the schedule ends; null: the last one. Set it to train only the first part of a longer run."""

    compile: Compile = "none"
    """What torch.compile compiles: nothing, each layer of the encoder (seconds to start), or the encoder as a whole;
    the same for all phases."""

    @property
    def is_resolved(self) -> bool:
        """Whether the number of steps is known; otherwise see training/length.py."""
        return self.steps is not None

    @property
    def known_steps(self) -> int:
        """The number of steps of a resolved configuration."""
        assert self.steps is not None, "resolve training.epochs and training.tokens first (training/length.py)"
        return self.steps


class EvaluationConfig(Section):
    """Loss on held-out rows under fixed uniform masks; also measured after the last step."""

    every_steps: Steps = 500
    """Steps between evaluations; 0: never."""
    rows: PositiveRows = 1024
    """Maximum number of held-out rows."""


class WandbConfig(Section):
    """Weights & Biases."""

    project: str
    """Name of the project."""
    group: str | None = None
    """Group of the run; null: none."""
    team: str | None = None
    """Team (entity); null: the default one."""


class MonitorConfig(Section):
    """DeepSpeed's monitors, in addition to metrics.jsonl, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""
    csv: bool = False
    """Write CSV files to RUN/csv."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases; null: do not."""
    histogram_every: Steps = 100
    """Steps between histograms of LAMB's trust ratios (TensorBoard, Weights & Biases) and lines of trust_ratios.jsonl,
    which lists them per tensor; 0: never."""
    health_every: Steps = 0
    """Steps between measurements of activations and attention by layer on a few fixed rows, by one forward pass without
    dropout (keys health_* of metrics.jsonl); 0: never."""
