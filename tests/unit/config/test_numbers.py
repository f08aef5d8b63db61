"""Every number of a configuration is finite and bounded, every path is text: by type, found by walking the fields."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from maskvr_ds.config import ConfigError, RunConfig, load_config

MINIMAL = {"output_dir": "runs/x", "data": {"path": "corpus"}, "training": {"steps": 100}}
Location = tuple[str | int, ...]
BAD_NUMBERS = (math.inf, -math.inf, math.nan, 10**21, -(10**21), 10**400, ".inf", "nan", True, [1])


def leaves(annotation: Any, where: Location) -> Iterator[tuple[Location, type]]:
    """Location and type of every field within a type; entries of tuples by index, if they are numbers."""
    if get_origin(annotation) is Annotated:
        yield from leaves(get_args(annotation)[0], where)
    elif get_origin(annotation) is tuple:
        items = [item for item in get_args(annotation) if item is not Ellipsis]
        for index, item in enumerate(items):
            yield from leaves(item, (*where, index))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from leaves(field.annotation, (*where, name))
    elif get_args(annotation) and get_origin(annotation) is not dict:
        for option in get_args(annotation):
            yield from leaves(option, where)
    elif annotation in (int, float) or (isinstance(annotation, type) and issubclass(annotation, Path)):
        yield where, annotation


def raw(where: Location, value: Any) -> dict[str, Any]:
    """MINIMAL with one value set."""
    values: Any = {key: dict(v) if isinstance(v, dict) else v for key, v in MINIMAL.items()}
    place = values
    for index, part in enumerate(where[:-1]):
        following = where[index + 1]
        if isinstance(part, int):
            place.extend([{"path": "corpus"} if isinstance(following, str) else 0.5] * (part + 1 - len(place)))
            if isinstance(following, str):
                place[part] = dict(place[part])
        place = (
            place[part] if isinstance(part, int) else place.setdefault(part, [] if isinstance(following, int) else {})
        )
    if isinstance(last := where[-1], int):
        place.extend([0.5] * (last + 1 - len(place)))
    place[last] = value
    return values


# Numbers in whose place true and false stand too.
TRUTH_TOO = {("model", "activation_checkpointing")}
LEAVES = list(dict.fromkeys(leaves(RunConfig, ())))
NUMBERS = [where for where, kind in LEAVES if kind in (int, float)]
PATHS = [where for where, kind in LEAVES if kind not in (int, float)]


def locations_of_faults(values: dict[str, Any]) -> list[Location]:
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        return [fault["loc"] for fault in error.errors()]
    return []


def test_all_fields_are_found() -> None:
    names = {".".join(map(str, where)) for where, _ in LEAVES}
    assert len(NUMBERS) > 50
    assert {"seed", "optimizer.betas.1", "data.mixture.0.weight", "divergence.margin", "hangs.timeout"} <= names
    paths = {".".join(map(str, where)) for where in PATHS}
    of_model = {"model.config", "model.initialize_from"}
    of_data = {"data.path", "data.mixture.0.path", "data.held_out_path"}
    assert paths == {"output_dir", "masking.auto.costs", "masking.frequency.scores", *of_data, *of_model}


@pytest.mark.parametrize("where", NUMBERS, ids=lambda where: ".".join(map(str, where)))
def test_a_number_is_finite_and_bounded(where: Location) -> None:
    for value in BAD_NUMBERS:
        if value is True and where in TRUTH_TOO:
            continue
        assert where in locations_of_faults(raw(where, value)), f"{value!r} is accepted"


@given(st.sampled_from(NUMBERS), st.floats() | st.integers())
def test_what_is_accepted_is_finite_and_small(where: Location, value: float) -> None:
    if where not in locations_of_faults(raw(where, value)):
        assert math.isfinite(value)
        assert abs(value) <= 2**63


@pytest.mark.parametrize("where", PATHS, ids=lambda where: ".".join(map(str, where)))
@pytest.mark.parametrize("value", [20240601, 1.5, True, "", "  ", "a\0b", "a\nb", "~/runs/x", ["a"]])
def test_a_path_is_text(where: Location, value: Any) -> None:
    assert where in locations_of_faults(raw(where, value))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "output_dir=20240601",
            r"output_dir: expected a path, found 20240601, which YAML reads as int; put it in quotes",
        ),
        ("output_dir=2024-06-01", "found 2024-06-01, which YAML reads as date; put it in quotes"),
        ("output_dir=~/runs/x", "~ is not replaced by your home folder here; write the full path"),
        ("output_dir=''", "output_dir: '' is not a path"),
        ("monitor.wandb.project=2024", "YAML reads this as int, put it in quotes"),
        (
            "divergence.margin=1000000000000000000000",
            r"margin: Input should be less than or equal to 10000 .given: 10{21}.",
        ),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number .given: inf."),
        ("optimizer.lr=yes", "optimizer.lr: expected a number, found true"),
        ("hangs.timeout=1e-9", "hangs.timeout: 1e-09 s is shorter than any step; give at least 1, or 0 for never"),
        ("seed=0x" + "f" * 5000, "seed: .*an integer of 20,000 bits"),
        ("seed=" + "9" * 5000, "--set seed=9+…: the value: not YAML: .*digits"),
        ("optimizer.lr=" + "x" * 5000, "optimizer.lr: .*x…"),
    ],
    ids=lambda text: text[:30],
)
def test_what_the_error_says(tmp_path: Path, assignment: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [assignment])
    assert len(str(caught.value)) < 1000


def test_steps_of_a_phase_are_bounded() -> None:
    phases = [{"name": "a", "data": {"path": "c"}, "training": {"steps": 10**21}}]
    with pytest.raises(
        ValidationError, match=r"phases\.a\.training\.steps: an integer from 1 to 1,000,000,000 required"
    ):
        RunConfig.model_validate({"output_dir": "x", "phases": phases})
    phases[0]["training"]["steps"] = 5  # type: ignore[index]
    phases[0]["divergence"] = {"margin": 1}
    with pytest.raises(ValidationError, match="divergence"):
        RunConfig.model_validate({"output_dir": "x", "phases": phases})
