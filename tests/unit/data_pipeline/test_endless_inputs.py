"""Inputs without end or without bound: pipes, devices, huge records, files that expand, stretches without line ends."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.arguments import Safeguards
from data_pipeline.build import build
from data_pipeline.files import CorpusError
from data_pipeline.sources import cuts, documents, reading
from data_pipeline.sources.documents import read_documents
from data_pipeline.sources.inputs import Piece, Source, find_sources
from data_pipeline.sources.reading import Limits, Reading
from data_pipeline.sources.sentences import sentence_starts
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import ROOT, make_documents, run_command, write_text, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder / "tok"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        folder = os.open(path.parent, os.O_RDONLY)
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(""))
    path.symlink_to(path.stem)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "link to a pipe": (link_to_pipe, "is a link to a named pipe, not a file"),
    "socket": (make_socket, "is a socket, not a file"),
    "link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), "is a link to a device, not a file"),
    "link to a terminal": (lambda path: path.symlink_to("/dev/ptmx"), "is a link to a device, not a file"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_a_file(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    """In a folder, by name and by glob; before anything is read or written."""
    make, message = ODD[kind]
    write_text(tmp_path / "in/a.txt", ["text"])
    make(tmp_path / "in/x.txt")
    for given_as in ("in", "in/x.txt", "in/*.txt"):
        with pytest.raises(CorpusError, match=rf"in/x\.txt: {message}.*: its end is unknown\. Save its content"):
            find_sources([tmp_path / given_as])
    words = ["--tokenizer", tokenizer, "--sequence-length", 16, "--output", tmp_path / "out"]
    done = run_command("build", "--input", tmp_path / "in", *words)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pipe_in_a_tokenizer_folder(tmp_path: Path, tokenizer: Path) -> None:
    write_text(tmp_path / "a.txt", ["text"])
    folder = write_tokenizer(tmp_path / "vocab")
    os.mkfifo(folder / "added_tokens.json")
    with pytest.raises(CorpusError, match=r"added_tokens\.json: is no file .a folder, pipe, device or dead link"):
        build([tmp_path / "a.txt"], folder, 16, tmp_path / "out", progress=False)


# --- planning


class Counting:
    """A file that counts the bytes read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.count = 0

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def read(self, n: int) -> bytes:
        data = self._file.read(n)
        self.count += len(data)
        return data


RULES = {"blank-line": cuts._CUTS["blank-line"], "line": cuts._CUTS["line"], "wiki": cuts._WIKI_CUT}


@given(st.data())
def test_cuts_are_the_first_separators(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The same places as a search in the complete text, whatever the size of the blocks."""
    name = data.draw(st.sampled_from(sorted(RULES)))
    wiki = ("</doc>", "<", "/d", "oc>") if name == "wiki" else ()
    parts = st.sampled_from(["a", "\n", " ", "\t", "\r", *wiki])
    text = "".join(data.draw(st.lists(parts, max_size=40))).encode()
    path = tmp_path_factory.mktemp("cuts") / "a.txt"
    path.write_bytes(text)
    position = data.draw(st.integers(0, len(text)))
    match = RULES[name].search(text, position)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "_BLOCK", data.draw(st.integers(1, 9)))
        found = cuts._next_cut(Counting(path), position, RULES[name], len(text))
    assert found == (match.end() if match else len(text))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stretch", [b"word ", b" ", b"\t\r", b"</doc> ", b"<"])
def test_planning_is_linear(rule: str, stretch: bytes, tmp_path: Path) -> None:
    """In a stretch without newline after a newline: 32 MB took over 50 seconds, and now less than one."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"x\n" + stretch * (32_000_000 // len(stretch)))
    size = path.stat().st_size
    start = time.process_time()
    file = Counting(path)
    position = 0 if rule != "line" else 2
    assert cuts._next_cut(file, position, RULES[rule], size) == size
    assert file.count == size - position
    assert time.process_time() - start < 5


def test_sentences_of_white_space() -> None:
    """A piece may end with a megabyte of line ends."""
    text = "One. Two." + "\n" * 1_000_000
    start = time.process_time()
    assert sentence_starts(text, "punctuation", "") == [0, 5]
    assert sentence_starts(text, "line", "") == [0]
    assert sentence_starts(text + "Three", "punctuation", "") == [0, 5, len(text)]
    assert time.process_time() - start < 5


# --- limits


def texts_of(path: Path, limits: Limits, mode: str = "file") -> list[str]:
    stat = path.stat()
    source = Source(str(path), path.name, stat.st_size, stat.st_mtime_ns)
    stop = 1 if path.suffix == ".parquet" else stat.st_size
    rules = Reading(limits=limits)
    return [text for text, _ in read_documents(source, Piece(0, 0, stop), mode, "text", lambda *_: None, rules)]


def test_long_record_is_named(tmp_path: Path) -> None:
    """By file and line, or row; a record of the limit's length is read."""
    lines = [json.dumps({"text": "x" * 100})] * 3 + [json.dumps({"text": "y" * 3_000_000})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pq.write_table(pa.table({"text": ["x", "y" * 3_000_000]}), tmp_path / "c.parquet")
    for name, where in (("a.jsonl", ":4"), ("b.jsonl.gz", ":4"), ("c.parquet", ": row 1 of row group 0")):
        path = tmp_path / name
        message = f"{re.escape(str(path))}{where}: a record of more than 2 million characters.*raise --max-record"
        with pytest.raises(CorpusError, match=message):
            texts_of(path, Limits(record=2_000_000))
        assert sum(map(len, texts_of(path, Limits(record=3_000_012)))) >= 3_000_000


@pytest.mark.parametrize("mode", ["blank-line", "line", "file"])
def test_white_space_without_end(mode: str, tmp_path: Path) -> None:
    """Before a document it takes no memory; within one there is a limit. Both in linear time."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b" " * 30_000_000 + b"word"))
    limits = Limits(record=4_000_000)
    assert texts_of(path, limits, mode) == ["word"]
    path.write_bytes(gzip.compress(b"word" + b" " * 30_000_000 + b"word"))
    with pytest.raises(CorpusError, match="white space within a document: a record of more than 4 million"):
        texts_of(path, limits, mode)


def bomb(path: Path, rows: int, value: int) -> Path:
    """Each row is the same value of a dictionary: a file of a few kB with rows x value characters of text."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * value]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False, row_group_size=rows)
    assert path.stat().st_size < 100_000
    return path


@pytest.mark.parametrize("kind", ["line", "parquet"])
def test_bombs_in_bounded_memory(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    """3 GB and more from a small file: one error within seconds, and never more than 1.5 GB of memory."""
    zeros = b"x" * 100_000_000
    if kind == "line":
        path = tmp_path / "a.jsonl.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'{"text": "')
            for _ in range(30):
                file.write(zeros)
        message = r"a\.jsonl\.gz:1: a record of more than 256 million characters\..*raise --max-record"
    else:
        path = bomb(tmp_path / "a.parquet", 1_000_000, 1_000_000)
        message = r"a\.parquet: row group 0, from row [\d,]+: more than 1,000 bytes of text per .*raise --max-expansion"
    words = ["build", "--input", path, "--tokenizer", tokenizer, "--sequence-length", 16, "--output", tmp_path / "out"]
    code = (
        "import resource, sys, tokenizers, pyarrow.parquet, data_pipeline.build\n"
        "from data_pipeline.__main__ import main\n"
        "status = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert re.search(message, error), error
    assert int(done.stdout) < 1_500_000, done.stdout  # kB
    assert not (tmp_path / "out").exists()


def test_limits_can_be_raised(tmp_path: Path, tokenizer: Path) -> None:
    path = bomb(tmp_path / "a.parquet", 1200, 1_000_000)
    with pytest.raises(CorpusError, match="more than 5,000 bytes of text per byte of the file"):
        texts_of(path, Limits(expansion=5000))
    assert len(texts_of(path, Limits(expansion=1e8))) == 1200


def test_batches_of_a_dictionary_are_small(tmp_path: Path) -> None:
    """All rows of a batch may have the largest value of the dictionary. Other rows take their own size."""
    pq.write_table(pa.table({"text": make_documents(2000)}), tmp_path / "plain.parquet", use_dictionary=False)
    found = {"plain.parquet": 1024}
    for value in (1000, 1_000_000, 100_000_000):
        path = bomb(tmp_path / f"{value}.parquet", 2000, value)
        found[path.name] = min(max(documents._BATCH_BYTES // value, 1), 1024)
    for name, most in found.items():
        with pq.ParquetFile(tmp_path / name) as file:
            rows = documents._batch_rows(file.metadata.row_group(0), "text")
        assert 0.9 * most - 1 < rows <= most


@pytest.mark.parametrize("library", [bz2, lzma, gzip])
def test_compressed_files_that_expand(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = {bz2: ".bz2", lzma: ".xz", gzip: ".gz"}[library]
    monkeypatch.setattr(reading, "_SMALL", 10_000_000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(library.compress(b"word " * 4_000_000))
    with pytest.raises(CorpusError, match=r"more than 100 bytes of text per byte of the file.*raise --max-expansion"):
        texts_of(path, Limits(expansion=100), "blank-line")
    assert sum(map(len, texts_of(path, Limits(expansion=1e6), "blank-line"))) == 19_999_999
    monkeypatch.setattr(reading, "_SMALL", 20_000_001)
    assert texts_of(path, Limits(expansion=100), "blank-line")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-record", "0"], r"max record 0\.0: must be above 0 and at most 2000"),
        (["--max-expansion", "0.5"], r"max expansion 0\.5: must be from 1 to"),
        (["--max-unknown", "0"], r"max unknown 0\.0: must be above 0 and at most 1"),
    ],
)
def test_bad_limits(options: list[str], message: str, tmp_path: Path, tokenizer: Path) -> None:
    source = write_text(tmp_path / "a.txt", make_documents(3))
    words = ["--tokenizer", tokenizer, "--sequence-length", 16, "--output", tmp_path / "out"]
    done = run_command("build", "--input", source, *words, *options)
    assert done.returncode == 1
    assert re.fullmatch(f"error: {message}.*\n", done.stderr)
    for value in (2, float("nan"), float("inf")):
        for name in ("max_record", "max_expansion", "max_unknown"):
            if (name, value) in (("max_record", 2), ("max_expansion", 2)):
                continue
            with pytest.raises(CorpusError, match=f"{name.replace('_', ' ')} {value}: must be"):
                build([source], tokenizer, 16, tmp_path / "out", safeguards=Safeguards(**{name: value}))
