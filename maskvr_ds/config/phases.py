"""Phases of a run, as its configuration declares them: their own sections over the run's. Loads no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from maskvr_ds.config.base import Section
from maskvr_ds.config.masking import without_foreign


class PhaseStart(Section):
    """What a phase takes over from the one before. No field has a default: published recipes differ here."""

    # First and second moments of the gradients.
    moments: Literal["keep", "zero"]
    # The optimizer's t, which corrects the moments' bias.
    step_counter: Literal["keep", "zero"]
    # continue: the schedule of the phase before goes on, its length that of both phases together.
    schedule: Literal["restart", "continue"]


class Phase(Section):
    """A part of a run: what it has other than the run, as sections with some of their fields.

    Every phase has its data.path (or data.mixture) and training.steps; of `optimizer` only lr may differ.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
    # Required in every phase but the first.
    start: PhaseStart | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    masking: dict[str, Any] = Field(default_factory=dict)
    batch: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    checkpoint: dict[str, Any] = Field(default_factory=dict)

    @property
    def continues_schedule(self) -> bool:
        return self.start is not None and self.start.schedule == "continue"


Phases = tuple[Phase, ...]
# Fields of `data` that each phase has for itself.
OF_PHASES = ("path", "mixture", "held_out_path")
SECTIONS = tuple(name for name in Phase.model_fields if name not in ("name", "start"))
# Section -> field set by a phase -> fields that the phase then does not inherit, as they would not fit the new value.
# A new masking.strategy also drops the subsections of other strategies.
_REPLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "masking": {"rate": ("final_rate",)},
    "masking.fully_explored": {"placement": ("segments_per_sequence",)},
    "schedule": {
        "warmup_steps": ("warmup_share",),
        "warmup_share": ("warmup_steps",),
        "decay": ("power", "decay_from", "decay_rate", "decay_steps"),
    },
}


def take_from_phases(values: Any) -> Any:
    """A run's raw values, with what its required sections lack filled in: the first phase's corpora, the sum of all
    training.steps. Raises ValueError where a phase lacks its own, or the run's sections say it too."""
    phases = values.get("phases") if isinstance(values, Mapping) else None
    if not phases or not isinstance(phases, list) or not all(isinstance(phase, Mapping) for phase in phases):
        return values
    for where, sections in (("", values), *((f"phases.{p.get('name', i)}.", p) for i, p in enumerate(phases))):
        for name in ("data", "training"):
            if not isinstance(section := sections.get(name) or {}, Mapping):
                raise ValueError(f"{where}{name}: a mapping of fields expected (given: {section!r})")
    data, training = values.get("data") or {}, values.get("training") or {}
    for section, given, keys in (("data", data, OF_PHASES), ("training", training, tuple(training))):
        if found := next((key for key in keys if key in given), None):
            where = f"phases.NAME.{section}.{found}"
            raise ValueError(f"{section}.{found}: with phases each has its own; remove it here and set {where}")
    steps = 0
    for number, phase in enumerate(phases):
        where = f"phases.{phase.get('name', number)}"
        if not any((phase.get("data") or {}).get(key) for key in ("path", "mixture")):
            raise ValueError(f"{where}.data.path: required, but not given: each phase names its corpus")
        own = (phase.get("training") or {}).get("steps")
        if type(own) is not int or own < 1:
            raise ValueError(f"{where}.training.steps: a positive integer required (given: {own!r})")
        steps += own
    corpora = {key: phases[0]["data"][key] for key in ("path", "mixture") if key in phases[0]["data"]}
    return {**values, "data": {**data, **corpora}, "training": {"steps": steps}}


def check_phases(phases: Phases) -> None:
    """Raise ValueError naming the phase that is at odds with the others."""
    names = [phase.name for phase in phases]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"phases: two are named {twice!r}; a name stands for one phase")
    for index, phase in enumerate(phases):
        where = f"phases.{phase.name}"
        if phase.start is None and index:
            raise ValueError(
                f"{where}.start: required: say what it takes over from phase {names[index - 1]!r}: "
                "moments and step_counter, keep or zero; schedule, restart or continue"
            )
        if phase.start is not None and not index:
            raise ValueError(f"{where}.start: the first phase has none before it; remove the section")
        if fixed := next((key for key in phase.optimizer if key != "lr"), None):
            raise ValueError(f"{where}.optimizer.{fixed}: only lr may differ between phases; set it for the whole run")
        if phase.continues_schedule:
            own = [name for name in ("schedule", "optimizer") if getattr(phase, name)]
            own += ["training.schedule_steps"] if "schedule_steps" in phase.training else []
            if own:
                raise ValueError(f"{where}.{own[0]}: its schedule continues; remove it, or set start.schedule restart")


def schedule_span(phases: Phases, index: int) -> tuple[int, int]:
    """Phases [first, end) that share one schedule with phase `index`."""
    first, end = index, index + 1
    while phases[first].continues_schedule:
        first -= 1
    while end < len(phases) and phases[end].continues_schedule:
        end += 1
    return first, end


def _overlay(section: str, inherited: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `inherited`, field by field, subsections too."""
    dropped = {name for key in given for name in _REPLACES.get(section, {}).get(key, ())}
    values = {key: value for key, value in inherited.items() if key not in dropped}
    for key, value in given.items():
        before = values.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _overlay(f"{section}.{key}", before, value)
        values[key] = value
    return values


def resolve(run: dict[str, Any], phases: Phases, index: int) -> dict[str, Any]:
    """Sections of the run, dumped, with those of one phase laid over them: the raw values of a run without phases."""
    first, end = schedule_span(phases, index)
    # The run's own corpora and steps were taken from the phases.
    values = {**run, "training": {}, "data": {k: v for k, v in run["data"].items() if k not in OF_PHASES}}
    for section in SECTIONS:
        # A schedule that continues is that of the phase where it began, with its peak.
        given = getattr(phases[first if section in ("schedule", "optimizer") else index], section)
        inherited = values[section]
        if section == "masking" and "strategy" in given:
            inherited = without_foreign(inherited, given["strategy"])
        values[section] = _overlay(section, inherited, given)
    if end - first > 1:
        joint = sum(phase.training["steps"] for phase in phases[first:end])
        asked = phases[first].training.get("schedule_steps") or joint
        if asked < joint:
            raise ValueError(
                f"phases.{phases[first].name}.training.schedule_steps {asked}: this phase and those that continue its "
                f"schedule take {joint} steps"
            )
        values["training"]["schedule_steps"] = asked
    return values
