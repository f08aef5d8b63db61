"""Migration of what older versions have stored: config.yaml and checkpoint.json, by one table of renamed settings.

A user's own YAML is not migrated: an old key there is an error that names the new one (`renamed`). Loads no torch.

Schema 1: flat settings of strategies in `masking`, sections `mapnet` and `auto` next to it; checkpoint.json format 3.
Schema 2: one subsection of `masking` per strategy, which includes `mapnet` and `auto`; checkpoint.json format 4.
"""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

SCHEMA = 2
# Setting of `masking` in schema 1 -> strategy that it belonged to (None: frequency or mapnet), name in its subsection.
_OF_MASKING: dict[str, tuple[str | None, str]] = {
    "placement": ("fully_explored", "placement"),
    "segments_per_sequence": ("fully_explored", "segments_per_sequence"),
    "frequency_power": ("frequency", "power"),
    "document_frequency_power": ("frequency", "document_power"),
    "floor": ("frequency", "floor"),
    "span_probability": ("span", "geometric_p"),
    "span_maximum": ("span", "max_length"),
    "sampler": (None, "sampler"),
    "estimator": (None, "estimator"),
}
_WEIGHTED = ("frequency", "mapnet")
# Section that moved into `masking` -> strategies that used it.
_MOVED: dict[str, tuple[str, ...]] = {"mapnet": ("mapnet", "auto"), "auto": ("auto",)}
_OF_DIVERGENCE = {"skip_updates": "max_skipped"}


def renamed(values: Mapping[str, Any]) -> list[str]:
    """Keys of schema 1 in raw values of schema 2, each with its new name: "mapnet.lr is now masking.mapnet.lr"."""
    found: list[tuple[str, str]] = []
    for section in _MOVED:
        if section in values:
            content = values[section]
            keys = list(content) if isinstance(content, Mapping) else []
            found += [(f"{section}.{key}", f"masking.{section}.{key}") for key in keys] or [
                (section, f"masking.{section}")
            ]
    found += _renamed_in(values, "", "")
    phases = values.get("phases")
    for index, phase in enumerate(phases if isinstance(phases, list) else ()):
        if isinstance(phase, Mapping):
            strategy = _mapping(values.get("masking")).get("strategy", "")
            found += _renamed_in(phase, f"phases.{phase.get('name', index)}.", strategy)
    return [f"{old} is now {new}" for old, new in found]


def _renamed_in(values: Mapping[str, Any], where: str, strategy: str) -> list[tuple[str, str]]:
    masking, divergence = _mapping(values.get("masking")), _mapping(values.get("divergence"))
    strategy = masking.get("strategy", strategy)
    found = []
    weighted = (strategy,) if strategy in _WEIGHTED else _WEIGHTED
    for key in masking:
        if key in _OF_MASKING:
            owner, name = _OF_MASKING[key]
            new = [f"{where}masking.{section}.{name}" for section in ((owner,) if owner else weighted)]
            found.append((f"{where}masking.{key}", " or ".join(new)))
    found += [(f"divergence.{key}", f"divergence.{new}") for key, new in _OF_DIVERGENCE.items() if key in divergence]
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def migrate_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Raw values of a configuration in schema 1 -> schema 2. Keys that schema 2 has already are kept."""
    values = dict(values)
    moved = {section: values.pop(section) for section in _MOVED if section in values}
    masking = _mapping(values.get("masking"))
    if masking or moved:
        values["masking"] = _nest(masking, masking.get("strategy", "uniform"), moved)
    if isinstance(phases := values.get("phases"), list):
        values["phases"] = [_migrate_phase(p, masking, moved) if isinstance(p, Mapping) else p for p in phases]
    if isinstance(divergence := values.get("divergence"), Mapping):
        values["divergence"] = {_OF_DIVERGENCE.get(key, key): value for key, value in divergence.items()}
    return values


def _migrate_phase(phase: Mapping[str, Any], run: Mapping[str, Any], moved: Mapping[str, Any]) -> dict[str, Any]:
    """run: the run's flat settings of masking, which the phase inherits."""
    phase = dict(phase)
    if masking := _mapping(phase.get("masking")):
        before = run.get("strategy", "uniform")
        if (strategy := masking.get("strategy", before)) == before:
            moved = {}
        elif {strategy, before} == set(_WEIGHTED):
            # Both used these two settings; in schema 2 each has its own, which a phase does not inherit.
            masking = {**{key: run[key] for key in ("sampler", "estimator") if key in run}, **masking}
        phase["masking"] = _nest(masking, strategy, moved)
    return phase


def _nest(masking: Mapping[str, Any], strategy: str, moved: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings and `moved` sections as subsections, without those of other strategies, which had no effect."""
    nested = {key: value for key, value in masking.items() if key not in _OF_MASKING}
    for section, content in moved.items():
        if strategy in _MOVED[section]:
            nested[section] = dict(content)
    weighted = "frequency" if strategy == "frequency" else "mapnet"
    for key, value in masking.items():
        if key in _OF_MASKING:
            owner, name = _OF_MASKING[key]
            subsection = owner or weighted
            # Under auto the network draws by the defaults.
            if subsection == strategy or (subsection == "mapnet" and subsection in nested):
                nested.setdefault(subsection, {})[name] = value
    return nested


def raise_keep_last(values: Mapping[str, Any]) -> dict[str, Any]:
    """Raw values that a run has stored -> the same with checkpoint.keep_last 2 instead of 1, which is no longer
    accepted."""
    raised = _raised(values)
    if isinstance(phases := values.get("phases"), list):
        raised["phases"] = [_raised(phase) if isinstance(phase, Mapping) else phase for phase in phases]
    if raised != values:
        logger.warning("checkpoint.keep_last is 1 in the configuration that the run has stored; 2 is used, the minimum")
    return raised


def _raised(values: Mapping[str, Any]) -> dict[str, Any]:
    checkpoint = _mapping(values.get("checkpoint"))
    return {**values, **({"checkpoint": {**checkpoint, "keep_last": 2}} if checkpoint.get("keep_last") == 1 else {})}


def migrate_checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint.json of format 3 -> format 4."""
    content = dict(content)
    if "identity" in content:
        identity = dict(content["identity"])
        moved = {section: identity.pop(section) for section in _MOVED if section in identity}
        if "masking" in identity:
            identity["masking"] = _nest(identity["masking"], identity["masking"]["strategy"], moved)
        content["identity"] = identity
    if "settings" in content:
        content["settings"] = {
            f"masking.{key}" if key.startswith("mapnet.") else key: value for key, value in content["settings"].items()
        }
    return content
