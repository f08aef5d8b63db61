"""Command-line options: help, examples, and how much is printed."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from data_pipeline.__main__ import command_parser, main
from tests.support.documents import make_documents, write_text, write_tokenizer


def test_quiet_and_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "in/a.txt", make_documents(20))
    tokenizer = write_tokenizer(tmp_path / "tok")
    (tmp_path / "in/b.pdf").touch()
    expected = {
        "--quiet": r"",
        "--verbose": r"(skipped 1 files.*\n)(done: .*\n)+(warning: .*unknown.*\n)(done: .*\n)+",
        "--no-progress": r"(skipped 1 files.*\n)(warning: .*unknown.*\n)",
    }
    outputs = []
    for option, errors in expected.items():
        output = tmp_path / option
        words = ["--input", tmp_path / "in", "--tokenizer", tokenizer, "--sequence-length", 16, "--output", output]
        assert main(["build", *map(str, words), option]) == 0
        captured = capsys.readouterr()
        assert re.fullmatch(errors, captured.err), captured.err
        outputs.append(captured.out.replace(str(output), ""))
    assert len(set(outputs)) == 1


@pytest.mark.parametrize("name", ["tokenizer", "build", "tokenize", "pack", "verify", "stats", "inspect"])
def test_help_has_two_valid_examples(name: str) -> None:
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as out:
        command_parser().parse_args([name, "--help"])
    assert ended.value.code == 0
    examples = out.getvalue().partition("examples:\n")[2].replace("\\\n", " ")
    found = [shlex.split(line.partition("data_pipeline ")[2]) for line in examples.splitlines() if line.strip()]
    assert len(found) >= 2
    for words in found:
        assert command_parser().parse_args(words).command == name


@pytest.mark.parametrize(("option", "value"), [("--documents", "line"), ("--text-field", "body")])
@pytest.mark.parametrize("command", ["build", "tokenizer"])
def test_settings_of_inputs_are_refused_with_a_description(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, option: str, value: str
) -> None:
    write_text(tmp_path / "in/a.txt", make_documents(3))
    about = tmp_path / "about.yaml"
    about.write_text("sources: [{name: a, inputs: [in/]}]")
    others = ["--vocab-size", "60"]
    if command == "build":
        others = ["--sequence-length", "16", "--tokenizer", str(write_tokenizer(tmp_path / "tok"))]
    words = [command, "--description", str(about), *others, option, value, "--output", str(tmp_path / "out")]
    assert main(words) == 1
    name = option[2:].replace("-", "_")
    expected = f"error: {name} {value!r}: is not for a description. Set {name} of its sources\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()
