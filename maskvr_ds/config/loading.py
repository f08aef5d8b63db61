"""Reading a run's YAML: recipes, files, `base`, and `--set` assignments. Loads no torch."""

from importlib import resources
from pathlib import Path
from typing import Any

from data_pipeline.yaml_values import MAX_CHARACTERS, YamlError, parse_yaml
from maskvr_ds.config.base import ConfigError, shown
from maskvr_ds.config.masking import without_foreign
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONFIG, JOBS, METRICS, OWNER
from maskvr_ds.run_folder.migration import SCHEMA, migrate_config, raise_keep_last

_RECIPES = "maskvr_ds.recipes"
_PARTS = "parts"
# Longest chain of `base`.
_MAX_CHAIN = 50


def recipes() -> list[str]:
    """Names of the recipes that come with the package: configurations that are complete but for the paths."""
    return _names()


def recipe_parts() -> list[str]:
    """Names of the parts of recipes: a model, a schedule or masks alone, to be combined in `base`."""
    return _names(_PARTS)


def recipe_text(name: str) -> str:
    """The YAML text of a recipe or of a part. Raises ConfigError if there is none of that name."""
    folder = resources.files(_RECIPES)
    if name in recipe_parts():
        folder = folder / _PARTS
    elif name not in recipes():
        raise ConfigError(
            f"{name!r}: no such recipe; there are {', '.join(recipes())}, and the parts {', '.join(recipe_parts())}"
        )
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def _names(*folder: str) -> list[str]:
    files = resources.files(_RECIPES).joinpath(*folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def read_yaml(config: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in the recipe of that name, merged over those that its `base` names.

    base: a recipe, a file (relative to the folder of the file that names it), or a list of them. They are merged from
    left to right, then the file itself; later values win. Sections are merged field by field, lists are replaced.
    Raises ConfigError if a base is missing, leads back to itself, or is included along two ways.
    """
    return _read_with_bases(str(config), (), {})


def _read_with_bases(name: str, chain: tuple[str, ...], included: dict[str, str]) -> dict[str, Any]:
    """chain: the files that led here, outermost first. included: what was read so far -> the file that named it."""
    if len(chain) > _MAX_CHAIN:
        raise ConfigError(f"config {chain[0]}: more than {_MAX_CHAIN} files, each the base of the previous one")
    values = _read_mapping(name)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"config {name}: base is {bases!r}; the name of a recipe, a file, or a list of them expected")
    chain = (*chain, name)
    merged: dict[str, Any] = {}
    for base in bases:
        relative = Path(name).parent / base
        path = str(relative) if relative.is_file() else base
        key = str(relative.resolve()) if relative.is_file() else base
        if key in {str(Path(above).resolve()) if Path(above).is_file() else above for above in chain}:
            raise ConfigError(f"config {name}: base {base} leads back to itself ({' -> '.join((*chain, path))})")
        if key in included:
            raise ConfigError(
                f"config {name}: base {base} is also included by {included[key]}; merged a second time it would undo "
                "what was merged over it. Include it once"
            )
        included[key] = name
        merged = _merged(merged, _read_with_bases(path, chain, included))
    return _merged(merged, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections field by field, `above` over `below`. A masking.strategy in `above` drops the subsections of other
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
        if (size := path.stat().st_size) > 4 * MAX_CHARACTERS:
            raise ConfigError(f"config {config}: {size:,} bytes; this is not a run's config")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {config}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    elif str(config) in (*recipes(), *recipe_parts()):
        text = recipe_text(str(config))
    else:
        raise ConfigError(f"config {str(config)!r}: neither a file nor a recipe ({', '.join(recipes())})")
    values = _parsed(text, f"config {config}")
    if not isinstance(values, dict):
        raise ConfigError(f"config {config}: a mapping of sections expected, found {type(values).__name__}")
    stored = _stored_by_run(path)
    if stored:
        values = raise_keep_last(values)
    schema = values.pop("schema", 1 if stored else SCHEMA)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ConfigError(f"config {config}: schema {schema!r}; this version reads 1 to {SCHEMA}, update maskvr_ds")
    return values if schema == SCHEMA else migrate_config(values)


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_yaml(text, where)
    except YamlError as error:
        raise ConfigError(str(error)) from None


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
    place[field] = _parsed(text, f"--set {shown(assignment)}: the value")
    if sections[-1:] == ["masking"] and field == "strategy" and isinstance(place[field], str):
        own = without_foreign(place, place[field])
        place.clear()
        place.update(own)


def _entry(entries: list[Any], name: str, assignment: str) -> Any:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if name in names:
        return entries[names.index(name)]
    if name.isdigit() and int(name) < len(entries):
        return entries[int(name)]
    raise ConfigError(f"--set {assignment}: no {name!r} there; there are {', '.join(map(str, names))}")
