"""Words for a terminal that may hang up at any time: what the ranks do must not depend on who listens."""

import contextlib
import os
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Write and flush. Once nobody listens (a terminal that hung up, a pipe whose reader ended), what is said is lost:
    it stands in the launch's logs."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        # What the stream still holds would fail again when Python ends, and change its exit status.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say_at_once(text: str) -> None:
    """For handlers of signals, which may have interrupted a `say`: on standard error, past its buffer."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
