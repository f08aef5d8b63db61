"""Sections of the training itself: batch, optimizer, schedule, evaluation, monitor. Loads no torch."""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from maskvr_ds.config.base import Section
from maskvr_ds.optim.variants import VARIANTS, Variant

Probability = Annotated[float, Field(ge=0, le=1)]


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
