"""Numbers on the command line: finite, as argparse types, their bounds are checked with the library's arguments; and
numbers in messages."""

import argparse
import math

MAX_LENGTH = 2**20
MAX_WORKERS = 4096
# Digits of 2^63.
_DIGITS = 19
_LARGEST = 1e15


def integer(text: str) -> int:
    """Argument type: an integer of at most 19 digits."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected an integer of at most {_DIGITS} digits")
    return int(text)


def number(text: str) -> float:
    """Argument type: a finite number of at most 10^15."""
    try:
        value = float(text) if text.isascii() else math.nan
    except ValueError:
        value = math.nan
    # "not <=" also refuses NaN.
    if not abs(value) <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected a finite number of at most {_LARGEST:g}")
    return value


def counted(number: int, noun: str) -> str:
    """A number with its noun in the right form: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
