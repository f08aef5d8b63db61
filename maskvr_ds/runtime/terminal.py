"""Words to a terminal that may hang up, a pipe whose reader may go, a file whose disk may be full: none of them ends a
run that is about to save. Loads no torch."""

import contextlib
import os
import sys
from collections.abc import Iterator

OUT, ERR = 1, 2


@contextlib.contextmanager
def _outlived(descriptor: int) -> Iterator[None]:
    """What is written to it in here goes nowhere where that fails, and all that comes later."""
    try:
        yield
    except OSError:
        # What Python's streams still hold would fail again when the interpreter ends, with a status of its own.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def say(text: str, descriptor: int = OUT, *, end: str = "\n") -> None:
    """A line to standard output, or standard error."""
    with _outlived(descriptor):
        print(text, end=end, file=sys.stdout if descriptor == OUT else sys.stderr, flush=True)


def alert(text: str) -> None:
    """A line to standard error, past Python's streams: a signal's handler may have interrupted a print, and a thread
    that waits for ever may hold their lock."""
    with _outlived(ERR):
        os.write(ERR, f"{text}\n".encode())
