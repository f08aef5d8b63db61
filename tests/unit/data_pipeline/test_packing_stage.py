"""Packing: rows of every packing, read back and compared with the tokens of the documents."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.arguments import Safeguards
from data_pipeline.build import build, pack, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.reports.describe import describe
from data_pipeline.reports.scan import verify, verify_tokens
from data_pipeline.sources.sentences import sentence_starts
from data_pipeline.tokenization.token_shards import SideReader, read_tokens
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from tests.support.documents import (
    CLS,
    PAD,
    SEP,
    corpus_documents,
    make_documents,
    rows_of,
    tree,
    write_text,
    write_tokenizer,
)

PLANES = ("word_start", "sentence_start")
SIZES: dict[str, Any] = {"work_size": 0.008, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    for i in range(3):
        write_text(folder / f"in/{i}.txt", [text.replace("x.", "x. The") for text in make_documents(80, seed=i)])
    tokenize([folder / "in"], folder / "tok", folder / "tokens", held_out=0.2, **SIZES)
    return folder


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def naive(encoder: Encoder, documents: list[str]) -> list[tuple[list[int], list[bool], list[bool]]]:
    """Ids, word starts and sentence starts of each document that has tokens, computed token by token."""
    found = []
    for document in documents:
        encoding = encoder.tokenizer.encode(document.strip(), add_special_tokens=False)
        cuts = sentence_starts(document.strip(), "punctuation", "")
        words = [i == 0 or w != encoding.word_ids[i - 1] for i, w in enumerate(encoding.word_ids)]
        # The first token of each sentence that has tokens.
        sentence_of = [sum(cut <= start for cut in cuts) for start, _ in encoding.offsets]
        begins = [i == 0 or s != sentence_of[i - 1] for i, s in enumerate(sentence_of)]
        if encoding.ids:
            found.append((encoding.ids, words, begins))
    return found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(st.text(max_size=60), st.text(st.sampled_from("ab .!?\n漢é"), max_size=120)), min_size=1, max_size=8
    ),
    st.integers(8, 20),
    st.sampled_from(["full_sequences", "documents"]),
)
def test_unicode_documents_round_trip(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str], length: int, packing: str
) -> None:
    """decode(pack(encode(documents))): every token once and in order, with the same boundaries, across shards."""
    path = tmp_path_factory.mktemp("any")
    source = write_jsonl(path / "a.jsonl", documents)
    expected = naive(Encoder(folder / "tok"), documents)
    if not expected:
        with pytest.raises(CorpusError, match="the corpus is empty"):
            tokenize([source], folder / "tok", path / "tokens", **SIZES)
        assert not (path / "tokens").exists()
        return
    tokenize(
        [source],
        folder / "tok",
        path / "tokens",
        work_size=0.0001,
        safeguards=Safeguards(max_unknown=1),
        progress=False,
    )
    bins = (8,) if packing == "documents" and length > 8 else ()
    pack(
        path / "tokens",
        length,
        path / "out",
        packing=packing,
        bins=bins,
        columns=PLANES,
        shard_size=0.0002,
        progress=False,
    )
    verify(path / "out")
    _, ids, columns = rows_of(path / "out")
    found: list[tuple[list[int], list[bool], list[bool]]] = [([], [], [])]
    for row, end, words, begins in zip(
        ids, columns["document_end"], columns["word_start"], columns["sentence_start"], strict=True
    ):
        special = np.isin(row, [CLS, SEP, PAD])
        assert not words[special].any()
        assert not begins[special].any()
        used = int((row != PAD).sum())
        assert row[0] == CLS
        assert row[used - 1] == SEP
        for i in range(1, used - 1):
            if row[i] == SEP:
                found.append(([], [], []))
                continue
            for values, value in zip(found[-1], (int(row[i]), bool(words[i]), bool(begins[i])), strict=True):
                values.append(value)  # type: ignore[attr-defined]
        if end:
            found.append(([], [], []))
    assert found.pop() == ([], [], [])
    if packing == "documents":  # bins change only the order of rows
        assert sorted(map(repr, found)) == sorted(map(repr, expected))
    else:
        assert found == expected


def test_pack_equals_build(folder: Path, tmp_path: Path) -> None:
    """Corpora packed from one tokenize equal those of separate builds, whatever its work size."""
    for length in (16, 40):
        expected = build(
            [folder / "in"], folder / "tok", length, tmp_path / f"b{length}", held_out=0.2, shard_size=0.003, **SIZES
        )
        assert (
            pack(folder / "tokens", length, tmp_path / f"p{length}", shard_size=0.003, workers=2, progress=False)
            == expected
        )
        ours, theirs = tree(tmp_path / f"p{length}"), tree(tmp_path / f"b{length}")
        assert ours.pop("build.json") != theirs.pop("build.json")
        assert ours == theirs
        assert expected.schema_version == 1


@pytest.mark.parametrize("packing", ["documents", "nsp", "sop"])
def test_rows_do_not_depend_on_workers_or_units(folder: Path, tmp_path: Path, packing: str) -> None:
    options: dict[str, Any] = {"packing": packing, "columns": PLANES, "shard_size": 0.01, "progress": False}
    options |= {"bins": (10, 20)} if packing == "documents" else {}
    pack(folder / "tokens", 32, tmp_path / "one", **options)
    pack(folder / "tokens", 32, tmp_path / "two", workers=2, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    inputs = sorted((folder / "in").iterdir(), reverse=True)
    build(inputs, folder / "tok", 32, tmp_path / "three", held_out=0.2, work_size=0.003, **options)
    ours, theirs = tree(tmp_path / "three"), tree(tmp_path / "one")
    assert ours.pop("build.json") != theirs.pop("build.json")
    assert ours == theirs


def test_documents_are_in_the_shortest_bin(folder: Path, tmp_path: Path) -> None:
    manifest = pack(
        folder / "tokens", 32, tmp_path / "out", packing="documents", bins=(10, 20), shard_size=0.003, progress=False
    )
    corpus, ids, columns = rows_of(tmp_path / "out")
    assert [length for length, _, _ in corpus.bins] == [10, 20, 32]
    lengths = (ids != PAD).sum(axis=1)
    documents = [len(document) + 2 for document in corpus_documents_of(folder)]
    for (length, start, stop), shorter in zip(corpus.bins, (0, 10, 20), strict=True):
        here, ends = lengths[start:stop], columns["document_end"][start:stop]
        assert here.max() <= length
        if length < 32:
            assert sorted(here.tolist()) == sorted(n for n in documents if shorter < n <= length)
            assert ends.all()
        with pytest.raises(ValueError, match="has no column 'pair_label'"):
            corpus.take_column("pair_label", np.arange(1))
    assert (columns["document_end"]).sum() == manifest.documents == len(documents)
    assert (
        manifest.tokens
        == lengths.sum()
        == sum(shard_ids[shard_ids != PAD].size for shard_ids in map(corpus.input_ids, range(len(manifest.shards))))
    )
    # On disk, rows have the length of their bin.
    assert {s.length for s in manifest.shards} == {10, 20, None}
    assert "documents        " in describe(tmp_path / "out")


def corpus_documents_of(folder: Path) -> list[list[int]]:
    manifest = read_tokens(folder / "tokens")
    found = []
    for i in range(len(manifest.shards)):
        reader = SideReader(folder / "tokens", manifest, i, "train")
        stream = reader.ids(0, reader.length).tolist()
        starts = [0, *(reader.ends[:-1] + 1).tolist()]
        found += [stream[a:b] for a, b in zip(starts, reader.ends.tolist(), strict=True)]
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "pages"}, "packing 'pages': must be one of"),
        ({"bins": (8,)}, "only packing documents uses them"),
        ({"packing": "documents", "bins": (12, 10)}, "bins .12, 10.: must be ascending"),
        ({"packing": "documents", "bins": (16,)}, "below the sequence length"),
        ({"packing": "nsp", "pair_probability": 1.0}, "pair probability 1.0: must be above 0 and below 1"),
        ({"pair_probability": 0.3}, "pair probability 0.3: must be omitted: only packings nsp and sop use it"),
        ({"weights": {"x": 2.0}}, "weight of 'x': unknown source, .* has none with a name"),
        ({"weights": {"": -1.0}}, "weight of '' -1.0: must be above 0"),
    ],
)
def test_bad_pack_arguments(folder: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        pack(folder / "tokens", 16, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_incomplete_token_shards(folder: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", make_documents(20))
    tokens = tmp_path / "tokens"
    manifest = tokenize([tmp_path / "a.txt"], folder / "tok", tokens, **SIZES)
    verify_tokens(tokens, manifest)
    build([tmp_path / "a.txt"], folder / "tok", 16, tmp_path / "corpus", progress=False)
    with pytest.raises(CorpusError, match="not a manifest of token shards"):
        pack(tmp_path / "corpus", 16, tmp_path / "out", progress=False)
    path = tokens / "tokens-00000.train.ids"
    data = path.read_bytes()
    path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    with pytest.raises(CorpusError, match=r"tokens-00000\.train\.ids: sha256 .* expected"):
        verify_tokens(tokens, manifest)
    path.write_bytes(data[:-2])
    with pytest.raises(CorpusError, match=rf"{len(data):,} bytes expected, {len(data) - 2:,} found"):
        pack(tokens, 16, tmp_path / "out", progress=False)
    # As if the file were truncated while it is read.
    reader = SideReader(tokens, manifest, 0, "train")
    with pytest.raises(CorpusError, match=rf"train\.ids: ends after {len(data) - 2:,} bytes. Tokenise"):
        reader.ids(0, reader.length)
    (tokens / "manifest.json").unlink()
    with pytest.raises(CorpusError, match="Run the command tokenize"):
        pack(tokens, 16, tmp_path / "out", progress=False)


def test_packings_preserve_token_counts(folder: Path, tmp_path: Path) -> None:
    """All packings contain the same tokens."""
    expected = Counter(token for document in corpus_documents_of(folder) for token in document)
    for packing in ("full_sequences", "documents"):
        pack(folder / "tokens", 16, tmp_path / packing, packing=packing, progress=False)
        assert Counter(t for d in corpus_documents(tmp_path / packing) for t in d) == expected


def test_inspect_and_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "a.txt", ["the of quux. And to", "that is", "on it"])
    options = ["--tokenizer", folder / "tok", "--sequence-length", 32, "--packing", "documents"]
    options += ["--columns", "word_start", "sentence_start", "--output", tmp_path / "out"]
    assert main([str(x) for x in ["build", "--input", tmp_path / "a.txt", *options]]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--rows", "1"]) == 0
    facts, tokens = capsys.readouterr().out.splitlines()
    assert facts == "row 0, 11 of 32 tokens, ends a document"
    assert tokens.strip() == ("[CLS] ¶·the ·of ·q ##u ##u ##x ·. ¶·and ·to [SEP]")
    assert main(["inspect", str(tmp_path / "out"), "--first", "99"]) == 1
    assert "rows 99 to 103" in capsys.readouterr().err
    for option, value, least in (("--rows", "0", 1), ("--rows", "-3", 1), ("--first", "-1", 0)):
        assert main(["inspect", str(tmp_path / "out"), option, value]) == 1
        assert capsys.readouterr().err == f"error: {option} {value}: must be at least {least}\n"
    picture = tmp_path / "stats.png"
    assert main(["stats", str(tmp_path / "out"), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["verify", str(folder / "tokens")]) == 0
    assert "token shards checked" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "out"), "--top", "-3"]) == 1
    assert "--top -3: must be at least 0" in capsys.readouterr().err
    assert main(["stats", str(folder / "tokens")]) == 1
    assert "describes token shards, not a corpus" in capsys.readouterr().err


def test_a_plot_that_cannot_be_written_is_refused_before_the_scan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(folder / "tokens", 16, tmp_path / "out", progress=False)
    monkeypatch.setattr("data_pipeline.reports.describe.scan", None)
    stats = ["stats", str(tmp_path / "out"), "--png"]
    for png, message in ((tmp_path, "is a folder. Give"), (tmp_path / "no/a.png", f"there is no folder {tmp_path}/no")):
        assert main([*stats, str(png)]) == 1
        assert f"error: --png {png}: {message}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*stats, str(tmp_path / "a.png")]) == 1
    assert "--png: requires the package matplotlib" in capsys.readouterr().err
