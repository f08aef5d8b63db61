"""Sentence pair rows, compared with the sentences of the documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import pack, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.packing import pairs as pairs_module
from data_pipeline.reports.scan import verify
from data_pipeline.shards import Manifest
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from tests.support.documents import CLS, PAD, SEP, rows_of, write_text, write_tokenizer

PAIR_LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder / "tok"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, list[list[list[int]]]]:
    """Token shards of 1,500 documents with distinct sentences, and the ids of these (document, sentence, id)."""
    path = tmp_path_factory.mktemp("sentences")
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [
        [
            f"{letters[i % 26]} {letters[i // 26 % 26]} {letters[i // 676]} {n} "
            + "of " * int(rng.integers(0, 9))
            + "."
            for n in range(int(rng.integers(1, 40)))
        ]
        for i in range(1500)
    ]
    write_text(path / "a.txt", ["\n".join(sentences) for sentences in texts])
    (path / "c.yaml").write_text("sources: [{name: a, inputs: [a.txt]}]\nsentences: line\n")
    tokenize(None, tokenizer, path / "tokens", description=path / "c.yaml", work_size=0.05, progress=False)
    words = Encoder(tokenizer).tokenizer
    return path, [[words.encode(s, add_special_tokens=False).ids for s in document] for document in texts]


def find_pairs(
    path: Path, packing: str, probability: float
) -> tuple[Manifest, list[tuple[list[int], list[int], bool]]]:
    manifest = pack(
        path / "tokens", PAIR_LENGTH, path / f"{packing}{probability}", packing=packing,
        pair_probability=probability, shard_size=0.05, progress=False,
    )  # fmt: skip
    return manifest, read_pairs(path / f"{packing}{probability}")


def read_pairs(path: Path) -> list[tuple[list[int], list[int], bool]]:
    verify(path)
    _, ids, columns = rows_of(path)
    pairs = []
    for row, start, label in zip(
        ids.tolist(), columns["segment_start"].tolist(), columns["pair_label"].tolist(), strict=True
    ):
        used = PAIR_LENGTH - row.count(PAD)
        assert (row[0], row[start - 1], row[used - 1]) == (CLS, SEP, SEP)
        pairs.append((row[1 : start - 1], row[start : used - 1], label))
    return pairs


@pytest.mark.parametrize(("packing", "probability"), [("sop", 0.5), ("nsp", 0.5), ("nsp", 0.2)])
def test_pairs(sentences: tuple[Path, list[list[list[int]]]], packing: str, probability: float) -> None:
    path, documents = sentences
    manifest, pairs = find_pairs(path, packing, probability)
    labels = [label for _, _, label in pairs]
    assert len(labels) > 8_000
    assert abs(np.mean(labels) - probability) < 0.01
    assert manifest.labelled == sum(labels)
    # Possible cuts of each document: sentences, and pieces of them of at most half a row.
    longest = (PAIR_LENGTH - 3) // 2
    streams = [[token for sentence in document for token in sentence] for document in documents]
    cuts = []
    for document in documents:
        bounds = [0]
        for sentence in document:
            begin = bounds[-1]
            bounds += [begin + min(i + longest, len(sentence)) for i in range(0, len(sentence), longest)]
        cuts.append(bounds)
    document = position = used = 0
    for one, two, label in pairs:
        first, second = (two, one) if label and packing == "sop" else (one, two)
        # Rows are in text order: the next document starts when this one has no pairs left.
        while streams[document][position : position + len(first)] != first or position + len(first) > len(
            streams[document]
        ):
            assert cuts[document].index(position) >= len(cuts[document]) - 2, "only the last sentence may be unused"
            document, position = document + 1, 0
        assert position in cuts[document]
        assert position + len(first) in cuts[document]
        if label and packing == "nsp":
            position += len(first)
            used += len(first)
            continue
        assert streams[document][position + len(first) : position + len(first) + len(second)] == second
        position += len(first) + len(second)
        used += len(first) + len(second)
        assert position in cuts[document]
    assert manifest.unused == sum(map(len, streams)) - used
    assert all(len(one) + len(two) + 3 <= PAIR_LENGTH and one and two for one, two, _ in pairs)
    if packing == "nsp":
        by_name = {tuple(s[:3]): i for i, s in enumerate(streams)}
        strangers = [(one, two) for one, two, label in pairs if label]
        # Second segments come from many other documents; if one starts with a name, it is that of another document.
        named = [(by_name.get(tuple(one[:3])), by_name.get(tuple(two[:3]))) for one, two in strangers]
        known = [(a, b) for a, b in named if a is not None and b is not None]
        assert len(known) > 50
        assert all(a != b for a, b in known)
        assert len({b for _, b in known}) > 40


def test_planes_belong_to_the_ids(sentences: tuple[Path, list[list[list[int]]]], tmp_path: Path) -> None:
    """For segments that start with a sentence, whose first five ids are unique."""
    path, documents = sentences
    options = {"packing": "nsp", "columns": ("sentence_start",), "progress": False}
    pack(path / "tokens", PAIR_LENGTH, tmp_path / "out", **options)
    _, ids, columns = rows_of(tmp_path / "out")
    behind = {
        tuple(document[i][:5]): [place == 0 for sentence in document[i:] for place in range(len(sentence))]
        for document in documents
        for i in range(len(document))
    }
    assert len(behind) == sum(map(len, documents))
    checked = {"own": 0, "random": 0}
    for row, start, label, bits in zip(
        ids.tolist(),
        columns["segment_start"].tolist(),
        columns["pair_label"].tolist(),
        columns["sentence_start"].tolist(),
        strict=True,
    ):
        for first, stop in ((1, start - 1), (start, PAIR_LENGTH - row.count(PAD) - 1)):
            if expected := behind.get(tuple(row[first : first + 5])):
                assert bits[first:stop] == expected[: stop - first]
                checked["random" if label and first == start else "own"] += 1
        assert not bits[0]
        assert not bits[start - 1]
    assert min(checked.values()) > 1000, checked


def test_random_segments_come_from_the_neighbourhood(
    sentences: tuple[Path, list[list[list[int]]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, 1,500 documents are one neighbourhood; here there are 93 of 16, and the last also has the last 12."""
    path, documents = sentences
    monkeypatch.setattr("data_pipeline.packing.pairs.NEIGHBOURS", 16)
    pack(path / "tokens", PAIR_LENGTH, tmp_path / "out", packing="nsp", progress=False)
    pairs = read_pairs(tmp_path / "out")
    by_name = {tuple(document[0][:3]): i for i, document in enumerate(documents)}
    named = [(by_name.get(tuple(one[:3])), by_name.get(tuple(two[:3]))) for one, two, label in pairs if label]
    known = [(a, b) for a, b in named if a is not None and b is not None]
    assert len(known) > 50
    assert all(a != b and min(a // 16, 92) == min(b // 16, 92) for a, b in known)


@given(number=st.integers(0, 299), row=st.integers(0, 3), total=st.integers(2, 300), seed=st.integers(0, 2**64 - 1))
def test_random_document_is_another_of_the_neighbourhood(number: int, row: int, total: int, seed: int) -> None:
    number %= total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "NEIGHBOURS", 32)
        found = pairs_module.random_document(number, row, total, seed)
    blocks = [range(first, first + 32) for first in range(0, total - 31, 32)] or [range(total)]
    blocks[-1] = range(blocks[-1].start, total)
    assert found != number
    assert any(number in block and found in block for block in blocks)


@pytest.mark.parametrize("sentences", [2, 3, 5])
def test_the_second_segment_starts_at_any_sentence_but_the_first(sentences: int) -> None:
    bounds = [3 * i for i in range(sentences + 1)]
    middles = []
    for number in range(4000):
        options = pairs_module.PairOptions("sop", 0.5, 64, seed=1)
        [(start, middle, stop, _)], unused = pairs_module.document_pairs(bounds, number, options)
        assert (start, stop, unused) == (0, bounds[-1], 0)
        middles.append(middle // 3)
    counts = np.bincount(middles, minlength=sentences)
    assert counts[0] == 0
    expected = 4000 / (sentences - 1)
    assert abs(counts[1:] - expected).max() < 6 * expected**0.5


@pytest.mark.parametrize("weight", [3.0, 2.5])
def test_random_segments_of_no_copy(tokenizer: Path, tmp_path: Path, weight: float) -> None:
    """Six documents, each several times in the stream: 2 of the 17 others are copies, if they may be drawn."""
    texts = ["\n".join(f"{name} {n} ." for n in range(40)) for name in "abcdef"]
    write_text(tmp_path / "a.txt", texts)
    (tmp_path / "c.yaml").write_text("sources: [{name: a, inputs: [a.txt]}]\nsentences: line\n")
    tokenize(None, tokenizer, tmp_path / "tokens", description=tmp_path / "c.yaml", progress=False)
    options = {"packing": "nsp", "weights": {"a": weight}, "progress": False}
    pack(tmp_path / "tokens", PAIR_LENGTH, tmp_path / "out", **options)
    words = Encoder(tokenizer).tokenizer
    names = {words.token_to_id(name): name for name in "abcdef"}
    pairs = [
        (*({names[i] for i in part if i in names} for part in pair[:2]), pair[2])
        for pair in read_pairs(tmp_path / "out")
    ]
    assert all(len(one) == len(two) == 1 for one, two, _ in pairs)
    assert sum(label for *_, label in pairs) > 50
    assert all((one != two) == label for one, two, label in pairs)


def test_only_copies(tokenizer: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ["a .\nb .\nc ."])
    (tmp_path / "c.yaml").write_text("sources: [{name: a, inputs: [a.txt], weight: 9}]\nsentences: line\n")
    tokenize(None, tokenizer, tmp_path / "tokens", description=tmp_path / "c.yaml", progress=False)
    with pytest.raises(CorpusError, match=r"packing nsp: 100 documents drawn for document .* were all copies of it"):
        pack(tmp_path / "tokens", PAIR_LENGTH, tmp_path / "out", packing="nsp", pair_probability=0.9, progress=False)


def test_random_documents_are_uniform() -> None:
    counts = np.bincount([pairs_module.random_document(3, row, 11, 5) for row in range(10_000)], minlength=11)
    assert counts[3] == 0
    # Expectation 1,000 each, standard deviation 30.
    assert abs(np.delete(counts, 3) - 1000).max() < 150


@given(
    sentences=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5),
    longest=st.integers(1, 10),
    marked=st.booleans(),
)
def test_cuts_are_sentences_and_pieces_of_them(sentences: list[list[int]], longest: int, marked: bool) -> None:
    """marked: whether the first sentence of a document is marked as a sentence start."""
    marks, starts, ends, expected = [], [], [], []
    for document in sentences:
        starts.append(len(marks))
        for i, size in enumerate(document):
            expected += range(len(marks), len(marks) + size, longest)
            marks += [marked or i > 0, *[False] * (size - 1)]
        ends.append(len(marks))
        marks.append(False)
    found = pairs_module.sentence_cuts(np.array(marks), np.array(starts), np.array(ends), longest)
    assert found.tolist() == expected


def test_pairs_need_sentences(tokenizer: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ["one", "two"])
    tokenize([tmp_path / "a.txt"], tokenizer, tmp_path / "tokens", progress=False)
    with pytest.raises(CorpusError, match="gives no rows for side train: no document has two sentences"):
        pack(tmp_path / "tokens", 16, tmp_path / "out", packing="sop", progress=False)
    write_text(tmp_path / "b.txt", ["only one document"])
    tokenize([tmp_path / "b.txt"], tokenizer, tmp_path / "single", progress=False)
    with pytest.raises(CorpusError, match="nsp needs at least two documents, side train has 1"):
        pack(tmp_path / "single", 16, tmp_path / "out2", packing="nsp", progress=False)
