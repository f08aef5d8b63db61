"""Section `phases`: the phases of a run, each with sections merged over those of the run. Loads no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from maskvr_ds.config.base import Section, shown
from maskvr_ds.config.masking import without_foreign
from maskvr_ds.runtime.numbers import MAX_STEPS


class PhaseStart(Section):
    """State carried over from the previous phase. No field has a default, because published recipes differ here."""

    moments: Literal["keep", "zero"]
    """First and second moments of the gradients."""
    step_counter: Literal["keep", "zero"]
    """The optimizer's step t, used for bias correction."""
    schedule: Literal["restart", "continue"]
    """continue: the schedule of the previous phase continues; its length is that of both phases together."""


class Phase(Section):
    """One phase: sections with the fields that differ from those of the run.

    Every phase sets data.path (or data.mixture) and training.steps (or training.epochs, or training.tokens).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
    """Unique name, shown in metrics.jsonl and used by `--set phases.NAME.section.field=value`."""
    start: PhaseStart | None = None
    """Required in all phases except the first."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fields of `data`."""
    masking: dict[str, Any] = Field(default_factory=dict)
    """Fields of `masking`. A new strategy drops the run's subsections of other strategies."""
    batch: dict[str, Any] = Field(default_factory=dict)
    """Fields of `batch`."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Fields of `optimizer`: only lr."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Fields of `schedule`."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of `training`."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Fields of `evaluation`."""
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    """Fields of `checkpoint`."""

    @property
    def continues_schedule(self) -> bool:
        return self.start is not None and self.start.schedule == "continue"


Phases = tuple[Phase, ...]
# Fields of `data` that every phase sets for itself.
OF_PHASES = ("path", "mixture", "held_out_path")
SECTIONS = tuple(name for name in Phase.model_fields if name not in ("name", "start"))
# Fields of `training` that the run sets for all phases.
_OF_RUN = ("compile",)
# Section -> field set by a phase -> fields that the phase then does not inherit, as they would not fit the new value.
# A new masking.strategy also drops the subsections of other strategies.
_REPLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "masking": {"rate": ("final_rate",)},
    "masking.fully_explored": {"placement": ("segments_per_sequence",)},
    "schedule": {
        "warmup_steps": ("warmup_share",),
        "warmup_share": ("warmup_steps",),
        "decay": ("power", "decay_from", "decay_rate", "decay_steps", "cooldown_steps", "cooldown_share"),
        "cooldown_steps": ("cooldown_share",),
        "cooldown_share": ("cooldown_steps",),
    },
}


def take_from_phases(values: Any) -> Any:
    """Fill in required fields of a run's raw values from its phases: the first phase's corpora and the sum of all
    training.steps, if all are known. Raises ValueError if a phase lacks them, or the run sets them too."""
    phases = values.get("phases") if isinstance(values, Mapping) else None
    if not phases or not isinstance(phases, list) or not all(isinstance(phase, Mapping) for phase in phases):
        return values
    for where, sections in (("", values), *((f"phases.{p.get('name', i)}.", p) for i, p in enumerate(phases))):
        for name in ("data", "training"):
            if not isinstance(section := sections.get(name) or {}, Mapping):
                raise ValueError(f"{where}{name}: a mapping of fields expected (given: {section!r})")
    data, training = values.get("data") or {}, values.get("training") or {}
    for section, given, keys in (("data", data, OF_PHASES), ("training", training, set(training) - set(_OF_RUN))):
        if found := next((key for key in keys if given.get(key) not in (None, [])), None):
            where = f"phases.NAME.{section}.{found}"
            raise ValueError(
                f"{section}.{found}: set by each phase; set {where}, and remove it here (if a base or recipe sets it: "
                f"write `{section}: {{{found}: null}}`)"
            )
    steps: int | None = 0
    for number, phase in enumerate(phases):
        where = f"phases.{phase.get('name', number)}"
        if not any((phase.get("data") or {}).get(key) for key in ("path", "mixture")):
            raise ValueError(f"{where}.data.path: required, but not given: each phase names its corpus")
        length = phase.get("training") or {}
        own = length.get("steps")
        if own is None and any(length.get(key) is not None for key in ("epochs", "tokens")):
            steps = None  # known once the corpora are (training/length.py)
            continue
        if type(own) is not int or not 1 <= own <= MAX_STEPS:
            raise ValueError(
                f"{where}.training.steps: an integer from 1 to {MAX_STEPS:,} required (given: {shown(own)})"
            )
        steps = None if steps is None else steps + own
    corpora = {key: phases[0]["data"][key] for key in ("path", "mixture") if key in phases[0]["data"]}
    return {**values, "data": {**data, **corpora}, "training": {**training, "steps": steps}}


def check_phases(phases: Phases) -> None:
    """Raise ValueError naming the phase that does not fit the others."""
    names = [phase.name for phase in phases]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"phases: two are named {twice!r}; names must be unique")
    for index, phase in enumerate(phases):
        where = f"phases.{phase.name}"
        if phase.start is None and index:
            raise ValueError(
                f"{where}.start: required, to state what is carried over from phase {names[index - 1]!r}: "
                "moments and step_counter, keep or zero; schedule, restart or continue"
            )
        if phase.start is not None and not index:
            raise ValueError(f"{where}.start: the first phase has no predecessor; remove the section")
        if fixed := next((key for key in phase.optimizer if key != "lr"), None):
            raise ValueError(f"{where}.optimizer.{fixed}: only lr may differ between phases; set it for the run")
        if fixed := next((key for key in _OF_RUN if key in phase.training), None):
            raise ValueError(f"{where}.training.{fixed}: may not differ between phases; set it for the run")
        if phase.continues_schedule:
            own = [name for name in ("schedule", "optimizer") if getattr(phase, name)]
            own += ["training.schedule_steps"] if "schedule_steps" in phase.training else []
            if own:
                raise ValueError(f"{where}.{own[0]}: its schedule continues; remove it, or set start.schedule restart")


def schedule_span(phases: Phases, index: int) -> tuple[int, int]:
    """Phases [first, end) that share one schedule with phase `index`; (0, 1) for a run without phases."""
    first, end = index, index + 1
    while phases and phases[first].continues_schedule:
        first -= 1
    while end < len(phases) and phases[end].continues_schedule:
        end += 1
    return first, end


def _switched_off(schedule: Mapping[str, Any]) -> set[str]:
    """Fields that a phase does not inherit, since its own schedule has no warm-up, or no end, that they belong to."""
    warmup = [schedule[name] for name in ("warmup_steps", "warmup_share") if name in schedule]
    found = {"warmup_power", "initial_lr"} if warmup and not any(warmup) else set[str]()
    return found | ({"final_lr"} if schedule.get("decay") == "constant" else set())


def _overlay(section: str, inherited: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` merged over `inherited` field by field, including subsections."""
    dropped = {name for key in given for name in _REPLACES.get(section, {}).get(key, ())}
    if section == "schedule":
        dropped |= _switched_off(given)
    values = {key: value for key, value in inherited.items() if key not in dropped}
    for key, value in given.items():
        before = values.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _overlay(f"{section}.{key}", before, value)
        values[key] = value
    return values


def resolve(run: dict[str, Any], phases: Phases, index: int) -> dict[str, Any]:
    """Sections of one phase merged over those of the run, dumped -> raw values of a run without phases."""
    first, end = schedule_span(phases, index)
    # The run's corpora and steps were filled in from the phases.
    training = {key: run["training"][key] for key in _OF_RUN}
    values = {**run, "training": training, "data": {k: v for k, v in run["data"].items() if k not in OF_PHASES}}
    for section in SECTIONS:
        # A continued schedule, and its peak learning rate, are those of the phase that started it.
        given = getattr(phases[first if section in ("schedule", "optimizer") else index], section)
        inherited = values[section]
        if section == "masking" and "strategy" in given:
            inherited = without_foreign(inherited, given["strategy"])
        values[section] = _overlay(section, inherited, given)
    if end - first > 1 and all(phase.training.get("steps") is not None for phase in phases[first:end]):
        joint = sum(phase.training["steps"] for phase in phases[first:end])
        asked = phases[first].training.get("schedule_steps") or joint
        if asked < joint:
            raise ValueError(
                f"phases.{phases[first].name}.training.schedule_steps {asked}: this phase and those that continue its "
                f"schedule take {joint} steps"
            )
        values["training"]["schedule_steps"] = asked
    return values
