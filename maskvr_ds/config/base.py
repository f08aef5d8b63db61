"""Base class of configuration sections, and pydantic's errors in plain words. Loads no torch."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A fault in the configuration, described for its author."""


class Section(BaseModel):
    """Settings of one component. Unknown keys are errors; instances are immutable.

    A field is documented by the string below it, which becomes its description in the generated reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def describe(fault: Any, model: type[BaseModel]) -> str:
    """One fault found by pydantic in validating `model`, as a line: location, rule, value."""
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; known keys are {', '.join(_known_keys(model, fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: required, but not given"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f" (given: {fault['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _known_keys(model: Any, location: Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):  # entry of a list, whose item type was found in the previous round
            continue
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
