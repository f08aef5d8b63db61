"""Base class of configuration sections, types of their fields, pydantic's errors in plain words. Loads no torch.

Every number is finite (`Section`) and bounded by its type: an infinite or huge value would be accepted here and end the
run later, or make each of its resumes fail. The bounds are far above everything in use.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WrapValidator,
)

from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_SECONDS, MAX_SEED, MAX_STEPS, MAX_TOKENS

# Longest value that an error message quotes.
_SHOWN = 200


class ConfigError(ValueError):
    """A fault in the configuration, described for its author."""


class Section(BaseModel):
    """Settings of one component. Unknown keys are errors; instances are immutable.

    A field is documented by the string below it, which becomes its description in the generated reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _no_truth_value(value: Any) -> Any:
    """pydantic reads True as 1, and YAML reads yes and on as True."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {str(value).lower()}, as YAML also reads yes, no, on and off")
    return value


def readable_path(value: Any) -> Any:
    """The value, if it can be a path. Raises ValueError otherwise."""
    if not isinstance(value, (str, Path)):
        raise ValueError(
            f"expected a path, found {shown(value)}, which YAML reads as {type(value).__name__}; put it in quotes "
            f"(--set 'FIELD=\"{shown(value)}\"')"
        )
    text = str(value)
    if not text.strip() or "\0" in text or "\n" in text:
        raise ValueError(f"{text!r} is not a path; name a file or folder (the current folder is .)")
    if text.startswith("~"):
        raise ValueError(f"{text}: ~ is not replaced by your home folder here; write the full path")
    return value


def _readable_path_or_mapping(value: Any) -> Any:
    return value if value is None or isinstance(value, Mapping) else readable_path(value)


def _zero_or_a_second(value: float) -> float:
    if 0 < value < 1:
        raise ValueError(f"{value:g} s is shorter than any step; give at least 1, or 0 for never")
    return value


def _or_auto(value: Any, handler: Callable[[Any], Any]) -> Any:
    return value if value == "auto" else handler(value)


def _whole_number(value: Any) -> Any:
    """1e9, and the text that YAML makes of it, as an integer."""
    try:
        number = float(value) if isinstance(value, (str, float)) else None
    except ValueError:
        return value
    return int(number) if number is not None and number.is_integer() else value


_Number = BeforeValidator(_no_truth_value)


def _all_or_some(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and 1 <= value <= 10_000):
        return value
    raise ValueError(f"expected true, false, or a number of layers from 1 to 10,000, found {shown(value)}")


AllOrSome = Annotated[bool | int, BeforeValidator(_all_or_some)]
PathSetting = Annotated[Path, BeforeValidator(readable_path)]
# A file, or what it says.
PathOrMapping = Annotated[Path | dict[str, Any] | None, BeforeValidator(_readable_path_or_mapping)]

# Integers
Seed = Annotated[int, _Number, Field(ge=0, le=MAX_SEED)]
PositiveSteps = Annotated[int, _Number, Field(ge=1, le=MAX_STEPS)]
Steps = Annotated[int, _Number, Field(ge=0, le=MAX_STEPS)]
PositiveRows = Annotated[int, _Number, Field(ge=1, le=MAX_STEPS)]
Tokens = Annotated[int, _Number, BeforeValidator(_whole_number), Field(ge=1, le=MAX_TOKENS)]
GlobalBatch = Annotated[int, _Number, Field(ge=1, le=2**26)]
# Or "auto", which a run replaces by a number before it reads it (training/micro_size.py).
MicroBatch = Annotated[
    int,
    _Number,
    Field(ge=1, le=MAX_MICRO_SIZE),
    WrapValidator(_or_auto),
    PlainSerializer(lambda value: value, return_type=int | str),
]
# Layers, heads, kept checkpoints, queued steps.
PositiveCount = Annotated[int, _Number, Field(ge=1, le=10_000)]
Count = Annotated[int, _Number, Field(ge=0, le=10_000)]
# Hidden sizes, positions.
Width = Annotated[int, _Number, Field(ge=1, le=2**20)]

# Numbers
Share = Annotated[float, _Number, Field(ge=0, le=1)]
PositiveShare = Annotated[float, _Number, Field(gt=0, le=1)]
OpenShare = Annotated[float, _Number, Field(gt=0, lt=1)]
Decay = Annotated[float, _Number, Field(ge=0, lt=1)]
LearningRate = Annotated[float, _Number, Field(gt=0, le=1e6)]
LearningRateOrZero = Annotated[float, _Number, Field(ge=0, le=1e6)]
Exponent = Annotated[float, _Number, Field(gt=0, le=100)]
SignedExponent = Annotated[float, _Number, Field(ge=-2, le=2)]
# ε of a division.
Epsilon = Annotated[float, _Number, Field(gt=0, le=1)]
# Passes over a corpus.
Epochs = Annotated[float, _Number, Field(gt=0, le=1e6)]
# A multiple of something measured.
Factor = Annotated[float, _Number, Field(gt=1, le=1e9)]
PositiveRatio = Annotated[float, _Number, Field(gt=0, le=1e9)]
Ratio = Annotated[float, _Number, Field(ge=0, le=1e9)]
Timeout = Annotated[float, _Number, Field(ge=0, le=MAX_SECONDS), AfterValidator(_zero_or_a_second)]


def shown(value: Any) -> str:
    """`repr`, or its start if it is long; of text without quotes."""
    try:
        text = value if isinstance(value, str) else str(value) if not isinstance(value, (list, dict)) else repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return f"an integer of {value.bit_length():,} bits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def faults_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What pydantic found wrong in validating `model`, one line per fault: location, rule, value."""
    return [_described(fault, model) for fault in error.errors(include_url=False)]


def _described(fault: Any, model: type[BaseModel]) -> str:
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        return f"{where}: unknown key; known keys are {', '.join(known)}{_meant(model, fault['loc'], known)}"
    if fault["type"] == "missing":
        return f"{where}: required, but not given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "string_type" and isinstance(fault["input"], (bool, int, float)):
        message += f"; YAML reads this as {type(fault['input']).__name__}, put it in quotes"
    given = "" if fault["type"] == "value_error" else f" (given: {_quoted(fault['input'])})"
    return f"{where}: {message}{given}" if where else message


def _quoted(value: Any) -> str:
    return repr(shown(value)) if isinstance(value, str) else shown(value)


def _meant(model: type[BaseModel], location: Sequence[str | int], known: Sequence[str]) -> str:
    """A key that is written similarly or, of a run, a section that has the key; empty if there is none."""
    name = str(location[-1])
    meant = difflib.get_close_matches(name, known, n=1)
    if not meant and len(location) == 1:
        fields = {section: field.annotation for section, field in model.model_fields.items()}
        meant = [
            f"{section}.{name}"
            for section, kind in fields.items()
            if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields
        ]
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def _known_keys(model: Any, location: Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):  # entry of a list, whose item type was found in the previous round
            continue
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
