"""Printing that never raises: broken pipes, closed terminals and full disks are ignored. Loads no torch.

None of them may end a run that is about to save.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

OUT, ERR = 1, 2
_END_OF_LINE = "\n"


@contextlib.contextmanager
def _outlived(descriptor: int) -> Iterator[None]:
    """If writing to `descriptor` fails, discard this output and all later output to it."""
    try:
        yield
    except OSError:
        # Output still buffered by Python would fail again at exit, and change the exit status.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def say(text: str, descriptor: int = OUT, *, end: str = "\n") -> None:
    """Print a line to standard output or standard error."""
    with _outlived(descriptor):
        print(text, end=end, file=sys.stdout if descriptor == OUT else sys.stderr, flush=True)


def alert(text: str) -> None:
    """Print a line to standard error, bypassing Python's streams: a signal handler may have interrupted a print, and a
    thread that hangs may hold their lock. On a terminal it does not continue the line of a progress bar, or of ^C."""
    with _outlived(ERR):
        os.write(ERR, f"{_END_OF_LINE * os.isatty(ERR)}{text}\n".encode())
