"""Standard output whose reader goes away, as in `… | head`."""

import os
import select
import signal
import sys
from collections.abc import Callable

EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE


def run_into_pipe(run: Callable[[], int | None]) -> int:
    """Run a command; returns its exit status, None being 0.

    If the reader of standard output has gone, the command ends without a message and with 141, as one killed by SIGPIPE
    does. Python ignores that signal, and for good reason: other pipes, to workers for one, must raise BrokenPipeError.
    """
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is still buffered must not fail again when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    return status or 0


def _reader_is_gone() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # replaced by something without a descriptor, or closed
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))
