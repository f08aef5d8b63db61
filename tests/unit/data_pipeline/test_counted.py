"""One of a thing is not "1 things" in what the commands print."""

import re
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.numbers import counted
from tests.support.documents import write_text, write_tokenizer


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12_345, "12,345 rows")])
def test_counted(number: int, text: str) -> None:
    assert counted(number, "row") == text


def test_a_corpus_of_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tok")
    write_text(tmp_path / "a.txt", ["the of and to in"])
    words = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer), "--sequence-length", "16"]
    assert main(["build", *words, "--output", str(tmp_path / "corpus")]) == 0
    assert main(["stats", str(tmp_path / "corpus")]) == 0
    assert main(["verify", str(tmp_path / "corpus")]) == 0
    split = ["--held-out", "0.5", "--output", str(tmp_path / "split")]
    write_text(tmp_path / "a.txt", ["the of and to in", "of the to"] * 4)
    assert main(["build", *words, *split]) == 0
    assert main(["verify", str(tmp_path / "split")]) == 0
    out = capsys.readouterr().out
    assert "OK, 1 shard and 1 shard of its held-out split checked" in out
    assert ": 1 document, " in out
    assert "1 row of 16, 1 shard, read 1 document of 5 tokens on average from 1 file, " in out
    assert "OK, 1 shard checked" in out
    assert not re.findall(r"\b1 [a-z]+s\b(?! in\b)", out), out
