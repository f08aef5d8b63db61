"""Commands refused on used output folders, and regression tests of unclear or missing errors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_pipeline.__main__ import main
from data_pipeline.build import build, pack, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import describe_in, make_documents, tree, write_text, write_tokenizer

SIZES: dict[str, Any] = {"work_size": 0.003, "shard_size": 0.003, "progress": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder / "tok"


def edit(path: Path) -> None:
    """Change a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[0] = ord("a") if data[0] != ord("a") else ord("b")
    path.write_bytes(data)


def test_file_name_that_is_not_utf8(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "in/a.txt", ["text"])
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        write_text(tmp_path / "in" / name, ["text"])
    except OSError:
        pytest.skip("this file system has no such names")
    arguments = ["build", "--input", tmp_path / "in", "--tokenizer", tokenizer, "--sequence-length", 16]
    assert main([str(x) for x in [*arguments, "--output", tmp_path / "out"]]) == 1
    assert capsys.readouterr().err.endswith("caf\\udce9.txt': file name is not UTF-8; rename it\n")
    assert not (tmp_path / "out").exists()


def stopped_before_packing(run: Callable[[], object]) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.build._pack_sides", fail)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("finished", [True, False])
def test_changed_task_file_is_refused(finished: bool, tmp_path: Path, tokenizer: Path) -> None:
    write_text(tmp_path / "a.txt", make_documents(50))
    task = write_text(tmp_path / "task.txt", ["one two three four five six seven eight"])
    rules = {"decontaminate": ["task.txt"], "decontaminate_words": 8}
    about = describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"]}], documents=rules)

    def run() -> object:
        return build(None, tokenizer, 16, tmp_path / "out", description=about, **SIZES)

    if finished:
        run()
    else:
        stopped_before_packing(run)
    edit(task)
    with pytest.raises(CorpusError, match=r"other arguments: decontaminate .*task\.txt"):
        run()
    # Folders of earlier versions do not record the task files.
    arguments = json.loads((tmp_path / "out/build.json").read_text())
    del arguments["decontaminate"]
    (tmp_path / "out/build.json").write_text(json.dumps(arguments))
    run()


@pytest.mark.parametrize("finished", [True, False])
def test_inputs_and_task_files_may_be_moved(finished: bool, tmp_path: Path, tokenizer: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    write_text(before / "a.txt", make_documents(50))
    for name in ("task.txt", "other.txt"):
        write_text(before / name, [f"one two three four five six seven {name}"])

    def run(folder: Path, *tasks: str) -> object:
        rules = {"decontaminate": tasks, "decontaminate_words": 8}
        about = describe_in(folder, [{"name": "a", "inputs": ["a.txt"]}], documents=rules)
        return build(None, tokenizer, 16, tmp_path / "out", description=about, **SIZES)

    if finished:
        run(before, "task.txt")
    else:
        stopped_before_packing(lambda: run(before, "task.txt"))
    before.rename(after)
    for tasks in ((), ("other.txt",), ("task.txt", "other.txt")):
        with pytest.raises(CorpusError, match="holds a build with other arguments"):
            run(after, *tasks)
    (after / "task.txt").rename(after / "renamed.txt")
    run(after, "renamed.txt")
    assert (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("make", ["build", "tokenize"])
def test_changed_input_of_a_finished_folder_is_refused(
    make: str, keep_time: bool, tmp_path: Path, tokenizer: Path
) -> None:
    source = write_text(tmp_path / "a.txt", make_documents(50))

    def run() -> object:
        if make == "build":
            return build([source], tokenizer, 16, tmp_path / "out", **SIZES)
        return tokenize([source], tokenizer, tmp_path / "out", progress=False)

    first = run()
    shutil.copyfile(source, tmp_path / "copy")
    (tmp_path / "copy").replace(source)
    source.touch()
    assert run() == first
    time = source.stat().st_mtime_ns
    edit(source)
    if keep_time:
        os.utime(source, ns=(0, time))
    before = tree(tmp_path / "out")
    with pytest.raises(CorpusError, match=r"a\.txt: modified since .*out was built from it"):
        run()
    assert tree(tmp_path / "out") == before


def test_touched_input_of_an_unfinished_folder(tmp_path: Path, tokenizer: Path) -> None:
    """Tokenized inputs are compared by SHA-256; of the others, only the units have been used."""
    sources = [write_text(tmp_path / f"{name}.txt", make_documents(200, seed=i)) for i, name in enumerate("ab")]

    def run(output: Path) -> object:
        return build(sources, tokenizer, 16, output, **SIZES)

    run(tmp_path / "uninterrupted")
    stopped_before_packing(lambda: run(tmp_path / "out"))
    results = sorted((tmp_path / "out/.build/results").glob("unit-*.json"))
    assert len(results) > 4
    # As if the build had been killed after one unit of the first file and none of the second.
    for path in results[1:]:
        path.unlink()
    for source in sources:
        source.touch()
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    run(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "uninterrupted")
    edit(sources[0])
    with pytest.raises(CorpusError, match=r"a\.txt: modified since the build started"):
        run(tmp_path / "other")
    write_text(sources[0], make_documents(200))
    # The first unit is not tokenized but the next one is: the SHA-256 of the file is unknown.
    results = tmp_path / "other/.build/results"
    (results / "unit-00000.json").rename(results / "unit-00001.json")
    found = json.loads((results / "unit-00001.json").read_text())
    (results / "unit-00001.json").write_text(json.dumps(found | {"sha256": {}}))
    with pytest.raises(CorpusError, match=r"a\.txt: modified since the build started"):
        run(tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "shard-00001.arrow").unlink(), r"shard-00001\.arrow: shard is missing"),
        (lambda c: os.truncate(c / "shard-00001.arrow", 500), r"shard-00001\.arrow: .* 500 found"),
        (lambda c: (c / "held_out/shard-00000.arrow").unlink(), r"held_out/shard-00000\.arrow: shard is missing"),
        (lambda c: (c / "held_out/manifest.json").unlink(), r"held_out/manifest\.json: missing"),
    ],
)
@pytest.mark.parametrize("make", ["build", "pack"])
def test_damaged_finished_folder(
    make: str, damage: Callable[[Path], object], message: str, tmp_path: Path, tokenizer: Path
) -> None:
    source = write_text(tmp_path / "a.txt", make_documents(200))
    if make == "pack":
        tokenize([source], tokenizer, tmp_path / "tokens", held_out=0.3, progress=False)

    def run() -> object:
        if make == "pack":
            return pack(tmp_path / "tokens", 16, tmp_path / "out", shard_size=0.003, progress=False)
        return build([source], tokenizer, 16, tmp_path / "out", held_out=0.3, **SIZES)

    assert run() == run()
    damage(tmp_path / "out")
    with pytest.raises(CorpusError, match=rf"{message}.*: remove the folder .*out, then rerun the command"):
        run()


@pytest.mark.parametrize("packing", ["full_sequences", "documents", "nsp"])
def test_weights_that_select_no_documents(packing: str, tmp_path: Path, tokenizer: Path) -> None:
    source = write_text(tmp_path / "a.txt", make_documents(5))
    tokenize([source], tokenizer, tmp_path / "tokens", progress=False)
    with pytest.raises(CorpusError, match="side train: the weights select no documents; increase them"):
        pack(tmp_path / "tokens", 16, tmp_path / "out", packing=packing, weights={"": 1e-9}, progress=False)


def test_error_names_the_tokenizer_as_given(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", ["text"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=rf"^{tmp_path}/empty/tokenizer\.json: missing"):
        build([source], tmp_path / "empty", 16, tmp_path / "out", progress=False)
    old = write_tokenizer(tmp_path / "old")
    (old / "vocab.txt").write_bytes((old / "vocab.txt").read_bytes() + b"caf\xe9\n")
    with pytest.raises(CorpusError, match=rf"^{old}/vocab\.txt: not UTF-8 .*Convert the file"):
        build([source], old, 16, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_skipped_files_are_counted(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_text(tmp_path / "in/a.txt", ["text"])
    for name in ("b.bz2", "deep/c.JSON", "d.json", "README", ".hidden"):
        write_text(tmp_path / "in" / name, ["text"])
    build([tmp_path / "in"], tokenizer, 16, tmp_path / "out", progress=False)
    hint = "(of these, by name or glob also .md, .csv, .tsv and .json)"
    assert f"skipped 4 files: .bz2 1, .json 2, without suffix 1 {hint}" in caplog.messages
    caplog.clear()
    build([tmp_path / "in/a.txt"], tokenizer, 16, tmp_path / "one", progress=False)
    assert not [message for message in caplog.messages if "skipped" in message]


def test_brackets_in_the_folder_of_a_description(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "x[1]"
    write_text(folder / "a.txt", ["text"])
    write_text(folder / "b[1].txt", ["more"])
    write_text(folder / "task.tsv", ["one two three"])
    rules = {"decontaminate": ["*.tsv"], "decontaminate_words": 2}
    about = describe_in(folder, [{"name": "a", "inputs": ["a*.txt", "b[1].txt"]}], documents=rules)
    manifest = build(None, tokenizer, 16, tmp_path / "out", description=about, progress=False)
    assert [source.name for source in manifest.sources] == ["a/a.txt", "a/b[1].txt"]
    about = describe_in(folder, [{"name": "a", "inputs": ["none.txt"]}])
    with pytest.raises(CorpusError, match=r"x\[1\]/none\.txt: no such file"):
        build(None, tokenizer, 16, tmp_path / "none", description=about, progress=False)


def test_messages_of_description_faults(tmp_path: Path, tokenizer: Path) -> None:
    def faults(sources: list[dict[str, Any]], **others: object) -> list[str]:
        about = describe_in(tmp_path, sources, **others)
        with pytest.raises(CorpusError) as caught:
            build(None, tokenizer, 16, tmp_path / "out", description=about, progress=False)
        return [line.removeprefix(f"{about}: ") for line in str(caught.value).splitlines()]

    one = {"name": "a", "inputs": ["a.txt"]}
    # An invalid entry must not be reported as an empty list.
    (found,) = faults([one | {"colour": "red"}])
    assert found.startswith("sources.0.colour: unknown key; known here: name, inputs, format, documents,")
    (found,) = faults([one], documents={"colour": "red"})
    assert found.startswith("documents.colour: unknown key; known here: bad_bytes, no_text, bad_records, normalize,")
    (found,) = faults([one], colour="red")
    assert found == "colour: unknown key; known here: sources, documents, sentences, word_starts"


@pytest.mark.parametrize("option", ["--shard-size", "--work-size"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e300"])
def test_infinite_sizes(
    option: str, value: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_text(tmp_path / "a.txt", ["text"])
    arguments = ["build", "--input", source, "--tokenizer", tokenizer, "--sequence-length", 16, option, value]
    with pytest.raises(SystemExit, match="2"):
        main([str(x) for x in [*arguments, "--output", tmp_path / "out"]])
    message = f"argument {option}: '{value}': expected a finite number of at most 1e+15"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [False, True])
def test_string_view_columns(bad: bool, tmp_path: Path, tokenizer: Path) -> None:
    texts = [b"the first", b"bad \xe4" if bad else b"good", b"the other, which is longer than twelve bytes \xc3\xa4"]
    (tmp_path / "in").mkdir()
    found = []
    for name, binary, kind in (("plain", pa.binary(), pa.string()), ("view", pa.binary_view(), pa.string_view())):
        batch = pa.record_batch({"text": pa.array(texts, binary).view(kind)})
        with (tmp_path / f"in/{name}.arrow").open("wb") as file, pa.ipc.new_stream(file, batch.schema) as out:
            out.write_batch(batch)
        (tmp_path / "in/state.json").write_text(json.dumps({"_data_files": [{"filename": f"{name}.arrow"}]}))
        source = {"name": "a", "inputs": ["in"], "format": "dataset"}
        about = describe_in(tmp_path, [source], documents={"bad_bytes": "replace" if bad else "error"})
        build(None, tokenizer, 16, tmp_path / name, description=about, progress=False)
        found.append((tmp_path / name / "shard-00000.arrow").read_bytes())
    assert found[0] == found[1]
