"""Section `masking`: which tokens are predicted, with one subsection per strategy. Loads no torch."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from maskvr_ds.config.base import (
    Count,
    LearningRate,
    OpenShare,
    PathSetting,
    PositiveCount,
    PositiveRows,
    PositiveShare,
    PositiveSteps,
    Ratio,
    Section,
    Share,
    SignedExponent,
    Width,
)

# Strategy -> its subsections of `masking`.
SUBSECTIONS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "whole_word": (),
    "span": ("span",),
    "fully_explored": ("fully_explored",),
    "frequency": ("frequency",),
    "mapnet": ("mapnet",),
    "auto": ("auto", "mapnet"),
}
# Settings of subsection mapnet that strategy auto controls.
_NOT_UNDER_AUTO = ("gate", "sampler", "estimator")
# Settings of the proposal network that may change on resume.
MAPNET_MAY_CHANGE = {"lr", "check_every", "mask_share"}
# Rate of the held-out masks, and of the goal whose gradient progress is measured against.
HELD_OUT_RATE = 0.15
# Fewest rows of a measurement of auto: an estimate takes products of four different ones, its interval one more.
FEWEST_ROWS = 5
# Default of auto.max_rows, in auto.rows.
_MORE_ROWS = 16
# Settings that earlier versions did not have, with the value that continues what they did: not part of the identity
# then, or their checkpoints would not match.
_ADDED: dict[str, Any] = {"rate_decay": "linear", "late_layer": 0}
_ADDED_TO_MAPNET: dict[str, Any] = {"learn_every": 1}
# The same of the subsection auto.
_ADDED_TO_AUTO: dict[str, Any] = {
    "proposal_saves": 0.3,
    "final_share": 0.1,
    "late_layers": [],
    "max_share": 0.05,
    "max_rows": None,
}


class SpanConfig(Section):
    """Strategy span: lengths g in words, for g ≤ max_length P(g) ∝ p (1 − p)^(g−1) (SpanBERT, arXiv 1907.10529), or 1/g
    (ALBERT, arXiv 1909.11942)."""

    lengths: Literal["geometric", "inverse"] = "geometric"
    """geometric: of SpanBERT; inverse: 1/g, of ALBERT's n-grams, whose longest have 3 words."""
    geometric_p: OpenShare = 0.2
    """p of the geometric distribution."""
    max_length: Annotated[PositiveCount, Field(le=512)] = 10
    """Longest span, in words."""

    @model_validator(mode="after")
    def _p_of_geometric(self) -> Self:
        if self.lengths != "geometric" and "geometric_p" in self.model_fields_set and self.geometric_p != 0.2:
            raise ValueError(
                f"geometric_p {self.geometric_p:g} belongs to lengths geometric; lengths is {self.lengths}"
            )
        return self


class FullyExploredConfig(Section):
    """Strategy fully_explored: disjoint segments of a row's tokens (arXiv 2010.06040)."""

    placement: Literal["across_epochs", "same_batch"] = "across_epochs"
    """across_epochs: one segment of a row per epoch; same_batch: several segments of a row in one global batch, which
    then contains correspondingly fewer distinct rows."""
    segments_per_sequence: PositiveCount | None = None
    """same_batch: number of segments of a row per global batch; null: all of them."""

    @model_validator(mode="after")
    def _segments_need_same_batch(self) -> Self:
        if self.segments_per_sequence is not None and self.placement != "same_batch":
            raise ValueError("segments_per_sequence belongs to placement same_batch; remove it, or set placement")
        return self


class WeightedSampling(Section):
    """Sampling with unequal inclusion probabilities π, for strategies frequency and mapnet."""

    sampler: Literal["pareto", "conditional_poisson"] = "pareto"
    """Sampler of masks with given π: pareto is fast and approximates π; conditional_poisson is exact and slower."""
    estimator: Literal["horvitz_thompson", "hajek", "whole_mask"] = "horvitz_thompson"
    """Importance weights of the losses; see masking/estimators.py for what each is unbiased for."""

    @model_validator(mode="after")
    def _whole_mask_needs_probabilities(self) -> Self:
        if self.estimator == "whole_mask" and self.sampler != "conditional_poisson":
            raise ValueError(
                f"estimator whole_mask needs the probability of a mask, which sampler {self.sampler} does not provide; "
                "set sampler to conditional_poisson"
            )
        return self


class FrequencyConfig(WeightedSampling):
    """Strategy frequency: π ∝ (tokens + 1)^−power · (passages + 1)^−document_power.

    tokens: occurrences of the token in the corpus; passages: pieces of documents within rows that contain it. Powers of
    opposite sign favour tokens that occur often wherever they occur at all. With `scores`, π ∝ score instead.
    """

    power: SignedExponent = 0.5
    """Exponent of the token frequency; positive values favour rare tokens."""
    document_power: SignedExponent = 0.0
    """Exponent of the number of passages that contain the token."""
    floor: PositiveShare = 0.3
    """λ: share of uniform masking in π; importance weights are at most 1/λ."""
    scores: PathSetting | None = None
    """File with a score for each token, as written by `maskvr token-scores`, in place of the powers of frequencies."""

    @model_validator(mode="after")
    def _scores_or_powers(self) -> Self:
        defaults = {"power": 0.5, "document_power": 0.0}
        given = [name for name, value in defaults.items() if getattr(self, name) != value]
        if self.scores is not None and given:
            raise ValueError(
                f"{given[0]} does not apply with scores, which replace the frequencies; remove one of them"
            )
        return self


class MapNetConfig(WeightedSampling):
    """Strategies mapnet and auto: the mask proposal network (arXiv 2008.05333; masking/mapnet.py)."""

    layers: PositiveCount = 1
    """Transformer layers."""
    reach: PositiveCount = 4
    """Half-width, in tokens, of the local context window fed to the network."""
    hidden: Annotated[Width, Field(ge=32, multiple_of=32)] = 96
    """Hidden size: a multiple of 32, the size of an attention head."""
    lr: LearningRate = 1e-3
    """Learning rate of the network's own AdamW, constant."""
    floor: PositiveShare = 0.3
    """λ: share of uniform masking in the proposal; importance weights are at most 1/λ."""
    objective: Literal["variance", "regression"] = "variance"
    """variance: the second moment of the weighted gradient norm itself; regression: on the norm's logarithm, which
    measured worse."""
    gate: Literal["always", "never", "auto"] = "always"
    """When masks follow the proposal: always; never (it is trained and measured only); auto: while it pays for its
    time."""
    mask_share: Share = 0.7
    """gate auto: share of the gradient's variance that is due to the masks, as `maskvr variance` measures it; the rest
    gains nothing from the proposal, and pays for its time too."""
    cost: Ratio | None = None
    """Time of the network relative to the rest of a step. gate auto: null: measured; the run is then not reproducible
    bit for bit, since the clock decides. strategy auto: null: measured once, before the first step."""
    learn_every: PositiveSteps = 1
    """Learn at every n-th step only: between them the network proposes masks, or, while masks do not follow it, costs
    nothing; metrics.jsonl has its figures for the steps at which it learns."""
    check_every: PositiveSteps = 100
    """Steps between comparisons of the network's parameters across ranks; the host waits for each."""


class AutoConfig(Section):
    """Strategy auto: how often the progress per second of the candidates is measured, and on how much
    (training/auto_strategy.py)."""

    every_steps: PositiveSteps = 1000
    """Steps between measurements; more where max_share requires it."""
    max_share: PositiveShare | None = 0.05
    """Largest share of the seconds of the steps that measurements may take in addition: they are as many steps apart
    as this requires, by the costs that were measured before the first step. null: no limit."""
    rows: Annotated[PositiveRows, Field(ge=FEWEST_ROWS)] = 32
    """Sequences per measurement, at least five: an estimate takes products of four, its interval one more."""
    max_rows: PositiveRows | None = None
    """Most sequences per measurement: there are more than `rows` as far as max_share allows every every_steps steps.
    null: 16 × rows."""
    draws: Annotated[PositiveCount, Field(ge=2, le=64)] = 4
    """Draws per sequence, of two masks each."""
    sketch_size: Annotated[PositiveRows, Field(ge=3, le=2**24)] = 4096
    """Numbers per layer to which gradients are compressed; the relative error of squared norms is √(2/size)."""
    confidence: OpenShare = 0.95
    """Level of the intervals that must lie above 1 to change the masks."""
    proposal: bool = True
    """Whether MAPNet (subsection mapnet) is a candidate. It is trained only while it may pay for its time."""
    proposal_saves: Share = 0.3
    """Largest share of the mask variance that a proposal is expected to remove: MAPNet is trained only if that would
    pay for its time."""
    final_share: Share = 0.1
    """With final_rate or late_layers: share of the schedule's steps, at its end, that are trained at final_rate and
    with [MASK] from the first layer in any case."""
    late_layers: tuple[PositiveCount, ...] = ()
    """Layers at which [MASK] may enter instead of at the first, as with masking.late_layer; needs mask_probability 1.
    In the last steps (final_share) it enters at the first, as in the exported model. Empty: masking.late_layer."""
    costs: PathSetting | None = None
    """File with the seconds of a step per candidate, from `maskvr benchmark strategy-cost --config` or another
    run's mask_costs.json on an equal machine; null: measured before the first step."""

    @property
    def most_rows(self) -> int:
        """max_rows, with its default."""
        return _MORE_ROWS * self.rows if self.max_rows is None else self.max_rows

    @model_validator(mode="after")
    def _at_least_rows(self) -> Self:
        if self.most_rows < self.rows:
            raise ValueError(f"max_rows {self.max_rows} is below rows {self.rows}; raise it, or set rows lower")
        return self


class MaskingConfig(Section):
    """Choice of the predicted tokens; formulas in masking/strategies.py.

    A subsection belongs to the strategy of its name (`mapnet` also to auto): set for another strategy, it is an error.
    """

    strategy: Literal["uniform", "whole_word", "span", "fully_explored", "frequency", "mapnet", "auto"] = "uniform"
    """auto: rate, and one of uniform, fully_explored and mapnet, by measured progress per second."""
    rate: OpenShare = 0.15
    """Fraction of the maskable positions to predict. auto: at the start; it may only fall."""
    final_rate: OpenShare | None = None
    """The rate changes to this value by the schedule's last step; null: constant. auto: the lowest rate, and that of
    the last steps (auto.final_share)."""
    rate_decay: Literal["linear", "cosine", "step"] = "linear"
    """With final_rate: linear; cosine: half a period; step: at half of the schedule's steps, at once."""
    mask_probability: Share = 0.8
    """Fraction of the predicted positions that show [MASK]."""
    random_probability: Share = 0.1
    """Fraction of the predicted positions that show a random token; the remaining ones are unchanged."""
    late_layer: Count = 0
    """Layer, counted from 0, at which [MASK] enters: the layers below it compute the other positions only (arXiv
    2211.04898); needs mask_probability 1. 0: at the first layer, as the other tokens do."""
    change_at_resume: bool = False
    """Resume from a checkpoint whose run had other masking settings, instead of refusing it."""
    span: SpanConfig = SpanConfig()
    """Strategy span: lengths of spans."""
    fully_explored: FullyExploredConfig = FullyExploredConfig()
    """Strategy fully_explored: placement of a row's segments."""
    frequency: FrequencyConfig = FrequencyConfig()
    """Strategy frequency: exponents, sampler, estimator."""
    mapnet: MapNetConfig = MapNetConfig()
    """Strategies mapnet and auto: the mask proposal network."""
    auto: AutoConfig = AutoConfig()
    """Strategy auto: measurements of progress per second."""

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if (total := self.mask_probability + self.random_probability) > 1:
            raise ValueError(f"mask_probability + random_probability is {total:g}, more than 1")
        return self

    @model_validator(mode="after")
    def _late_positions_are_masks(self) -> Self:
        candidates = self.auto.late_layers
        if self.late_layer and candidates:
            raise ValueError(
                f"late_layer {self.late_layer} is fixed, and of auto.late_layers {_listed(candidates)} one is to be "
                "chosen; set only one of the two"
            )
        if len(set(candidates)) < len(candidates):
            raise ValueError(f"auto.late_layers {_listed(candidates)}: a layer is named twice; name each once")
        if (self.late_layer or candidates) and self.mask_probability < 1:
            name = f"late_layer {self.late_layer}" if self.late_layer else f"auto.late_layers {_listed(candidates)}"
            raise ValueError(
                f"{name}: all predicted positions must be [MASK], which the layers below do not "
                f"see, and mask_probability is {self.mask_probability:g}; set mask_probability to 1 and "
                "random_probability to 0"
            )
        return self

    @model_validator(mode="after")
    def _decay_needs_final_rate(self) -> Self:
        if self.rate_decay != "linear" and self.final_rate is None:
            raise ValueError(f"rate_decay {self.rate_decay} belongs to final_rate, which is null; set final_rate")
        return self

    @model_validator(mode="after")
    def _rate_falls_under_auto(self) -> Self:
        if self.strategy != "auto" or self.final_rate is None:
            return self
        if self.final_rate > self.rate:
            raise ValueError(
                f"final_rate {self.final_rate:g} is above rate {self.rate:g}; under strategy auto the rate may only "
                "fall: exchange the two, or remove final_rate"
            )
        if self.rate_decay != "linear":
            raise ValueError(
                f"rate_decay {self.rate_decay}: strategy auto decides itself when the rate falls; remove rate_decay"
            )
        return self

    @model_validator(mode="after")
    def _subsections_belong(self) -> Self:
        for name in subsections() - set(SUBSECTIONS[self.strategy]):
            section = getattr(self, name)
            if section != type(section)():
                owners = [strategy for strategy, names in SUBSECTIONS.items() if name in names]
                given = ", ".join(section.model_dump(exclude_defaults=True))
                raise ValueError(
                    f"{name} ({given}) belongs to strategy {' or '.join(owners)}; strategy is {self.strategy}"
                )
        if self.strategy == "auto":
            fixed = self.mapnet.model_dump(include=set(_NOT_UNDER_AUTO), exclude_defaults=True)
            if fixed:
                name, value = next(iter(fixed.items()))
                raise ValueError(
                    f"mapnet.{name} {value} belongs to strategy mapnet; strategy auto decides itself when to use the "
                    "proposal, and draws by Pareto sampling"
                )
        return self

    @property
    def learns_proposal(self) -> bool:
        """Whether MAPNet is trained next to the model."""
        return self.strategy == "mapnet" or (self.strategy == "auto" and self.auto.proposal)

    @property
    def unread(self) -> list[str]:
        """Settings that others make ineffective, a line each. Not errors: runs that were started with them resume."""
        sections = {"auto": self.auto, "mapnet": self.mapnet}
        given = {f"{n}.{key}" for n, part in sections.items() for key in part.model_dump(exclude_defaults=True)}
        found = {}
        if self.auto.max_share is None:
            found["auto.max_share is null"] = {"auto.max_rows"}
        if self.final_rate is None and not self.auto.late_layers:
            found["neither final_rate nor auto.late_layers is set"] = {"auto.final_share"}
        if self.strategy == "auto":
            found["strategy is auto"] = {"mapnet.mask_share"}
            if not self.auto.proposal:
                found["auto.proposal is false"] = {
                    "auto.proposal_saves",
                    *(n for n in given if n.startswith("mapnet.")),
                }
        elif self.mapnet.gate != "auto":
            found[f"mapnet.gate is {self.mapnet.gate}"] = {"mapnet.cost", "mapnet.mask_share"}
        return [
            f"masking.{name}: not read ({reason})" for reason, names in found.items() for name in sorted(names & given)
        ]

    @property
    def weighted(self) -> WeightedSampling:
        """Sampler and estimator of the strategy; defaults for strategies without weights."""
        return self.frequency if self.strategy == "frequency" else self.mapnet

    def dump(self) -> dict[str, Any]:
        """The settings that apply, in JSON types: no subsections of other strategies."""
        return self.model_dump(mode="json", exclude=subsections() - set(SUBSECTIONS[self.strategy]))

    def identity(self) -> dict[str, Any]:
        """The settings that must not change within a phase."""
        values = self.dump()
        del values["change_at_resume"]
        if values.get("span", {}).get("lengths") == "geometric":
            del values["span"]["lengths"]  # checkpoints of earlier versions lack it
        if values.get("frequency", {}).get("scores", "") is None:
            del values["frequency"]["scores"]  # as above
        for name, before in _ADDED.items():
            if values[name] == before:
                del values[name]
        if (section := values.get("auto")) is not None:
            del section["costs"]  # stored in the checkpoint itself
            values["auto"] = {k: v for k, v in section.items() if v != _ADDED_TO_AUTO.get(k)}
        if not self.learns_proposal:
            values.pop("mapnet", None)
        else:
            values["mapnet"] = {
                key: value
                for key, value in values["mapnet"].items()
                if key not in MAPNET_MAY_CHANGE and _ADDED_TO_MAPNET.get(key, ...) != value
            }
        return values


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def subsections() -> set[str]:
    """Names of the subsections."""
    return {name for names in SUBSECTIONS.values() for name in names}


def without_foreign(masking: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """Raw settings of `masking` that still apply when the strategy changes to `strategy`: no subsections of other
    strategies, and of `mapnet` under auto nothing that auto decides."""
    foreign = subsections() - set(SUBSECTIONS.get(strategy, subsections()))
    values = {key: value for key, value in masking.items() if key not in foreign}
    if strategy == "auto" and isinstance(section := values.get("mapnet"), Mapping):
        values["mapnet"] = {key: value for key, value in section.items() if key not in _NOT_UNDER_AUTO}
    return values
