"""Task: a function whose result is kept in a file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Report = Callable[[int, int], object]


@dataclass(frozen=True)
class Task:
    """`function(*arguments, report)` returns a JSON value; `size` is its share of the progress bar, in
    bytes."""

    name: str
    what: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int = 0
