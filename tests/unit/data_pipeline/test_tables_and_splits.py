"""CSV, TSV, JSON and Markdown inputs; what was taken; hold-out by file; tokenizers from a description."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.build import build
from data_pipeline.execution.tasks import Task
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError
from data_pipeline.shards import HELD_OUT, read_manifest
from data_pipeline.sources.documents import read_documents
from data_pipeline.sources.inputs import Piece, find_sources
from data_pipeline.sources.reading import Limits, Reading
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from tests.support.documents import corpus_documents, describe_in, make_documents, tree, write_text, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder / "tok"


def read(path: Path, field: str = "text", reading: Reading | None = None) -> list[str]:
    (source,) = find_sources([path])
    texts = list(read_documents(source, Piece(0, 0, source.bytes), "file", field, lambda *_: None, reading))
    assert all(end for _, end in texts)
    return [text for text, _ in texts]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def words(*items: Any) -> list[str]:
    return [str(item) for item in items]


# Cells as csv may have to quote them: separators, quotes, line ends.
CELLS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=20), max_size=8)


@given(CELLS, st.sampled_from(["\n", "\r\n"]))
def test_csv_is_read_as_python_writes_it(tmp_path_factory: pytest.TempPathFactory, cells: list[str], end: str) -> None:
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(["id", "body"])
        writer.writerows(enumerate(cells))
    found = read(path, "body", Reading(no_text="skip"))
    assert found == [cell.strip() for cell in cells if cell.strip()]


def test_a_tsv_has_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tn\nsay "hi\t1\nNA\t2\n"x" y\t3\n', encoding="utf-8")
    assert read(tmp_path / "a.tsv") == ['say "hi', "NA", '"x" y']


@given(CELLS.map(lambda cells: [cell.replace("\n", "\r").replace("\t", "\0") for cell in cells]))
def test_a_line_of_tsv_is_a_row(tmp_path_factory: pytest.TempPathFactory, cells: list[str]) -> None:
    """Also one with a carriage return within a cell."""
    path = tmp_path_factory.getbasetemp() / "cells.tsv"
    path.write_text("".join(f"{line}\n" for line in ["body\tn", *(f"{cell}\t1" for cell in cells)]), encoding="utf-8")
    found = read(path, "body", Reading(no_text="skip"))
    assert found == [cell.strip() for cell in cells if cell.strip()]


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)), st.booleans())
def test_json_arrays(tmp_path_factory: pytest.TempPathFactory, texts: list[str], plain: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(texts if plain else [{"text": text} for text in texts], indent=1), encoding="utf-8")
    assert read(path) == [text.strip() for text in texts if text.strip()]


def test_a_json_object_and_markdown(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one", "n": 1}', encoding="utf-8")
    (tmp_path / "a.md").write_text("# Title\n\nText\n", encoding="utf-8")
    assert read(tmp_path / "a.json") == ["one"]
    assert read(tmp_path / "a.md") == ["# Title\n\nText"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "rename the file to .jsonl"),
        ("a.json", '[{"text": "a"},', "not JSON"),
        ("a.json", '[{"text": "a"}, {"body": "b"}]', "record 2: has no field 'text', only body. Set --text-field"),
        ("a.json", "[1]", "record 1: must be a JSON object, found int"),
        ("a.json", r'["\ud800"]', "is not Unicode text"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.csv", "id,body\n1,x\n", "has no column 'text'; its first line has 'id', 'body'. Set --text-field"),
        ("a.csv", "text,text\n1,x\n", "more than once"),
        ("a.csv", "text,n\nx\n", "a.csv:2: has 1 cells, the header 2"),
        ("a.csv", "text,n\nx,1\n,2\n", "a.csv:3: cell 'text' is empty"),
        ("a.csv", 'text\n"a\n', "not a table"),
        ("a.csv", 'text\n"a" b\n', "a.csv:2: not a table"),
        ("a.csv", "text\n" + "x" * 2000, "a record of more than"),
        ("a.tsv", "text\n" + "x" * 2000 + "\n", "a.tsv:2: a record of more than"),
        ("a.json", json.dumps(["x" * 2000]), "use JSON lines"),
    ],
)
def test_faults_of_tables_and_json(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    limits = Limits(record=1000 if "x" * 2000 in content else 256_000_000)
    with pytest.raises(CorpusError) as caught:
        read(tmp_path / name, reading=Reading(limits=limits))
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_records_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nx,1\n,2\ny\nz,4\n", encoding="utf-8")
    (tmp_path / "a.json").write_text('["x", {"body": 1}, 3, {"text": "y"}]', encoding="utf-8")
    for name in ("a.csv", "a.json"):
        reading = Reading(no_text="skip", bad_records="skip")
        assert len(read(tmp_path / name, reading=reading)) == 2
        assert reading.skipped == {"no_text": 1, "bad_records": 1}


def test_the_same_corpus_from_every_kind(tmp_path: Path, tokenizer: Path) -> None:
    """Named or by glob; compressed; with a format in a description. A folder with them is as before."""
    documents = make_documents(40)
    build([write_jsonl(tmp_path / "a.jsonl", documents)], tokenizer, 32, tmp_path / "jsonl", progress=False)
    expected = corpus_documents(tmp_path / "jsonl")
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(documents), encoding="utf-8")
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["text"], *([text] for text in documents)])
    (folder / "a.csv").write_bytes(buffer.getvalue().encode())
    (folder / "plain").write_bytes(buffer.getvalue().encode())
    for number, path in enumerate([folder / "a.json", folder / "*.csv"]):
        build([path], tokenizer, 32, tmp_path / f"out{number}", progress=False, workers=2, work_size=0.001)
        assert corpus_documents(tmp_path / f"out{number}") == expected
    about = describe_in(tmp_path, [{"name": "a", "inputs": ["others/plain"], "format": "csv"}])
    build(None, tokenizer, 32, tmp_path / "out", description=about, progress=False)
    assert corpus_documents(tmp_path / "out") == expected
    with pytest.raises(CorpusError) as caught:
        build([folder], tokenizer, 32, tmp_path / "none", progress=False)
    assert "the corpus is empty: no file of a supported type" in str(caught.value)
    assert f"Files .json (1): name them, or use a glob: '{folder}/**/*.json'" in str(caught.value)
    assert "Files without suffix (1): rename them, or set their format" in str(caught.value)


def test_hold_out_by_file(tmp_path: Path, tokenizer: Path) -> None:
    """Complete files, at least one, whatever the order, the units and the workers; nothing is lost."""
    documents = {name: make_documents(15, seed) for seed, name in enumerate("abcdefgh")}
    for name, texts in documents.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    options: dict[str, Any] = {"held_out_by": "file", "progress": False}
    whole = build([tmp_path / "in"], tokenizer, 32, tmp_path / "whole", progress=False)
    for share, files in ((0.001, 1), (0.25, 2), (0.5, 4)):
        out = tmp_path / f"out{files}"
        build([tmp_path / "in"], tokenizer, 32, out, held_out=share, **options)
        assert read_manifest(out / HELD_OUT).documents == 15 * files
        assert read_manifest(out).documents == whole.documents - 15 * files
        assert sorted(corpus_documents(out) + corpus_documents(out / HELD_OUT)) == sorted(
            corpus_documents(tmp_path / "whole")
        )
        held = corpus_documents(out / HELD_OUT)
        alone = []
        for name in documents:
            build([tmp_path / "in" / f"{name}.txt"], tokenizer, 32, tmp_path / name, progress=False)
            alone.append(corpus_documents(tmp_path / name))
        assert sum(all(document in held for document in file) for file in alone) == files
    again: dict[str, Any] = {"work_size": 0.0005, "workers": 2}
    build([tmp_path / "in"], tokenizer, 32, tmp_path / "again", held_out=0.25, **options, **again)
    before, now = tree(tmp_path / "out2"), tree(tmp_path / "again")
    assert {n: b for n, b in now.items() if n != "build.json"} == {n: b for n, b in before.items() if n != "build.json"}
    with pytest.raises(CorpusError, match="held_out_by was file, is now document"):
        build([tmp_path / "in"], tokenizer, 32, tmp_path / "out2", held_out=0.25, progress=False)
    with pytest.raises(CorpusError, match="1 files leave none to train on"):
        build([tmp_path / "in" / "a.txt"], tokenizer, 32, tmp_path / "one", held_out=0.25, **options)
    with pytest.raises(CorpusError, match="held out by 'line'"):
        build([tmp_path / "in"], tokenizer, 32, tmp_path / "x", held_out=0.25, held_out_by="line", progress=False)


def test_tasks_do_not_carry_the_names_of_all_held_out_files(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        write_text(tmp_path / f"in/{i}.txt", make_documents(1, i))
    sizes = []

    def run(pool: Pool, tasks: Sequence[Task], *others: Any) -> Any:
        sizes.extend(len(task.arguments[0].held_out_files) for task in tasks if task.name.startswith("unit-"))
        return original(pool, tasks, *others)

    original = Pool.run
    monkeypatch.setattr(Pool, "run", run)
    options: dict[str, Any] = {"held_out": 0.5, "held_out_by": "file", "work_size": 1e-6, "progress": False}
    build([tmp_path / "in"], tokenizer, 32, tmp_path / "out", **options)
    assert len(sizes) == 10
    assert sum(sizes) == 5


@pytest.mark.parametrize(("count", "remedy"), [(60, "Use --held-out 0.09"), (12, "too few documents")])
def test_the_remedy_for_an_empty_held_out_split_works(
    tmp_path: Path, tokenizer: Path, count: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_documents(count))
    base = words("build", "--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--sequence-length", 16)
    out = ["--output", str(tmp_path / "out")]
    assert main([*base, *out, "--held-out", "0.00001"]) == 1
    error = capsys.readouterr().err
    assert f"the held-out split gets none of {count} documents. " in error
    assert remedy in error
    if "Use" in remedy:
        assert main([*base, *out, "--held-out", remedy.split()[-1]]) == 0


def paragraphs(folder: Path, files: int, documents: int, length: int) -> Path:
    folder.mkdir()
    for number in range(files):
        text = "\n\n".join(" ".join(["the", "of"] * (length // 2)) + " a" * i for i in range(documents))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((2, 30, 40), (), "--documents file"),
        ((2, 30, 40), ("--held-out", "0.2"), "--held-out-by file holds out complete files"),
        ((2, 30, 40), ("--held-out", "0.5", "--held-out-by", "file"), "--documents file"),
        ((2, 30, 40), ("--documents", "line"), None),
        ((2, 5, 40), (), None),
        ((2, 30, 300), (), None),
    ],
)
def test_paragraphs_are_warned_of(
    tmp_path: Path,
    tokenizer: Path,
    shape: tuple[int, int, int],
    options: tuple[str, ...],
    said: str | None,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.WARNING)
    folder = paragraphs(tmp_path / "texts", *shape)
    base = words(
        "build", "--input", folder, "--tokenizer", tokenizer, "--sequence-length", 16, "--output", tmp_path / "o"
    )
    assert main([*base, *options]) == 0
    found = [message for message in caplog.messages if "split at blank lines" in message]
    assert len(found) == (said is not None)
    if said:
        assert said in found[0]
        assert f"{shape[0]} text files were split at blank lines into {shape[0] * shape[1]} documents" in found[0]
        assert ("--held-out-by" in found[0]) == (options[:2] == ("--held-out", "0.2"))
    out = capsys.readouterr().out
    assert re.search(rf"read {shape[0] * shape[1]} documents of \d+ tokens on average from {shape[0]} files", out)


def test_a_tokenizer_from_a_description(tmp_path: Path) -> None:
    """The vocabulary of the same text from --input; rules of documents apply."""
    documents = make_documents(60)
    write_jsonl(tmp_path / "all.jsonl", documents)
    (tmp_path / "a.csv").write_text("body\n" + "\n".join(f'"{text}"' for text in documents[:30]), encoding="utf-8")
    (tmp_path / "b").write_text("\n".join(json.dumps({"text": text}) for text in documents[30:]), encoding="utf-8")
    sources = [
        {"name": "one", "inputs": ["a.csv"], "text_field": "body", "weight": 3},
        {"name": "two", "inputs": ["b"], "format": "jsonl"},
    ]
    about = describe_in(tmp_path, sources)
    train_tokenizer([tmp_path / "all.jsonl"], 90, tmp_path / "expected", progress=False)
    base = words("tokenizer", "--vocab-size", 90, "--no-progress")
    assert main([*base, "--description", str(about), "--output", str(tmp_path / "found")]) == 0
    assert tree(tmp_path / "found") == tree(tmp_path / "expected")
    (tmp_path / "a.csv").write_text("body\n" + "zebra" * 3, encoding="utf-8")
    (tmp_path / "b").write_text(json.dumps({"text": "the of and " * 30}), encoding="utf-8")
    ruled = describe_in(tmp_path, sources, documents={"min_characters": 100})
    train_args = words("tokenizer", "--vocab-size", 21, "--description", ruled, "--output", tmp_path / "r")
    main(train_args)
    text = (tmp_path / "r" / "vocab.txt").read_text(encoding="utf-8") if (tmp_path / "r").exists() else ""
    assert "z" not in text
    with pytest.raises(SystemExit):
        main([*base, "--description", str(about), "--input", "x", "--output", str(tmp_path / "both")])
