"""Document rules: cleaning, filters, duplicates and contamination, with counts by reason."""

from __future__ import annotations

import gzip
import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.files import CorpusError
from data_pipeline.filters.minhash import Signature, exact_duplicates, near_duplicates
from data_pipeline.filters.ngrams import WordHashes, ngram_hashes, task_ngrams
from data_pipeline.filters.rules import DocumentFilter, DocumentRules, clean, quality_fault


def rules(**values: object) -> DocumentRules:
    return DocumentRules.model_validate(values)


def apply(documents: Sequence[str], found: DocumentRules) -> tuple[list[str], dict[str, int]]:
    rule_filter = DocumentFilter(found, False, None)
    return rule_filter(documents, [True] * len(documents)).texts, dict(rule_filter.dropped)


@given(st.text())
def test_cleaning_invariants(text: str) -> None:
    found, _ = clean(text, rules(normalize="nfc", control_characters="remove"))
    assert unicodedata.is_normalized("NFC", found)
    assert not [c for c in found if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    kept = [c for c in unicodedata.normalize("NFC", text) if not unicodedata.category(c).startswith(("C", "Z"))]
    # Removing a control character may allow marks to compose.
    assert unicodedata.normalize(
        "NFC", "".join(c for c in found if not c.isspace() and unicodedata.category(c)[0] not in "CZ")
    ) == (unicodedata.normalize("NFC", "".join(kept)))
    assert clean(text, DocumentRules()) == (text, False)


@pytest.mark.parametrize(("policy", "expected"), [("replace", ["a\ufffdb", "good"]), ("skip", ["good"])])
def test_bad_bytes(policy: str, expected: list[str]) -> None:
    found = DocumentFilter(rules(bad_bytes=policy), False, None)
    assert found(["a\udcff\udcfeb", "good"], [True, True]).texts == expected
    assert (found.replaced, dict(found.dropped)) == ((1, {}) if policy == "replace" else (0, {"bad_bytes": 1}))


def test_bad_bytes_late_in_a_long_document() -> None:
    found = DocumentFilter(rules(bad_bytes="skip"), True, None)
    filtered = found(["begins", "goes on", "ends \udcff", "next"], [False, False, True, True])
    assert filtered.late == ["bad_bytes", None]
    assert filtered.ends == [False, False, True, True]
    assert dict(found.dropped) == {"bad_bytes": 1}
    # Dropped at its first piece: no piece is passed on, whatever the batches.
    found = DocumentFilter(rules(bad_bytes="skip"), False, None)
    assert found(["\udcff begins"], [False]).texts == []
    assert found(["ends", "next"], [True, True]).texts == ["next"]


@pytest.mark.parametrize(
    ("found", "good", "bad", "reason"),
    [
        (rules(min_characters=3), "abc", "ab", "too_short"),
        (rules(max_characters=3), "abc", "abcd", "too_long"),
        (rules(min_letters=0.5), "ab !?", "a !?", "few_letters"),
        (rules(min_letters=0.9), "नमस्ते दुनिया", "नम ।।।।", "few_letters"),
        (rules(max_digits=0.4), "abc 12", "abc 123", "many_digits"),
        (rules(max_digits=0.4), "漢字四", "漢字٣٤٥", "many_digits"),
        (rules(max_repeated_lines=0.3), "one\ntwo\none", "one\none\none", "repeated_lines"),
    ],
)
def test_quality(found: DocumentRules, good: str, bad: str, reason: str) -> None:
    if "repeated" in reason:
        good = "one\ntwo and more\none"
    assert apply([good, bad, good], found) == ([good, good], {reason: 1})
    assert quality_fault(bad, found) == reason


def reference_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@given(
    st.lists(st.sampled_from("aábc"), max_size=30), st.lists(st.sampled_from("aábc"), max_size=30), st.integers(1, 6)
)
def test_equal_ngrams_have_equal_words(one: list[str], two: list[str], n: int) -> None:
    words = WordHashes()
    ours = set(ngram_hashes(words(" ".join(one)), n).tolist()) & set(ngram_hashes(words(" ".join(two)), n).tolist())
    assert len(ours) == len(reference_ngrams(" ".join(one), n) & reference_ngrams(" ".join(two), n))


def test_characters_are_words_in_scripts_without_spaces() -> None:
    words = WordHashes()
    assert len(words("漢字かな、한국어 text")) == 6
    assert words("Straße,strasse")[0] == words("STRASSE")[0] == words("strasse")[0]


def test_decontamination_reads_all_task_file_types(tmp_path: Path) -> None:
    texts = [f"{name} one two three four five" for name in ("txt", "tsv", "csv", "json", "jsonl", "parquet")]
    (tmp_path / "a.txt").write_text(texts[0] + "\nshort one\n")
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(f"id\t{texts[1]}\tlabel\n".encode()))
    (tmp_path / "a.csv").write_text(f'1,"{texts[2]}",x\n')
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": texts[3]}]}]}))
    (tmp_path / "a.jsonl").write_text(json.dumps({"sentence1": texts[4], "label": 1}) + "\n")
    pq.write_table(pa.table({"label": [1], "question": [texts[5]]}), tmp_path / "a.parquet")
    found = task_ngrams(sorted(tmp_path.iterdir()), 6)
    assert len(found) == 6
    checked = DocumentFilter(rules(decontaminate=("x",), decontaminate_words=6), False, found)
    documents = [f"before, {text.upper()}! after" for text in texts] + ["one two three four five six"]
    assert checked(documents, [True] * 7).texts == documents[-1:]
    assert dict(checked.dropped) == {"contaminated": 6}
    with pytest.raises(CorpusError, match=r"a\.txt: no text has 60 words"):
        task_ngrams([tmp_path / "a.txt"], 60)
    with pytest.raises(CorpusError, match=r"b\.txt: decontamination needs an existing file"):
        task_ngrams([tmp_path / "b.txt"], 6)


def test_decontamination_reads_columns_of_all_types_and_long_cells(tmp_path: Path) -> None:
    texts = [f"{number} one two three four five" for number in range(6)]
    columns = {
        "plain": pa.array(texts[:1]),
        "categories": pa.array(texts[1:2]).dictionary_encode(),
        "view": pa.array(texts[2:3], pa.string_view()),
        "list": pa.array([[{"answer": texts[3], "start": 1}]]),
        "map": pa.array([[("key", texts[4])]], pa.map_(pa.string(), pa.string())),
        "numbers": pa.array([[1.5, 2.5]]),
        "nothing": pa.array([None], pa.large_string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(f"{'x ' * 70_000},{texts[5]}\n")
    found = task_ngrams(sorted(tmp_path.iterdir()), 6)
    hashes = WordHashes()
    expected = [int(ngram_hashes(hashes(text), 6)[0]) for text in [*texts, "x " * 6]]
    assert found.tolist() == sorted(expected)


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=30))
def test_exact_duplicates(documents: list[str]) -> None:
    filtered = DocumentFilter(rules(duplicates="exact"), True, None)(documents, [True] * len(documents))
    digests = np.frombuffer(b"".join(filtered.digests), np.uint8).reshape(-1, 16)
    assert exact_duplicates(digests).tolist() == [d in documents[:i] for i, d in enumerate(documents)]


def planted(pairs: int, shared: float, seed: int, words: int = 400) -> list[str]:
    """2 · pairs documents. Those of a pair share their first words, such that the Jaccard similarity of 1-shingles is
    about `shared`: of n words each, a are common, J = a / (2 n − a)."""
    rng = random.Random(seed)
    common = round(2 * shared * words / (1 + shared))
    documents = []
    for _ in range(pairs):
        base = [f"w{rng.getrandbits(40)}" for _ in range(common)]
        documents += [" ".join([*base, *(f"w{rng.getrandbits(40)}" for _ in range(words - common))]) for _ in range(2)]
    return documents


def jaccard(one: str, two: str, n: int) -> float:
    a, b = reference_ngrams(one, n), reference_ngrams(two, n)
    return len(a & b) / len(a | b)


def signatures(documents: Sequence[str], shingle: int) -> np.ndarray:
    hashes, signature = WordHashes(), Signature(shingle)
    out = []
    for document in documents:
        signature.reset()
        signature.add(hashes(document))
        out.append(signature.end())
    return np.array(out)


def test_planted_near_duplicates() -> None:
    """Recall of at least 0.95 at Jaccard 0.8, no false positive below 0.5, with exactly computed similarities."""
    pairs = 400
    for shingle, asked in ((1, 0.8), (5, 0.81), (1, 0.49), (5, 0.49), (1, 0.2)):
        documents = planted(pairs, asked, seed=shingle)
        found = [jaccard(a, b, shingle) for a, b in zip(documents[::2], documents[1::2], strict=True)]
        assert all(0.79 < j < 0.82 if asked >= 0.8 else j < 0.5 for j in found), (min(found), max(found))
        marked = near_duplicates([signatures(documents, shingle)], np.ones(len(documents), np.bool_), 0.8)
        assert not marked[::2].any()
        if asked >= 0.8:
            assert marked[1::2].mean() >= 0.95
        else:
            assert not marked.any()


def test_dropped_documents_resemble_kept_ones() -> None:
    """A chain in which each document resembles the previous one, but not the first: not all of them are dropped."""
    words = [f"w{i}" for i in range(1000)]
    documents = [" ".join(words[40 * i : 40 * i + 400]) for i in range(12)]
    parts = signatures(documents, 1)
    usable = np.ones(12, np.bool_)
    marked = near_duplicates([parts], usable, 0.8)
    assert marked.any()
    kept = [d for d, m in zip(documents, marked.tolist(), strict=True) if not m]
    for document, dropped in zip(documents, marked.tolist(), strict=True):
        if dropped:
            assert max(jaccard(document, other, 1) for other in kept) > 0.6
    assert len(kept) >= 3
    # The partition has no effect; documents dropped already are neither compared nor marked.
    assert (near_duplicates([parts[:5], parts[5:6], parts[6:]], usable, 0.8) == marked).all()
    usable[0] = False
    assert not near_duplicates([parts], usable, 0.8)[:2].any()


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), st.integers(1, 6), st.data())
def test_signature_does_not_depend_on_pieces(words: list[str], shingle: int, data: st.DataObject) -> None:
    hashes = WordHashes()
    cut = data.draw(st.integers(0, len(words)))
    signature = Signature(shingle)
    signature.add(hashes(" ".join(words[:cut])))
    signature.add(hashes(" ".join(words[cut:])))
    assert (signature.end() == signatures([" ".join(words)], shingle)[0]).all()


def test_documents_without_words_are_no_duplicates() -> None:
    found = signatures(["!!!", "???", ""], 5)
    assert not near_duplicates([found], np.ones(3, np.bool_), 0.8).any()
    assert near_duplicates([signatures(["one two", "One, two!"], 5)], np.ones(2, np.bool_), 0.8).tolist() == [
        False,
        True,
    ]


def test_contradictory_rules() -> None:
    with pytest.raises(ValueError, match="max_characters 3 is below min_characters 5"):
        rules(min_characters=5, max_characters=3)


def test_contamination_across_the_pieces_of_a_long_document() -> None:
    task = " ".join(f"word{i}" for i in range(14))
    grams = np.unique(ngram_hashes(WordHashes()(task), 13))
    checked = DocumentFilter(rules(decontaminate=("x",)), False, grams)
    filtered = checked([f"some text {task[:35]}", task[35:]], [False, True])
    assert filtered.late == ["contaminated"]
    # Words of one document do not continue in the next.
    parts = ["word0", " ".join(f"word{i}" for i in range(1, 13))]
    assert checked(parts, [True, True]).late == [None, None]
    assert dict(checked.dropped) == {"contaminated": 1}
