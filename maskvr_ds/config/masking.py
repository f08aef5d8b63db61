"""The section `masking`: which tokens are predicted. Loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from maskvr_ds.config.base import Section

Probability = Annotated[float, Field(ge=0, le=1)]

# Settings that only some strategies heed.
STRATEGY_SETTINGS = {
    "placement": ("fully_explored",),
    "segments_per_sequence": ("fully_explored",),
    "frequency_power": ("frequency",),
    "document_frequency_power": ("frequency",),
    "floor": ("frequency",),
    "span_probability": ("span",),
    "span_maximum": ("span",),
    "sampler": ("frequency", "mapnet"),
    "estimator": ("frequency", "mapnet"),
}


class AutoConfig(Section):
    """Where masking.strategy is auto (auto.py): how often the gradient's variance is measured, on how much."""

    every_steps: PositiveInt = 1000
    # Sequences, and draws of two masks for each.
    rows: Annotated[int, Field(ge=3)] = 32
    draws: Annotated[int, Field(ge=2, le=64)] = 4
    # Numbers a layer that gradients are compressed to; squared norms are kept to √(2/size).
    sketch_size: Annotated[int, Field(ge=3)] = 4096
    # Of the intervals that must lie below 1 for a change from the baseline.
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    # Whether MAPNet (section mapnet) learns beside, to be used where it pays.
    proposal: bool = True


class MaskingConfig(Section):
    """What is predicted: strategies.py has the formulas. mapnet: see the section of that name."""

    # auto: fully_explored, or what is measured to be better on the way; see the section of that name.
    strategy: Literal["uniform", "whole_word", "span", "fully_explored", "frequency", "mapnet", "auto"] = "uniform"
    # Share of the maskable positions to predict.
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    # The rate changes linearly to this one, which the schedule's last step has. None: it is constant.
    final_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    # Of the positions to predict, how many show [MASK], how many a random token; the rest stay as they are.
    # 1 and 0: all show [MASK].
    mask_probability: Probability = 0.8
    random_probability: Probability = 0.1
    # fully_explored: a row's segments an epoch apart, or segments_per_sequence of them (None: all) in a global batch,
    # which then has so many times fewer different rows.
    placement: Literal["across_epochs", "same_batch"] = "across_epochs"
    segments_per_sequence: PositiveInt | None = None
    # frequency: π ∝ (tokens + 1)^-frequency_power · (passages + 1)^-document_frequency_power: how often the token
    # occurs, in how many passages (pieces of documents within a row). Mixed with a share `floor` of uniform, which
    # bounds the weights by 1/floor. Powers of opposite signs favour what occurs often where it occurs at all.
    frequency_power: Annotated[float, Field(ge=-2, le=2)] = 0.5
    document_frequency_power: Annotated[float, Field(ge=-2, le=2)] = 0.0
    floor: Annotated[float, Field(gt=0, le=1)] = 0.3
    # span: lengths in words, P(g) ∝ p (1 - p)^(g-1) for g ≤ span_maximum, p = span_probability.
    span_probability: Annotated[float, Field(gt=0, lt=1)] = 0.2
    span_maximum: Annotated[int, Field(ge=1, le=512)] = 10
    # frequency, mapnet: how a mask of given π is drawn (pareto.py; conditional_poisson.py, exact and slower), and what
    # the losses of its predictions are multiplied with (estimators.py says what each is unbiased for).
    sampler: Literal["pareto", "conditional_poisson"] = "pareto"
    estimator: Literal["horvitz_thompson", "hajek", "whole_mask"] = "horvitz_thompson"

    # Go on from a checkpoint whose run had other settings here or in the section mapnet, instead of refusing it.
    change_at_resume: bool = False

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if (total := self.mask_probability + self.random_probability) > 1:
            raise ValueError(f"mask_probability + random_probability is {total:g}, more than 1")
        return self

    @model_validator(mode="after")
    def _of_the_strategy(self) -> Self:
        for name, strategies in STRATEGY_SETTINGS.items():
            if self.strategy not in strategies and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to strategy {' or '.join(strategies)}; strategy is {self.strategy}")
        if self.estimator == "whole_mask" and self.sampler != "conditional_poisson":
            raise ValueError(
                f"estimator whole_mask needs the probability of a mask, which sampler {self.sampler} does not know; "
                "set sampler to conditional_poisson"
            )
        if self.segments_per_sequence is not None and self.placement != "same_batch":
            raise ValueError("segments_per_sequence belongs to placement same_batch; leave it out, or set placement")
        return self


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
