"""Logging of a run: messages of rank 0 to standard output, warnings to standard error. Loads no torch.

Every module has a logger of its own (`logging.getLogger(__name__)`); programs call `configure` once. Libraries' loggers
are left alone. A message never raises: a closed terminal or a full disk must not end a run (runtime/terminal.py).
"""

import argparse
import contextlib
import logging
import sys

from maskvr_ds.runtime import terminal

ROOT = "maskvr_ds"


class TerminalHandler(logging.Handler):
    """Write records by `terminal.say`: warnings and errors to standard error, the rest to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        descriptor = terminal.ERR if record.levelno >= logging.WARNING else terminal.OUT
        _clear_bars()
        terminal.say(self.format(record), descriptor)


def _clear_bars() -> None:
    """Clear progress bars on the terminal, which their next update draws again: a message would continue their line."""
    # Without the class while another thread imports the module.
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    for bar in tuple(bars):
        with contextlib.suppress(OSError, ValueError):  # closed
            bar.clear()


class _Formatter(logging.Formatter):
    """The bare message; level and module are prepended if informative."""

    def __init__(self, *, modules: bool, rank: int) -> None:
        super().__init__()
        self._modules, self._rank = modules, rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return f"[rank {self._rank}] {record.name}: {text}" if self._modules else text


def configure(verbosity: int = 0, *, rank: int = 0) -> None:
    """Set up the loggers of this process.

    verbosity: -1 warnings only (--quiet); 0 messages of rank 0; 1 all messages of all ranks, with rank and module
    (--verbose).
    """
    logger = logging.getLogger(ROOT)
    handler = TerminalHandler()
    handler.setFormatter(_Formatter(modules=verbosity > 0, rank=rank))
    logger.handlers = [handler]
    logger.propagate = False
    if verbosity > 0:
        logger.setLevel(logging.DEBUG)
    elif rank == 0 and verbosity == 0:
        logger.setLevel(logging.INFO)
    else:
        logger.setLevel(logging.WARNING if rank == 0 else logging.ERROR)


def is_quiet() -> bool:
    """Whether progress bars and messages are switched off."""
    return not logging.getLogger(ROOT).isEnabledFor(logging.INFO)


def add_verbosity_options(parser: argparse.ArgumentParser) -> None:
    """--quiet and --verbose, as `arguments.verbosity`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quiet", action="store_const", const=-1, default=0, dest="verbosity", help="print warnings and errors only"
    )
    group.add_argument(
        "--verbose",
        action="store_const",
        const=1,
        dest="verbosity",
        help="print the messages of all ranks, with rank and module",
    )


def verbosity_words(verbosity: int) -> list[str]:
    """The options again, for a process that is started with the same verbosity."""
    return {-1: ["--quiet"], 0: [], 1: ["--verbose"]}[verbosity]
