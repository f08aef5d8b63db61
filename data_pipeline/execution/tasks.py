"""Tasks: functions whose results are stored in files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Report = Callable[[int, int], object]
"""Progress callback, called with (bytes read, tokens produced) since the last call."""


@dataclass(frozen=True)
class Task:
    """A call `function(*arguments, report)` that returns a JSON value.

    what: description for error messages; size: share of the progress bar, in bytes.
    """

    name: str
    what: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int = 0
