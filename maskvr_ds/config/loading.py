"""A run's YAML: recipes and files → mappings, `--set` assignments, and faults in words. Loads no torch."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from maskvr_ds.config.base import ConfigError


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("maskvr_ds.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe. Raises ConfigError where there is none of that name."""
    if name not in recipes():
        raise ConfigError(f"{name!r}: no such recipe; there are {', '.join(recipes())}")
    return (resources.files("maskvr_ds.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(config: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, or in the recipe of that name, laid over its `base` where it names one.

    base: a recipe or a file (from the folder of the file that names it); its sections are merged field by field,
    lists are replaced. above: the files that led here. Raises ConfigError where there is none, or a base leads back.
    """
    values = _read_mapping(config)
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"config {config}: base is {base!r}; the name of a recipe or a file expected")
    beside = Path(config).parent / base
    named = str(beside) if beside.is_file() else base
    above = (*above, str(config))
    if named in above:
        raise ConfigError(f"config {config}: base {base} leads back to itself ({' -> '.join((*above, named))})")
    return _merged(read_yaml(named, above), values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections field by field; `above` has its way."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _read_mapping(config: str | Path) -> dict[str, Any]:
    path = Path(config)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {config}: not UTF-8 text: {error.reason} at byte {error.start}") from None
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


def assign(values: dict[str, Any], assignment: str) -> None:
    """Put `section.field=value` (the value in YAML) into the nested mapping. An entry of a list (a phase) goes by its
    `name` or its number: phases.long.optimizer.lr=4e-3. Raises ConfigError where that is not possible."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {assignment}: section.field=value expected")
    *sections, field = key.strip().split(".")
    place: Any = values
    for section in sections:
        place = _entry(place, section, assignment) if isinstance(place, list) else place.setdefault(section, {})
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"--set {assignment}: {section} is a value, not a section")
    if isinstance(place, list):
        raise ConfigError(f"--set {assignment}: {sections[-1]} is a list; name the field of one entry")
    try:
        place[field] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not YAML: {error}") from None


def _entry(entries: list[Any], name: str, assignment: str) -> Any:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if name in names:
        return entries[names.index(name)]
    if name.isdigit() and int(name) < len(entries):
        return entries[int(name)]
    raise ConfigError(f"--set {assignment}: no {name!r} there; there are {', '.join(map(str, names))}")
