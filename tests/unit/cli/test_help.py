"""Help of `maskvr`: every command has examples, and the examples are valid command lines."""

import argparse
import shlex

import pytest

from maskvr_ds.cli.main import command_parser


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in command_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def examples(epilog: str | None) -> list[list[str]]:
    """Words of the `maskvr` command lines in an epilog, without redirections."""
    lines = (epilog or "").replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition(" > ")[0])[1:] for line in lines if line.startswith("  maskvr ")]


@pytest.mark.parametrize("name", list(subcommands()))
def test_each_command_has_two_valid_examples(name: str) -> None:
    commands = examples(subcommands()[name].epilog)
    assert len(commands) >= 2
    for words in commands:
        assert words[0] == name
        assert callable(command_parser().parse_args(words).run)


def test_examples_of_the_program_are_valid() -> None:
    commands = examples(command_parser().epilog)
    assert commands
    for words in commands:
        assert words[0] in subcommands()
        command_parser().parse_args(words)
