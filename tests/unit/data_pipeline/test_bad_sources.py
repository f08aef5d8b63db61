"""Invalid sources in descriptions: one error with source, rule and remedy; no files left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from data_pipeline.__main__ import main
from data_pipeline.build import build, pack, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.shards import read_manifest
from data_pipeline.sources.description import read_description
from data_pipeline.sources.documents import read_documents
from data_pipeline.sources.inputs import Piece, find_sources
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import describe_in, make_documents, write_text, write_tokenizer

SIZES: dict[str, Any] = {"work_size": 0.003, "shard_size": 0.003, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder


def fault(folder: Path, path: Path, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        build(None, folder / "tok", 16, path.parent / "out", description=path, progress=False)
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"corpus\.yaml: sources\.0\.weight: Input should be greater than 0, found 0"),
        ({"weight": -2.5}, r"sources\.0\.weight: .* found -2\.5"),
        ({"colour": "red"}, r"sources\.0\.colour: unknown key; known here: name, inputs, format"),
        ({"format": "docx"}, r"sources\.0\.format: .*'docx' is not one of auto, text"),
        ({"format": "builder:no_such"}, "datasets has no builder 'no_such', only "),
        ({"name": "../x"}, r"sources\.0\.name: String should match pattern"),
        ({"inputs": []}, r"sources\.0\.inputs: Tuple should have at least 1 item"),
        ({"inputs": ["missing.txt"]}, r"missing\.txt: no such file or folder"),
        ({"split": "train"}, "split requires format dataset, found auto"),
        ({"format": "dataset", "inputs": ["."]}, r"state\.json: not a dataset saved by save_to_disk"),
        ({"format": "wikiextractor"}, "an article starts with 'text', not with <doc"),
        ({"documents": "page"}, r"sources\.0\.documents: Input should be"),
    ],
)
def test_bad_sources(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_text(tmp_path / "a.txt", ["text"])
    fault(folder, describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"], **change}]), message)


def test_bad_descriptions(folder: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ["text"])
    one = {"name": "a", "inputs": ["a.txt"]}
    fault(folder, describe_in(tmp_path, [one, one]), "source name 'a' is not unique")
    fault(folder, describe_in(tmp_path, [one, one | {"name": "b"}]), r"a\.txt: is in both sources a and b")
    fault(folder, describe_in(tmp_path, []), r"sources: Tuple should have at least 1 item")
    fault(
        folder, describe_in(tmp_path, [one], documents={"bad_bytes": "keep"}), r"documents\.bad_bytes: Input should be"
    )
    fault(
        folder,
        describe_in(tmp_path, [one], documents={"min_characters": 100}),
        r"every document was dropped \(too_short 1\)",
    )
    fault(
        folder,
        describe_in(tmp_path, [one], documents={"decontaminate": ["no.tsv"]}),
        r"no\.tsv: decontamination needs",
    )
    (tmp_path / "corpus.yaml").write_text("[")
    fault(folder, tmp_path / "corpus.yaml", r"corpus\.yaml: not YAML")
    (tmp_path / "corpus.yaml").write_text("- a")
    fault(folder, tmp_path / "corpus.yaml", r"corpus\.yaml: the key sources is required")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "documents: {duplicates: exact}\ndocuments: {shingle: 3}",
            r"yaml, line 3: key documents is given twice, first in line 2",
        ),
        (
            "documents: {shingle: 3, shingle: 3}",
            r"yaml, line 2: key shingle is given twice, first in line 2; remove one",
        ),
        ("documents: {shingle: 2020-13-45}", r"not YAML: month must be in 1\.\.12"),
    ],
)
def test_values_that_yaml_would_lose(text: str, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(f"sources: [{{name: a, inputs: [a.txt]}}]\n{text}\n")
    fault(folder, tmp_path / "corpus.yaml", message)


def test_aliases_and_merges_are_no_repeated_keys(tmp_path: Path) -> None:
    text = "sources:\n- &a {name: a, inputs: &in [a.txt], weight: 2}\n- {<<: *a, name: b}\n- {name: c, inputs: *in}\n"
    (tmp_path / "corpus.yaml").write_text(text)
    found = read_description(tmp_path / "corpus.yaml").sources
    assert [(source.name, source.weight) for source in found] == [("a", 2), ("b", 2), ("c", 1)]


def test_bad_datasets(folder: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "n": [1, 2, 3]})
    data.select([2, 0]).save_to_disk(tmp_path / "chosen")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "dict")
    data.save_to_disk(tmp_path / "good")

    def source(name: str, **others: str) -> Path:
        return describe_in(tmp_path, [{"name": "a", "inputs": [name], "format": "dataset", **others}])

    state = json.loads((tmp_path / "chosen/state.json").read_text())
    if state.get("_indices_files"):
        fault(folder, source("chosen"), "flatten_indices")
    fault(folder, source("dict"), r"has the splits test, train: choose one")
    fault(folder, source("dict", split="dev"), r"split 'dev' does not exist")
    fault(folder, source("good", split="train"), "has one dataset without splits")
    fault(folder, source("good", text_field="body"), "has no column 'body', only text, n")
    fault(folder, source("good", text_field="n"), "column 'n' has type int64, must be string")
    file = next((tmp_path / "good").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    fault(folder, source("good"), "corrupt Arrow file")
    state = json.loads((tmp_path / "dict/train/state.json").read_text())
    for name in ("../test/data-00000-of-00001.arrow", ".."):
        state["_data_files"] = [{"filename": name}]
        (tmp_path / "dict/train/state.json").write_text(json.dumps(state))
        fault(folder, source("dict", split="train"), "lists no data files in this folder")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    path = describe_in(tmp_path, [{"name": "a", "inputs": ["a.jsonl"], "format": "builder:json"}])
    fault(folder, path, r"a\.jsonl \(builder json\): ")


ARTICLE = b'<doc id="1" url="u" title="T">\nT\n\ntext\n</doc>\n'
FILES: dict[str, tuple[str, str, bytes, str]] = {
    "wiki empty": ("wiki_00", "wikiextractor", b"", "the corpus is empty: no text in .*wiki_00. Add text"),
    "wiki latin-1": (
        "wiki_00",
        "wikiextractor",
        ARTICLE.replace(b"text", b"t\xe4xt"),
        r"wiki_00: not UTF-8 at byte 35 \(0xe4",
    ),
    "wiki cut": (
        "wiki_00",
        "wikiextractor",
        ARTICLE * 2 + ARTICLE[:-9],
        "wiki_00: ends within an article, without its",
    ),
    "csv empty": ("a.csv", "builder:csv", b"", r"a\.csv \(builder csv\): cannot be read"),
    "csv header": ("a.csv", "builder:csv", b"id,text\n", "the corpus is empty: no text in .*a.csv"),
    "csv latin-1": ("a.csv", "builder:csv", b"text\nt\xe4xt\n", r"a\.csv \(builder csv\): cannot be read \(Unicode"),
    "csv column": ("a.csv", "builder:csv", b"id,body\n1,x\n", "record 0 has no text in 'text', only id, body"),
    "csv null": ("a.csv", "builder:csv", b"id,text\n1,x\n2,\n", "record 1 has no text in 'text', NoneType"),
    "json broken": ("a.json", "builder:json", b'{"text": "x"', r"a\.json \(builder json\): cannot be read"),
    "parquet": ("a.pq", "builder:parquet", b"PAR1 no parquet", r"a\.pq \(builder parquet\): cannot be read"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case: str, folder: Path, tmp_path: Path) -> None:
    name, kind, data, message = FILES[case]
    (tmp_path / name).write_bytes(data)
    fault(folder, describe_in(tmp_path, [{"name": "a", "inputs": [name], "format": kind}]), message)


def save_arrow(folder: Path, column: pa.Array) -> None:
    """A dataset folder as written by `save_to_disk`, with the given text column."""
    folder.mkdir()
    table = pa.table({"text": column})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda: pa.array([], pa.string()), "the corpus is empty: no text in .*data.arrow. Add text"),
        (lambda: pa.array(["x", None]), "row 1 of record batch 0 has no 'text' .null."),
        (lambda: pa.array([b"x", b"t\xe4xt"]).view(pa.string()), "rows 0 to 1 of record batch 0: 'text' is not UTF-8"),
        (lambda: pa.array([[1]]), "column 'text' has type list"),
    ],
)
def test_bad_texts_of_a_dataset(column: Callable[[], pa.Array], message: str, folder: Path, tmp_path: Path) -> None:
    save_arrow(tmp_path / "saved", column())
    fault(folder, describe_in(tmp_path, [{"name": "a", "inputs": ["saved"], "format": "dataset"}]), message)


def test_source_listed_twice(folder: Path, tmp_path: Path) -> None:
    """By two names of one file, by a glob and its file, as a dataset."""
    write_text(tmp_path / "in/a.txt", ["text"])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    save_arrow(tmp_path / "saved", pa.array(["text"]))
    one, message = {"name": "a", "inputs": ["in/a.txt"]}, "is listed twice .same file as .*. List every input once"
    fault(folder, describe_in(tmp_path, [one | {"inputs": ["in/*.txt", "in/a.txt"]}]), message)
    fault(folder, describe_in(tmp_path, [one | {"inputs": ["in", "link/a.txt"]}]), message)
    fault(folder, describe_in(tmp_path, [one | {"inputs": ["saved", "saved"], "format": "dataset"}]), message)
    both = [{"name": n, "inputs": ["saved"], "format": "dataset"} for n in "ab"]
    fault(folder, describe_in(tmp_path, both), r"data\.arrow: is in both sources a and b. Remove it from one")


@pytest.mark.parametrize("weight", ["0", "-1", "1001"])
def test_weights_that_pack_refuses(
    weight: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "a.txt", ["text"])
    description = describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"]}])
    tokenize(None, folder / "tok", tmp_path / "tokens", description=description, progress=False)
    words = [
        "pack",
        tmp_path / "tokens",
        "--sequence-length",
        16,
        "--output",
        tmp_path / "out",
        "--weight",
        f"a={weight}",
    ]
    assert main([str(word) for word in words]) == 1
    assert "weight of 'a' " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_weights_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "t", "--sequence-length=16", "--output=o", "--weight=a=2", "--weight=b=2", "--weight=a=3"])
    assert "--weight: source 'a' has two weights; give one" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "wikiextractor", "dataset", "builder:csv"])
def test_source_that_disappears(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three files is missing when it is read; once restored, the same command resumes."""
    from data_pipeline.tokenization import stage

    texts = [make_documents(20, seed=i) for i in range(3)]
    data = tmp_path / "in"
    data.mkdir()
    for i, documents in enumerate(texts):
        if kind == "dataset":
            save_arrow(data / str(i), pa.array(documents))
        elif kind == "builder:csv":
            datasets.Dataset.from_dict({"text": documents}).to_csv(data / f"{i}.csv")
        elif kind == "wikiextractor":
            articles = [f'<doc id="{j}" url="u" title="T">\n{text}\n</doc>\n' for j, text in enumerate(documents)]
            (data / str(i)).write_text("".join(articles))
        else:
            write_text(data / f"{i}.txt", documents)
    inputs = [f"in/{i}" for i in range(3)] if kind == "dataset" else ["in/*"]
    path = describe_in(tmp_path, [{"name": "a", "inputs": inputs, "format": kind}])
    gone = sorted(file for file in data.rglob("*") if file.is_file() and file.suffix != ".json")[2]
    plan = stage._plan

    def vanish(*arguments: Any) -> Any:
        found = plan(*arguments)
        gone.rename(tmp_path / "away")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_plan", vanish)
        with pytest.raises(CorpusError, match=f"{gone.name}: disappeared during the build. Restore it and rerun"):
            build(None, folder / "tok", 16, tmp_path / "out", description=path, **SIZES)
    assert not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "away").rename(gone)
    build(None, folder / "tok", 16, tmp_path / "out", description=path, **SIZES)
    assert read_manifest(tmp_path / "out").documents == 60


@pytest.mark.parametrize("how", ["no text", "dropped", "duplicate of a task"])
def test_an_empty_corpus_is_no_matter_of_the_held_out_share(how: str, folder: Path, tmp_path: Path) -> None:
    documents = [] if how == "no text" else make_documents(60)
    write_text(tmp_path / "a.txt", documents)
    write_text(tmp_path / "task.txt", documents or ["the of and"])
    rules: dict[str, Any] = {"min_characters": 1 << 20} if how == "dropped" else {}
    if how == "duplicate of a task":
        rules = {"min_characters": 30, "decontaminate": ["task.txt"], "decontaminate_words": 1}
    path = describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"]}], documents=rules)
    messages = {"no text": "no text in .*a.txt. Add text", "dropped": r"\(too_short 60\). Relax the rules"}
    for share in (0.0, 0.2):
        with pytest.raises(CorpusError, match=f"the corpus is empty: .*{messages.get(how, 'contaminated 5')}"):
            build(None, folder / "tok", 16, tmp_path / "out", description=path, held_out=share, progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own_folder", [False, True])
def test_stage_that_fails_can_be_rerun(
    own_folder: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage fails with the same error every time, keeps the files of the user and leaves no others."""
    from data_pipeline.packing import stage as pack_module

    path = describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"]}])
    tokens, out = tmp_path / "tokens", tmp_path / "out"
    if own_folder:
        tokens.mkdir()
        out.mkdir()
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xe4d\n")
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8 at byte 7"):
            tokenize(None, folder / "tok", tokens, description=path, held_out=0.3, progress=False)
        assert tokens.exists() == own_folder
        assert not own_folder or not list(tokens.iterdir())
    write_text(tmp_path / "a.txt", make_documents(60))
    tokenize(None, folder / "tok", tokens, description=path, held_out=0.3, progress=False)

    def fail(*_: object) -> None:
        (out / "notes").write_text("precious")
        raise OSError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "lay_out", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is on fire"):
                pack(tokens, 16, out, progress=False)
            assert (out / "notes").read_text() == "precious"
            assert not (out / "held_out").exists()
    pack(tokens, 16, out, progress=False)


def test_a_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    """The error of a failed read() names no file. Address 0 of this process cannot be read."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").symlink_to("/proc/self/mem")
    for run in (tokenize, partial(build, sequence_length=16)):
        with pytest.raises(CorpusError, match=r"in/a\.txt: cannot be read \(Input/output error\)\. .* copy, or remove"):
            run([tmp_path / "in"], folder / "tok", output=tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_read_that_fails_later_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / name, ["text", *make_documents(20)])
    (source,) = find_sources([path])

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_pipeline.sources.streams._Range.read", fail)
    with pytest.raises(CorpusError, match=rf"{name}: cannot be read \(Input/output error\)"):
        list(read_documents(source, Piece(0, 0, source.bytes), "line", "text", lambda *_: None))
