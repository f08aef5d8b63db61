"""Records without text or that cannot be read: rules that skip and count them; tables and their cells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.__main__ import main
from data_pipeline.build import build, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.reports.scan import verify
from data_pipeline.shards import read_manifest
from data_pipeline.sources.documents import read_documents
from data_pipeline.sources.inputs import Piece, find_sources
from data_pipeline.sources.reading import Limits, Reading
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import describe_in, make_documents, run_command, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab", extra=["ä", "##ä"]), folder / "tok")
    return folder / "tok"


GOOD = json.dumps({"text": "the of and to"})
RECORDS: dict[str, tuple[str, str, str]] = {
    "null": ('{"text": null}', "no_text", "field 'text' must be a string, found NoneType"),
    "missing": ('{"body": "x"}', "no_text", "has no field 'text', only body"),
    "cut": ('{"text": "half a rec', "bad_records", "not JSON"),
    "number": ('{"text": 3}', "bad_records", "field 'text' must be a string, found int"),
    "array": ('["x"]', "bad_records", "must be a JSON object, found list"),
    "surrogate": (r'{"text": "\ud800"}', "bad_records", "is not Unicode text"),
    "deep": ("[" * 100_000, "bad_records", "not JSON"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_rules_of_records(case: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error names the option; with the rule, as option or in a description, the record is skipped and counted."""
    line, rule, message = RECORDS[case]
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n{line}\n", encoding="utf-8")
    base = ["build", "--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--sequence-length", "16", "--output"]
    option = f"--{rule.replace('_', '-')}"
    assert main([str(word) for word in [*base, tmp_path / "none"]]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"a\.jsonl:2: .*{re.escape(message)}", error)
    assert f"{option} skip, or {rule}: skip in a description" in error
    other = "--bad-records" if rule == "no_text" else "--no-text"
    assert main([str(word) for word in [*base, tmp_path / "other", other, "skip"]]) == 1
    capsys.readouterr()
    assert main([str(word) for word in [*base, tmp_path / "out", option, "skip"]]) == 0
    assert f"; dropped: 2 {rule}" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.documents, manifest.dropped) == (2, {rule: 2})
    verify(tmp_path / "out")
    about = describe_in(tmp_path, [{"name": "a", "inputs": ["a.jsonl"]}], documents={rule: "skip"})
    named = build(None, tokenizer, 16, tmp_path / "named", description=about, progress=False)
    assert (named.documents, named.dropped, named.mixture[0].dropped) == (2, {rule: 2}, {rule: 2})
    shard = "shard-00000.arrow"
    assert (tmp_path / "named" / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()
    with pytest.raises(CorpusError, match=rf"{rule} 'skip': is not for a description. Set {rule} in its section"):
        build(None, tokenizer, 16, tmp_path / "x", description=about, progress=False, **{rule: "skip"})


def test_rows_are_counted_with_those_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [None, None, "long text"]}), path)
    (source,) = find_sources([path])

    def read(reading: Reading) -> list[str]:
        return [text for text, _ in read_documents(source, Piece(0, 0, 1), "line", "text", lambda *_: None, reading)]

    with pytest.raises(CorpusError, match="row 2 of row group 0: a record of more than"):
        read(Reading(no_text="skip", limits=Limits(record=5)))
    pq.write_table(pa.table({"text": pa.array([None, b"\xff", b"good"], pa.binary()).view(pa.string())}), path)
    with pytest.raises(CorpusError, match=r"rows 0 to 2 of row group 0: 'text' is not UTF-8 .*index 1\)"):
        read(Reading(no_text="skip"))
    reading = Reading(no_text="skip", lenient=True)
    assert read(reading) == ["\udcff", "good"]
    assert reading.skipped == {"no_text": 1}


@pytest.mark.parametrize("kind", ["parquet", "dictionary", "dataset", "builder:csv", "builder:json"])
def test_null_texts_of_tables(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    column = pa.array(["the of", None, "and to", None])
    column = column.dictionary_encode() if kind == "dictionary" else column
    source: dict[str, Any] = {"name": "a", "inputs": ["in"], "format": kind}
    (tmp_path / "in").mkdir()
    if kind in ("parquet", "dictionary"):
        source["format"] = "auto"
        pq.write_table(pa.table({"text": column}), tmp_path / "in/a.parquet")
    elif kind == "dataset":
        with (
            (tmp_path / "in/a.arrow").open("wb") as file,
            pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as out,
        ):
            out.write_batch(pa.record_batch({"text": column}))
        (tmp_path / "in/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}', encoding="utf-8")
    elif kind == "builder:csv":
        (tmp_path / "in/a.csv").write_text("id,text\n1,the of\n2,\n3,and to\n4,\n", encoding="utf-8")
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in column.to_pylist())
        (tmp_path / "in/a.json").write_text(lines, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"(ow|ecord) 1 .*--no-text skip, or no_text: skip"):
        build(None, tokenizer, 16, tmp_path / "no", description=describe_in(tmp_path, [source]), progress=False)
    about = describe_in(tmp_path, [source], documents={"no_text": "skip"})
    manifest = build(None, tokenizer, 16, tmp_path / "out", description=about, progress=False)
    assert (manifest.documents, manifest.dropped) == (2, {"no_text": 2})


def test_every_record_skipped(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"every document was dropped \(no_text 3\)"):
        build([tmp_path / "a.jsonl"], tokenizer, 16, tmp_path / "out", no_text="skip", progress=False)
    with pytest.raises(CorpusError, match="no_text 'drop': must be one of error, skip"):
        build([tmp_path / "a.jsonl"], tokenizer, 16, tmp_path / "out", no_text="drop", progress=False)


def test_rules_of_records_are_recorded(tmp_path: Path, tokenizer: Path) -> None:
    """A build with other rules is refused on a finished folder; without rules, build.json is as before they existed."""
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n", encoding="utf-8")
    source = [tmp_path / "a.jsonl"]
    build(source, tokenizer, 16, tmp_path / "skip", no_text="skip", progress=False)
    with pytest.raises(CorpusError, match="other arguments: no_text was skip, is now None"):
        build(source, tokenizer, 16, tmp_path / "skip", progress=False)
    build(source, tokenizer, 16, tmp_path / "plain", progress=False)
    with pytest.raises(CorpusError, match="other arguments: no_text was None, is now skip"):
        build(source, tokenizer, 16, tmp_path / "plain", no_text="skip", progress=False)
    tokenize(source, tokenizer, tmp_path / "tokens", progress=False)
    for name in ("plain", "tokens"):
        record = (tmp_path / name / "build.json").read_text(encoding="utf-8")
        assert "no_text" not in record
        assert "bad_records" not in record


def test_tokenizer_skips_records(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in make_documents(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": null}', '{"te']), encoding="utf-8")
    words = ["tokenizer", "--input", tmp_path / "a.jsonl", "--vocab-size", 80, "--output", tmp_path / "tok"]
    assert run_command(*words).returncode == 1
    assert run_command(*words, "--no-text", "skip").returncode == 1
    assert run_command(*words, "--no-text", "skip", "--bad-records", "skip").returncode == 0


def test_column_that_a_table_has_twice(tmp_path: Path, tokenizer: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: has 2 columns 'text'\. Write the file again"):
        build([tmp_path / "a.parquet"], tokenizer, 16, tmp_path / "out", progress=False)


def test_csv_cells_are_text(tmp_path: Path, tokenizer: Path) -> None:
    """Cells that pandas would take for numbers, truth values and missing values."""
    cells = ["42", "NA", "null", "nan", "None", "True", "1.0", "007", "1e5", "-", "N/A"]
    lines = "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))
    (tmp_path / "a.csv").write_text(f"id,text\n{lines}", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(cells), encoding="utf-8")
    about = describe_in(tmp_path, [{"name": "a", "inputs": ["a.csv"], "format": "builder:csv"}])
    build(None, tokenizer, 16, tmp_path / "csv", description=about, progress=False)
    build([tmp_path / "b.txt"], tokenizer, 16, tmp_path / "text", documents="line", progress=False)
    shard = "shard-00000.arrow"
    assert (tmp_path / "csv" / shard).read_bytes() == (tmp_path / "text" / shard).read_bytes()
