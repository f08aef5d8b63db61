"""Reading a run's YAML: recipes, files, `base`, and `--set` assignments. Loads no torch."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from maskvr_ds.config.base import ConfigError
from maskvr_ds.config.masking import without_foreign
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONFIG, JOBS, METRICS, OWNER
from maskvr_ds.run_folder.migration import SCHEMA, migrate_config


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("maskvr_ds.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML text of a recipe. Raises ConfigError if there is none of that name."""
    if name not in recipes():
        raise ConfigError(f"{name!r}: no such recipe; there are {', '.join(recipes())}")
    return (resources.files("maskvr_ds.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(config: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, or in the recipe of that name, laid over those that its `base` names.

    base: a recipe, a file (relative to the folder of the file that names it), or a list of them, each laid over the
    ones before: recipes compose as model, data, schedule. Sections are merged field by field, lists are replaced.
    above: the files that led here. Raises ConfigError if a base is missing or leads back to itself.
    """
    values = _read_mapping(config)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"config {config}: base is {bases!r}; the name of a recipe, a file, or a list of them expected"
        )
    above = (*above, str(config))
    merged: dict[str, Any] = {}
    for base in bases:
        relative = Path(config).parent / base
        name = str(relative) if relative.is_file() else base
        if name in above:
            raise ConfigError(f"config {config}: base {base} leads back to itself ({' -> '.join((*above, name))})")
        merged = _merged(merged, read_yaml(name, above))
    return _merged(merged, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections field by field; `above` takes precedence. A masking.strategy in `above` drops the subsections of other
    strategies from `below`."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            if key == "masking" and isinstance(value.get("strategy"), str):
                before = without_foreign(before, value["strategy"])
            value = _merged(before, value)
        merged[key] = value
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
    schema = values.pop("schema", 1 if _stored_by_run(path) else SCHEMA)
    if schema not in range(1, SCHEMA + 1):
        raise ConfigError(f"config {config}: schema {schema!r}, this version reads 1 to {SCHEMA}; update maskvr_ds")
    return values if schema == SCHEMA else migrate_config(values)


def _stored_by_run(path: Path) -> bool:
    """Whether a version that stored no schema may have written the file: slurm/config-*.yaml of a run, or config.yaml
    in its folder or in logs/LAUNCH/."""
    if path.parent.name == JOBS and path.name.startswith("config-"):
        return True
    markers = (METRICS, OWNER, CHECKPOINTS)
    folders = path.resolve().parents[:3]
    return path.name == CONFIG and any((folder / marker).exists() for folder in folders for marker in markers)


def assign(values: dict[str, Any], assignment: str) -> None:
    """Set `section.field=value` (the value in YAML) in the nested mapping. Entries of a list (phases) are addressed by
    `name` or index: phases.long.optimizer.lr=4e-3. Setting masking.strategy drops the subsections of other strategies
    that were set before. Raises ConfigError if the assignment is not possible."""
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
    if sections == ["masking"] and field == "strategy" and isinstance(place[field], str):
        values["masking"] = without_foreign(place, place[field])


def _entry(entries: list[Any], name: str, assignment: str) -> Any:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if name in names:
        return entries[names.index(name)]
    if name.isdigit() and int(name) < len(entries):
        return entries[int(name)]
    raise ConfigError(f"--set {assignment}: no {name!r} there; there are {', '.join(map(str, names))}")
