"""Numbers on the command lines of maskvr, data_pipeline and cluster are finite and bounded: every option is tried."""

import argparse
import importlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.analysis.gradient_variance.options import add_variance_options
from maskvr_ds.runtime.numbers import integer, number
from tests.docs import pages

PROGRAMS = ("maskvr_ds.cli.main", "data_pipeline.__main__", "cluster.__main__")
BAD = ("inf", "-inf", "nan", "1" + "0" * 21, "-1" + "0" * 21, "9" * 5000, "1e400", "yes", "", "٣", "0x10")


def options() -> Iterator[tuple[str, argparse.Action]]:
    generator = pages.generator()
    for module in PROGRAMS:
        parser = generator.parser_of(importlib.import_module(module).main)
        for name, command in generator.subcommands(parser).items():
            for action in command._actions:
                if action.type is not None and action.option_strings:  # not a name of what to run
                    yield f"{module.partition('.')[0]} {name} {action.option_strings[0]}", action


OPTIONS = dict(options())


def test_options_are_found() -> None:
    assert len(OPTIONS) > 40
    assert {"maskvr train --num-gpus"} <= {name.replace("maskvr_ds", "maskvr") for name in OPTIONS}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_number_is_finite_and_bounded(name: str) -> None:
    kind = OPTIONS[name].type
    assert kind not in (int, float), "accepts 10^400, inf or nan"
    for text in BAD:
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            kind(f"source={text}" if name.endswith("--weight") else text)
        assert len(str(caught.value)) < 200


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.integers(-(10**7), 10**7))
def test_an_integer_within_its_bounds(low: int, high: int, value: int) -> None:
    if low <= value <= high:
        assert integer(low, high)(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="expected an integer from"):
            integer(low, high)(str(value))


@given(st.floats(), st.booleans())
def test_a_number_within_its_bounds(value: float, above: bool) -> None:
    if 0 <= value <= 10 and not (above and value == 0):
        assert number(0, 10, above=above)(repr(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
            number(0, 10, above=above)(repr(value))


def test_options_of_the_ranks() -> None:
    """`maskvr variance` passes its values on: the parser of the ranks has the same types."""
    parser = argparse.ArgumentParser()
    add_variance_options(parser)
    assert not [action.dest for action in parser._actions if action.type in (int, float)]
