"""Words to a terminal that may hang up, or a pipe whose reader may go: neither ends a run that is about to save. Loads
no torch."""

import contextlib
import errno
import os
from collections.abc import Iterator

OUT, ERR = 1, 2


@contextlib.contextmanager
def outlived(descriptor: int) -> Iterator[None]:
    """What is written to it in here goes nowhere where nobody can read it any more, and all that comes later."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        # What Python's streams still hold would fail again when the interpreter ends, with a status of its own.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def say(text: str) -> None:
    """A line to standard output."""
    with outlived(OUT):
        print(text, flush=True)


def alert(text: str) -> None:
    """A line to standard error, past Python's streams: a signal's handler may have interrupted a print, and a thread
    that waits for ever may hold their lock."""
    with outlived(ERR):
        os.write(ERR, f"{text}\n".encode())
