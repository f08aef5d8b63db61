"""Word cache, and planes of word and sentence starts, compared with the tokenizer."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from data_pipeline.sources.sentences import TAIL, sentence_starts
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from data_pipeline.tokenization.word_cache import WordCache, why_not_word_wise
from tests.support.documents import write_tokenizer

SIGNS = "ab é漢字Σςİı\u0301\u0345 \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2028\u200b\u200d\u3000.,'-!?😀한\u1100\u1161ﬁ½"
VOCABULARY = ["[UNK]", *"abcdefgimnorst漢字σς.,'-!?é", *(f"##{c}" for c in "abcdefgimnorstσς漢字.,'-!?é"), "ab", "##ba"]


def bert(**options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def steps(normalizer: list[object], pre_tokenizer: list[object]) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = bert()
        tokenizer.normalizer = normalizers.Sequence(normalizer)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
        return tokenizer

    return make


WORD_WISE = {
    "bert": bert,
    "cased": lambda: bert(lowercase=False, strip_accents=False),
    "raw": lambda: bert(clean_text=False, handle_chinese_chars=False),
    "nfkc": steps([normalizers.NFKC(), normalizers.Lowercase()], [pre_tokenizers.Whitespace()]),
    "nfd": steps(
        [normalizers.NFD(), normalizers.StripAccents()],
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits()],
    ),
}


def check(tokenizer: Tokenizer, cache: WordCache, texts: list[str]) -> None:
    ids, counts, starts = cache.encode(texts, True)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == [e.ids for e in encodings]
    words = [w for e in encodings for w in (np.diff([-1, *e.word_ids]) != 0).tolist()]
    assert starts is not None
    assert starts.tolist() == words


@pytest.mark.parametrize("name", WORD_WISE)
@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(
        st.one_of(st.text(st.sampled_from(SIGNS), max_size=40), st.text(max_size=40)), min_size=1, max_size=5
    )
)
def test_cache_matches_tokenizer(name: str, texts: list[str]) -> None:
    tokenizer = WORD_WISE[name]()
    assert why_not_word_wise(tokenizer) is None
    cache = WordCache(tokenizer, np.dtype(np.uint16))
    check(tokenizer, cache, texts)
    check(tokenizer, cache, texts[::-1])


@pytest.mark.parametrize("name", WORD_WISE)
def test_every_code_point_between_two_words(name: str) -> None:
    tokenizer = WORD_WISE[name]()
    # All separators, control characters and combining marks, and a sample of the others.
    signs = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc")
    points = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in signs or ord(c) % 211 == 0]
    points = [c for c in points if not 0xD800 <= ord(c) < 0xE000]
    cache = WordCache(tokenizer, np.dtype(np.uint16))
    texts = ["".join(f"a{c}b {c}a\n" for c in points[j : j + 10]) for j in range(0, len(points), 10)]
    ids, counts, _ = cache.encode(texts, False)
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert counts.tolist() == [len(e.ids) for e in expected]
    assert ids.tolist() == [i for e in expected for i in e.ids]


def test_cleared_cache_stays_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tokenization.word_cache._ENTRIES", 3)
    tokenizer = bert()
    cache = WordCache(tokenizer, np.dtype(np.uint32))
    for i in range(20):
        check(tokenizer, cache, [f"ab {'ba' * i} is {i}", "", "  "])


def byte_level() -> Tokenizer:
    tokenizer = bert()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


def added() -> Tokenizer:
    tokenizer = bert()
    tokenizer.add_tokens([AddedToken("a b", normalized=False)])
    return tokenizer


def replaced() -> Tokenizer:
    tokenizer = bert()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a b", "c"), normalizers.NFC()])
    return tokenizer


def dropout() -> Tokenizer:
    tokenizer = bert()
    tokenizer.model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (byte_level, "pre-tokenizer ByteLevel"),
        (added, "added token 'a b' is not special"),
        (replaced, "normalizer Replace"),
        (dropout, "BPE dropout"),
        (lambda: Tokenizer(models.WordLevel({"a": 0})), "pre-tokenizer none"),
    ],
)
def test_why_not_word_wise(make: Callable[[], Tokenizer], reason: str) -> None:
    assert why_not_word_wise(make()) == reason


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("One. Two! three? Four", "punctuation", ["One. ", "Two! three? ", "Four"]),
        ('He said "No." Then left, e.g. home.', "punctuation", ['He said "No." ', "Then left, e.g. home."]),
        ("漢字。かな！?", "punctuation", ["漢字。", "かな！?"]),
        ("Title\n \nbody of\ntext", "punctuation", ["Title\n \n", "body of\ntext"]),
        ("one. Two\ntwo\n\n three", "line", ["one. Two\n", "two\n\n ", "three"]),
        ("Version 2.5 of it", "punctuation", ["Version 2.5 of it"]),
    ],
)
def test_sentences(text: str, mode: str, expected: list[str]) -> None:
    starts = sentence_starts(text, mode, "")
    assert [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)] == expected
    # Cutting a long document at white space does not change its sentence starts.
    for cut in (i for i, sign in enumerate(text) if sign.isspace() and i):
        parts = sentence_starts(text[:cut], mode, "")
        parts += [cut + at for at in sentence_starts(text[cut:], mode, text[:cut][-TAIL:])]
        assert parts == starts, cut


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("cache")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return Encoder(folder / "tok")


@pytest.mark.parametrize("name", [None, *WORD_WISE])
@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab. !?。\n\x0b\x1c漢é,T'"), max_size=60), min_size=1, max_size=4),
    mode=st.sampled_from(["punctuation", "line"]),
)
def test_planes_do_not_depend_on_cache(encoder: Encoder, name: str | None, texts: list[str], mode: str) -> None:
    if name is not None:
        encoder = copy.copy(encoder)
        encoder.tokenizer = WORD_WISE[name]()
        encoder.word_cache, encoder._reserved = WordCache(encoder.tokenizer, encoder.dtype), np.zeros(100, np.bool_)
    texts = [text.strip() for text in texts]  # as the readers do
    cuts = [sentence_starts(text, mode, "") for text in texts]
    ids, counts, planes = encoder.encode_planes(texts, cuts, True)
    cache, encoder.word_cache = encoder.word_cache, None
    try:
        other, other_counts, other_planes = encoder.encode_planes(texts, cuts, True)
    finally:
        encoder.word_cache = cache
    assert ids.tolist() == other.tolist()
    assert counts.tolist() == other_counts.tolist()
    for name in ("word_start", "sentence_start"):
        assert planes[name].tolist() == other_planes[name].tolist(), name
