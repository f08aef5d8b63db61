"""Help of `maskvr` and `python -m cluster`: every command has two examples, and they are valid command lines."""

import argparse
import contextlib
import io
import shlex

import pytest

from cluster.__main__ import command_parser as cluster_parser
from maskvr_ds.cli.main import command_parser, main


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


def shown_help(parser: argparse.ArgumentParser, words: list[str]) -> str:
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as out:
        parser.parse_args([*words, "--help"])
    assert ended.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("name", list(subcommands()))
def test_help_shows_the_examples(name: str) -> None:
    shown = shown_help(command_parser(), [name])
    assert shown.partition("examples:\n")[2].count(f"  maskvr {name}") >= 2


@pytest.mark.parametrize("name", ["hostfile", "launch", "slurm", "preflight", "status"])
def test_each_cluster_command_has_two_valid_examples(name: str) -> None:
    shown = shown_help(cluster_parser(), [name]).partition("examples:\n")[2].replace("\\\n", " ")
    lines = [line for line in shown.splitlines() if "python -m cluster" in line]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line.partition("python -m cluster ")[2].partition(" > ")[0].replace("'    #", " #"), True)
        assert words[0] == name
        assert callable(cluster_parser().parse_args(words).run)


def test_the_cluster_commands_are_all() -> None:
    (action,) = (a for a in cluster_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(action.choices) == {"hostfile", "launch", "slurm", "preflight", "status"}


def test_former_names_of_benchmarks_are_accepted() -> None:
    parse = command_parser().parse_args
    assert parse(["benchmark", "lamb"]).what == "optimizer-step-time"
    assert parse(["benchmark", "training-speed"]).what == "training-speed"
    assert "optimizer-step-time" in shown_help(command_parser(), ["benchmark"])
    with pytest.raises(SystemExit):
        parse(["benchmark", "lambs"])


def test_examples_of_the_program_are_valid() -> None:
    commands = examples(command_parser().epilog)
    assert commands
    for words in commands:
        assert words[0] in subcommands()
        command_parser().parse_args(words)


@pytest.mark.parametrize("command", ["train", "config"])
def test_ranks_are_given_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_parser().parse_args([command, "--config", "demo_cpu", "--num-gpus", "2", "--hostfile", "hosts"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["config", "--config", "a", "--set", "seed", "3"],
            "unrecognized arguments: 3; --set takes one word, SECTION.",
        ),
        (["config", "--config", "a", "--set", "seed=3", "4"], "unrecognized arguments: 4\n"),
        (["evaluate", "a", "--data", "b", "--tasks", "sst3"], "argument --tasks: invalid choice: 'sst3'"),
    ],
)
def test_errors_of_usage_name_the_command_and_are_short(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command_parser().parse_args(words)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert f"maskvr {words[0]}: error: {error}" in shown
    assert len(shown.splitlines()) <= 4


def test_the_list_of_recipes_says_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    (large,) = [line for line in lines if line.startswith("model_bert_large ")]
    assert large.endswith("BERT-large of Devlin et al. 2018 (arXiv 1810.04805): 24 layers, hidden size 1024, 16 heads")
    assert all(len(line.split()) > 2 for line in lines if line and not line.startswith("parts of"))


def test_a_corpus_is_data_for_every_command_that_measures_a_model() -> None:
    words = ["variance", "--checkpoint", "a", "--output", "b"]
    for option in ("--corpus", "--data"):
        assert command_parser().parse_args([*words, option, "c"]).corpus == "c"
