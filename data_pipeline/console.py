"""Parsers of subcommands with short errors; standard output whose reader goes away, as in `… | head`."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE
# A usage of more lines hides the error below it.
_USAGE_LINES = 6


class CommandParser(argparse.ArgumentParser):
    """Parser of a subcommand, whose errors name the subcommand and are not hidden below a usage of many lines."""

    # The types are those of argparse, which has overloads for them.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            words = any("=" not in word for word in getattr(found, "assignments", None) or ())
            hint = "; --set takes one word, SECTION.FIELD=VALUE" if words else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage()
        if usage.count("\n") <= _USAGE_LINES:
            super().error(message)
        self.exit(2, f"`{self.prog} --help` shows the options\n{self.prog}: error: {message}\n")


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
