"""Commands parse with the real parsers, configurations validate, blocks of other languages are known."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from data_pipeline.sources.description import read_description
from maskvr_ds.config import RunConfig, load_config, recipes
from maskvr_ds.config.strategy_spec import parse_strategies
from tests.docs import pages
from tests.docs.pages import ROOT, Block

# Argument parser of each `python -m NAME`; `maskvr` is maskvr_ds.cli.
MODULES = {
    "maskvr_ds.cli": "maskvr_ds.cli.main",
    "maskvr_ds.train": "maskvr_ds.train",
    "data_pipeline": "data_pipeline.__main__",
    "cluster": "cluster.__main__",
}
SHELL = ("bash", "console", "sh")


class Command(NamedTuple):
    module: str
    words: tuple[str, ...]
    where: str


@cache
def parser(module: str) -> argparse.ArgumentParser:
    return pages.generator().parser_of(importlib.import_module(MODULES[module]).main)


def shell_lines(block: Block) -> list[str]:
    """Commands of a block, continuation lines joined, redirections removed; of a session those behind `$`.

    The variable of a loop has its first value.
    """
    text = block.text.replace("\\\n", " ")
    for variable, value in re.findall(r"^\s*for (\w+) in (\S+)", text, re.MULTILINE):
        text = text.replace(f"${variable}", value)
    lines = re.sub(r"\s>\s*\S+", "", text).splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [part for line in lines for part in re.split(r"&&|;|\|", _without_comment(line)) if part.strip()]


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", line)


def commands_in(line: str, where: str) -> Iterator[Command]:
    words = shlex.split(line)
    for number, word in enumerate(words):
        if word == "maskvr":
            yield Command("maskvr_ds.cli", tuple(words[number + 1 :]), where)
            return
        if word in ("-m", "--module") and words[number + 1 : number + 2] and words[number + 1] in MODULES:
            yield Command(words[number + 1], tuple(words[number + 2 :]), where)
            return


COMMANDS = [
    command
    for block in pages.all_blocks(*SHELL)
    for line in shell_lines(block)
    for command in commands_in(line, str(block))
]


def parsed(command: Command) -> argparse.Namespace:
    errors = io.StringIO()
    status: int | str | None = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            return parser(command.module).parse_args(list(command.words))
        except SystemExit as exit_:
            status = exit_.code
    assert status == 0, f"{command.where}: {' '.join(command.words)}\n{errors.getvalue()}"
    return argparse.Namespace()  # of --help


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 50
    assert {command.module for command in COMMANDS} == set(MODULES)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.where}-{'-'.join(c.words[:1])}")
def test_a_command_parses(command: Command) -> None:
    arguments = parsed(command)
    # A recipe in place of the user's own file.
    if assignments := getattr(arguments, "assignments", []):
        config = arguments.config if arguments.config in recipes() else "bert_base_4k"
        load_config(config, assignments)
    if strategies := getattr(arguments, "strategies", None):
        for spec in parse_strategies(strategies):
            if not spec.strategy.startswith("oracle_"):
                # A batch that any number of segments up to 6 divides.
                values = (*getattr(arguments, "assignments", ()), *spec.assignments, "batch.global_size=3840")
                load_config("bert_base_4k", values)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_commands_in_the_text_have_these_options(page: Path) -> None:
    """Commands in running text may be incomplete: their subcommand and options exist."""
    for span in pages.spans(page):
        try:
            found = list(commands_in(span, pages.name(page)))
        except ValueError:  # a lone quote
            continue
        for command in found:
            known = parser(command.module)
            choices = pages.generator().subcommands(known)
            if choices and command.words and command.words[0][0].isalpha():
                assert command.words[0] in choices, span
                known = choices[command.words[0]]
            for word in command.words:
                if word.startswith("--"):
                    assert word.partition("=")[0] in known._option_string_actions, f"{span}: {word}"


def test_make_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [line for block in pages.all_blocks(*SHELL) for line in shell_lines(block)]
    lines += [span for page in pages.PAGES for span in pages.spans(page)]
    named = {word for line in lines if re.match(r"\s*make\s", line) for word in line.split()[1:] if "=" not in word}
    assert "demo" in named
    assert named <= targets


def test_scripts_exist() -> None:
    for block in pages.all_blocks(*SHELL):
        for script in re.findall(r"python (\S+\.py)", block.text):
            assert (ROOT / script).is_file(), f"{block}: {script}"


# YAML


def is_run(values: Any) -> bool:
    return isinstance(values, dict) and bool(values) and values.keys() <= {*RunConfig.model_fields, "base"}


YAML = [(block, yaml.safe_load(block.text)) for block in pages.all_blocks("yaml")]


def test_every_yaml_block_is_of_a_known_kind() -> None:
    assert [str(block) for block, values in YAML if not is_run(values) and "sources" not in values] == []


@pytest.mark.parametrize(
    ("block", "values"), [pytest.param(*pair, id=str(pair[0])) for pair in YAML if is_run(pair[1])]
)
def test_a_configuration_validates(block: Block, values: dict[str, Any], tmp_path: Path) -> None:
    """Fragments are completed with a recipe, or with a folder if they have phases."""
    if "phases" in values:
        values = {"output_dir": "runs/x", **values}
    elif "base" not in values and not {"output_dir", "data", "training"} <= values.keys():
        values = {"base": "bert_base_4k", **values}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("block", [block for block, values in YAML if "sources" in values], ids=str)
def test_a_description_validates(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(block.text, encoding="utf-8")
    assert read_description(path).sources


def test_languages() -> None:
    known = {"bash", "console", "yaml", "python", "mermaid", "text", ""}
    assert {block.language for block in pages.all_blocks()} <= known


# The generated reference


def test_every_setting_is_in_the_reference() -> None:
    text = pages.expanded(pages.DOCS / "reference" / "configuration.md")
    for name in RunConfig.model_fields:
        assert f"`{name}`" in text or f"## {name}" in text, name
    assert "<!-- generated" not in text


def test_every_command_is_in_the_reference() -> None:
    text = pages.expanded(pages.DOCS / "reference" / "cli.md")
    for command in ("maskvr train", "data_pipeline build", "cluster slurm"):
        assert f"### {command}" in text
