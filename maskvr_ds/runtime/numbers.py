"""Numbers on command lines: finite and bounded, as argparse types. Loads no torch.

The bounds of settings in YAML are the types of `maskvr_ds/config/base.py`; `data_pipeline.numbers` has the types of
the pipeline, which runs without this package.
"""

import argparse
import math
from collections.abc import Callable

# Steps of a run, or rows of a corpus that a command reads.
MAX_STEPS = 10**9
# Tokens that a run reads.
MAX_TOKENS = 10**18
# Seeds are signed 64-bit integers where they are stored.
MAX_SEED = 2**63 - 1
# Ranks of one host.
MAX_SLOTS = 1024
# Nodes of one job.
MAX_NODES = 10_000
# Sequences per forward pass on one rank.
MAX_MICRO_SIZE = 2**20
# 30 days.
MAX_SECONDS = 30 * 86_400


def integer(low: int, high: int) -> Callable[[str], int]:
    """Argument type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        # The length first: int() refuses more than 4,300 digits with an error of its own.
        unsigned = text.removeprefix("-")
        if unsigned.isascii() and unsigned.isdecimal() and len(unsigned) <= 40 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{shortened(text)}: expected an integer from {low:,} to {high:,}")

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Argument type: a finite number from `low` (above: excluded) to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() else math.nan
        except ValueError:
            value = math.nan
        if low <= value <= high and not (above and value == low):
            return value
        bounds = f"above {low:,g} and at most {high:,g}" if above else f"from {low:,g} to {high:,g}"
        raise argparse.ArgumentTypeError(f"{shortened(text)}: expected a number {bounds}")

    return parse


def shortened(text: str) -> str:
    """`text` in quotes; only its start if it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}… ({len(text):,} characters)"
