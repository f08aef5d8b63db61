"""Base class of configuration sections, and errors in words."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A fault in the configuration, in words for its author."""


class Section(BaseModel):
    """A component's settings: unknown keys are refused, values stay as they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def describe(fault: Any, model: type[BaseModel]) -> str:
    """One of pydantic's faults, found when validating `model`, in a line: where, which rule, the value."""
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; known here: {', '.join(_known_keys(model, fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: required, but not given"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f" (given: {fault['input']!r})"
    return f"{where}: {message}{given}" if where else message


def _known_keys(model: Any, location: Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):  # an entry of a list: its type is the list's argument, found already
            continue
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
