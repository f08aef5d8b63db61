"""Complete builds: compared with a naive implementation; same bytes for any number of workers, kills and restarts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.arguments import Safeguards
from data_pipeline.build import build
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError
from data_pipeline.reports.describe import describe
from data_pipeline.reports.scan import scan, verify
from data_pipeline.shards import Corpus
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from tests.support.documents import (
    ROOT,
    command,
    corpus_documents,
    make_documents,
    reference_pack,
    tree,
    write_text,
    write_tokenizer,
)

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in/`: six text files, `tok/`: a tokenizer, `uninterrupted/`: a build with many units and shards."""
    folder = tmp_path_factory.mktemp("build")
    for i in range(6):
        write_text(folder / f"in/part{i}.txt", make_documents(60, seed=i))
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    build([folder / "in"], folder / "tok", LENGTH, folder / "uninterrupted", **SIZES)
    return folder


# Sizes in MB that give about 15 units of work and 20 shards.
SIZES: dict[str, Any] = {"work_size": 0.006, "shard_size": 0.003, "held_out": 0.2, "progress": False}


def encode_naively(tokenizer: Path, documents: list[str]) -> list[list[int]]:
    words = Encoder(tokenizer).tokenizer
    return [words.encode(document, add_special_tokens=False).ids for document in documents]


def test_corpus_matches_naive_implementation(folder: Path, tmp_path: Path) -> None:
    documents = [document for i in range(6) for document in make_documents(60, seed=i)]
    manifest = build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", shard_size=0.003)
    encoded = encode_naively(folder / "tok", documents)
    rows, ends = reference_pack(encoded, LENGTH)
    corpus = Corpus(tmp_path / "out")
    shards = range(len(manifest.shards))
    assert len(shards) > 10
    assert np.concatenate([corpus.input_ids(i) for i in shards]).tolist() == rows
    assert np.concatenate([corpus.document_end(i) for i in shards]).tolist() == ends
    assert (manifest.rows, manifest.documents) == (len(rows), len(documents))
    assert manifest.tokens == sum(token != 0 for row in rows for token in row)
    assert [source.name for source in manifest.sources] == [f"part{i}.txt" for i in range(6)]
    data = (folder / "in/part0.txt").read_bytes()
    assert manifest.sources[0].sha256 == hashlib.sha256(data).hexdigest()
    tokenizer = (tmp_path / "out/tokenizer/tokenizer.json").read_bytes()
    assert manifest.tokenizer_sha256 == hashlib.sha256(tokenizer).hexdigest()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["build.json", "manifest.json", "tokenizer", *(shard.file for shard in manifest.shards)]
    )


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_same_bytes_for_any_number_of_workers(folder: Path, tmp_path: Path, workers: int) -> None:
    # Inputs listed one by one, and in another order.
    inputs = sorted((folder / "in").iterdir(), reverse=True)
    build(inputs, folder / "tok", LENGTH, tmp_path / "out", workers=workers, **SIZES)
    assert tree(tmp_path / "out") == tree(folder / "uninterrupted")


@pytest.mark.parametrize("work_size", [0.0005, 0.05, 30])
def test_corpus_does_not_depend_on_work_size(folder: Path, tmp_path: Path, work_size: float) -> None:
    build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", **SIZES | {"work_size": work_size})
    ours, uninterrupted = tree(tmp_path / "out"), tree(folder / "uninterrupted")
    assert ours.pop("build.json") != uninterrupted.pop("build.json")
    assert ours == uninterrupted


def test_held_out_documents_are_on_one_side_only(folder: Path, tmp_path: Path) -> None:
    documents = [document for i in range(6) for document in make_documents(60, seed=i)]
    train, held = corpus_documents(folder / "uninterrupted"), corpus_documents(folder / "uninterrupted/held_out")
    encoded = encode_naively(folder / "tok", documents)
    assert sorted(train + held) == sorted(encoded)
    assert 0.1 < len(held) / len(encoded) < 0.3
    assert not {tuple(document) for document in train} & {tuple(document) for document in held}
    # Document order is kept on each side.
    chosen = {tuple(document) for document in held}
    assert [document for document in encoded if tuple(document) in chosen] == held
    assert len(verify(folder / "uninterrupted")) == 2
    # Another seed gives another split; equal documents stay on the same side.
    write_text(tmp_path / "twice.txt", documents + documents)
    build([tmp_path / "twice.txt"], folder / "tok", LENGTH, tmp_path / "out", **SIZES | {"seed": 5})
    other = corpus_documents(tmp_path / "out/held_out")
    assert other[: len(other) // 2] == other[len(other) // 2 :]
    assert other[: len(other) // 2] != held


def test_long_documents_are_processed_in_pieces(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [
        "\n".join(make_documents(40, seed=9)),
        "short",
        "\n".join(make_documents(50, seed=8)),
        "last",
    ]
    write_text(tmp_path / "a.txt", [document.replace("\n\n", "\n") for document in documents])
    expected = encode_naively(folder / "tok", documents)
    monkeypatch.setattr("data_pipeline.sources.documents.PIECE", 300)
    monkeypatch.setattr("data_pipeline.tokenization.units._BATCH", 700)
    build([tmp_path / "a.txt"], folder / "tok", LENGTH, tmp_path / "out", progress=False)
    assert corpus_documents(tmp_path / "out") == expected
    build([tmp_path / "a.txt"], folder / "tok", LENGTH, tmp_path / "half", held_out=0.5, seed=3, progress=False)
    train, held = corpus_documents(tmp_path / "half"), corpus_documents(tmp_path / "half/held_out")
    assert sorted(train + held) == sorted(expected)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=60), min_size=1, max_size=12), st.integers(8, 20))
def test_any_unicode_document_keeps_its_tokens(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str], length: int
) -> None:
    path = tmp_path_factory.mktemp("unicode")
    (path / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    expected = [ids for ids in encode_naively(folder / "tok", documents) if ids]
    if not expected:
        with pytest.raises(CorpusError, match="the corpus is empty"):
            build([path / "a.jsonl"], folder / "tok", length, path / "out", progress=False)
        return
    options: dict[str, Any] = {"shard_size": 0.0002, "progress": False, "safeguards": Safeguards(max_unknown=1)}
    manifest = build([path / "a.jsonl"], folder / "tok", length, path / "out", **options)
    assert corpus_documents(path / "out") == expected
    assert manifest.documents == len(expected)


def test_stats_match_the_documents(folder: Path) -> None:
    documents = corpus_documents(folder / "uninterrupted")
    corpus = Corpus(folder / "uninterrupted")
    found = scan(corpus)
    lengths = sorted(map(len, documents))
    assert found.lengths == {length: lengths.count(length) for length in set(lengths)}
    quantiles = found.length_quantiles()
    assert (quantiles[0], quantiles[-1]) == (lengths[0], lengths[-1])
    assert quantiles[3] == lengths[(len(lengths) + 1) // 2 - 1]
    text = [token for document in documents for token in document]
    assert [int(n) for n in found.counts[5:]] == np.bincount(text, minlength=len(found.counts))[5:].tolist()
    table = describe(folder / "uninterrupted", top=3)
    assert f"documents        {len(documents):,}" in table
    unknown = text.count(1)
    assert unknown > 0
    assert f"unknown          {unknown:,} ({unknown / len(text):.4%} of text)" in table
    top = max(set(text) - {1}, key=text.count)
    assert corpus_token(corpus, top) in table.splitlines()[-3:][0] + table.splitlines()[-2]


def corpus_token(corpus: Corpus, token: int) -> str:
    return f"  {Encoder(corpus.tokenizer_folder).tokenizer.id_to_token(token):20} "


def build_command(folder: Path, output: Path, workers: int = 2) -> list[str]:
    sizes = ["--work-size", "0.006", "--shard-size", "0.003", "--held-out", "0.2", "--workers", str(workers)]
    options = ["--tokenizer", folder / "tok", "--sequence-length", LENGTH, "--output", output]
    return command("build", "--input", folder / "in", *options, *sizes)


CRASH = """
import json, os, sys
from pathlib import Path
from data_pipeline.build import build

source, tokenizer, folder = sys.argv[1:]

def run(output, crash_at):
    # In a child process, since kill -9 skips all clean-up.
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left, rename = crash_at, Path.rename
    def crash_or_rename(path, target):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        return rename(path, target)
    Path.rename = crash_or_rename
    build([source], tokenizer, 16, output, held_out=0.3, shard_size=0.003, progress=False)
    os._exit(0)

n = 0
while run(f"{folder}/out{n}", n) == -9:
    n += 1
    print(n, flush=True)
    os.system(f"cp -r {folder}/out{n - 1} {folder}/killed{n - 1}")
    assert run(f"{folder}/out{n - 1}", -1) == 0
"""


def test_kill_before_every_single_rename(folder: Path, tmp_path: Path) -> None:
    """Nothing visible changes between two renames, so these are all the states that a kill can leave."""
    script = [sys.executable, "-c", CRASH, folder / "in/part0.txt", folder / "tok", tmp_path]
    found = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    kills = len(found.stdout.splitlines())
    # The last build was not killed.
    uninterrupted = tree(tmp_path / f"out{kills}")
    assert sum(name.endswith(".arrow") for name in uninterrupted) >= 3
    assert kills > len(uninterrupted) - 8
    for n in range(kills):
        for path in (tmp_path / f"killed{n}").rglob("shard-*.arrow"):
            assert path.read_bytes() == uninterrupted[str(path.relative_to(tmp_path / f"killed{n}"))]
        assert tree(tmp_path / f"out{n}") == uninterrupted


def test_ctrl_c_leaves_a_resumable_folder(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        build_command(folder, tmp_path / "out"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list((tmp_path / "out").glob(".build/results/*.json")):
        time.sleep(0.005)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    if process.returncode != 0:  # unless it has just finished
        assert process.returncode == 130
        assert errors == "error: interrupted. Rerun the same command to resume\n"
        assert not list((tmp_path / "out").rglob("*.partial"))
        assert not (tmp_path / "out/manifest.json").exists()
    subprocess.run(build_command(folder, tmp_path / "out"), cwd=ROOT, check=True, capture_output=True)
    assert tree(tmp_path / "out") == tree(folder / "uninterrupted")


def test_finished_build_is_not_repeated(folder: Path, tmp_path: Path) -> None:
    first = build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", **SIZES)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", workers=2, **SIZES) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path in times} == times | {
        path: path.stat().st_mtime_ns for path in ()
    }
    assert tree(tmp_path / "out") == tree(folder / "uninterrupted")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"held_out": 0.3}, r"held_out was 0\.2, is now 0\.3"),
        ({"documents": "line"}, "documents was blank-line, is now line"),
        ({"shard_size": 1.0}, "shard_size"),
    ],
)
def test_other_arguments_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", **SIZES)
    (tmp_path / "out/manifest.json").unlink()
    before = tree(tmp_path / "out")
    with pytest.raises(CorpusError, match=f"other arguments: {message}"):
        build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", **SIZES | change)
    assert tree(tmp_path / "out") == before


def test_other_inputs_or_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", ["some text"] * 50)
    build([source], folder / "tok", LENGTH, tmp_path / "out", progress=False)
    other = copy_and_extend(folder / "vocab", tmp_path)
    with pytest.raises(CorpusError, match="other arguments: tokenizer"):
        build([source], other, LENGTH, tmp_path / "out", progress=False)
    write_text(source, ["other text"] * 50)
    with pytest.raises(CorpusError, match=r"other arguments: sources was \[\['a\.txt', 549\]\]"):
        build([source], folder / "tok", LENGTH, tmp_path / "out", progress=False)


def copy_and_extend(vocab: Path, target: Path) -> Path:
    other = write_tokenizer(target / "other", extra=["extra"])
    assert (other / "vocab.txt").read_text() != (vocab / "vocab.txt").read_text()
    return other


def test_modified_input_is_refused_on_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_text(tmp_path / "a.txt", ["some text"] * 50)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.packing.stage.lay_out", fail)
        with pytest.raises(KeyboardInterrupt):
            build([source], folder / "tok", LENGTH, tmp_path / "out", progress=False)
    source.write_text(source.read_text().replace("some", "same"))
    with pytest.raises(CorpusError, match=r"a\.txt: modified since the build started"):
        build([source], folder / "tok", LENGTH, tmp_path / "out", progress=False)


def test_two_builds_in_one_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = []

    run = Pool.run

    def second(*arguments: Any) -> Any:
        with pytest.raises(CorpusError, match="another build is running") as caught:
            build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", **SIZES)
        messages.append(caught.value)
        return run(*arguments)

    monkeypatch.setattr(Pool, "run", second)
    build([folder / "in"], folder / "tok", LENGTH, tmp_path / "out", **SIZES)
    assert messages
    assert tree(tmp_path / "out") == tree(folder / "uninterrupted")


def test_tokenizer_and_output_below_the_input_folder_are_not_read(folder: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "a/a.txt", make_documents(20))
    copy_tokenizer(folder / "tok", tmp_path / "tok")
    for _ in range(2):
        manifest = build([tmp_path], tmp_path / "tok", LENGTH, tmp_path / "out", progress=False)
        assert [source.name for source in manifest.sources] == ["a.txt"]


def test_foreign_hidden_files_are_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".download.partial").write_text("precious")
    with pytest.raises(CorpusError, match="output folder is not empty"):
        build([folder / "in"], folder / "tok", LENGTH, tmp_path, progress=False)
    assert tree(tmp_path) == {".download.partial": b"precious"}


def test_importing_and_help_load_nothing_heavy() -> None:
    script = "import sys, data_pipeline.__main__ as m; m.command_parser(); print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"numpy", "pyarrow", "tokenizers", "torch", "tqdm"} & set(eval(found.stdout))
    script = "import sys, data_pipeline.build, data_pipeline.reports.scan; print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "deepspeed", "transformers", "maskvr_ds", "tokenizers"} & set(eval(found.stdout))
