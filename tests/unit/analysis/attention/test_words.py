"""Listed words in rows of ids: against words of the text, for WordPiece and byte-level BPE, split into pieces."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from maskvr_ds.analysis.attention.words import WordFinder, WordList, read_word_list
from maskvr_ds.config import ConfigError

TEXT = "The cats never sleep, and the cat's never-ending song (sung nightly) is NEVER over; neverland is not."
SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
LISTS = (
    WordList("nouns", frozenset({"cats", "cat", "song", "sep"})),
    WordList("negation", frozenset({"never", "not", "no"})),
)


def corpus_of(folder: Path, kind: str) -> tuple[Any, Tokenizer]:
    """A corpus as far as `WordFinder` reads it; its tokenizer splits most words into pieces."""
    trainer: Any
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=275, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = SimpleNamespace(all=tuple(tokenizer.token_to_id(name) for name in SPECIAL))
    manifest = SimpleNamespace(vocab_size=tokenizer.get_vocab_size(), special_tokens=special)
    return SimpleNamespace(tokenizer_folder=folder, manifest=manifest), tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "byte-bpe"])
def test_positions_are_those_of_the_words_in_the_text(tmp_path: Path, kind: str) -> None:
    corpus, tokenizer = corpus_of(tmp_path, kind)
    encoding = tokenizer.encode(TEXT)
    ids = np.array([0, *encoding.ids, 1, *tokenizer.encode("never").ids, 1, 2])
    found = WordFinder(corpus, LISTS).columns(ids)
    # Characters of TEXT at which a listed word begins. A byte-level "word" is what stands between spaces.
    words = {
        "wordpiece": {"nouns": ("cats never", "cat's", "song"), "negation": ("never sleep", "never-", "NEVER", "not.")},
        "byte-bpe": {"nouns": ("cats never", "song"), "negation": ("never sleep", "NEVER", "not.")},
    }[kind]
    lengths = {"cats never": 4, "cat's": 3, "song": 4, "never sleep": 5, "never-": 5, "NEVER": 5, "not.": 3}
    for name, places in words.items():
        inside = np.zeros(len(TEXT), bool)
        for place in places:
            start = TEXT.index(place)
            # The space before a word is part of it in a byte-level vocabulary, and sometimes a token of its own.
            inside[start - (kind == "byte-bpe") : start + lengths[place]] = True
        offsets = encoding.offsets
        expected = [any(inside[start:end]) for start, end in offsets]
        if kind == "byte-bpe":  # with the full stop of "not.", which is part of what stands between spaces
            expected = [
                e or (name == "negation" and TEXT[s:e2] == ".") for e, (s, e2) in zip(expected, offsets, strict=True)
            ]
        assert found[name][1 : 1 + len(offsets)].tolist() == expected, name
    # A word at the start of a row or after [SEP] is one although a byte-level tokenizer does not mark it.
    tail = len(encoding.ids) + 2
    assert found["negation"][tail:-2].all()
    assert not found["negation"][[0, tail - 1, -2, -1]].any()
    assert not found["nouns"][tail - 1 :].any()  # [SEP] is not the word "sep"


def test_files_of_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Not\n\n never \nNEVER\n", encoding="utf-8")
    assert read_word_list(f"negation={path}") == WordList("negation", frozenset({"not", "never"}))
    for text, said in (
        (str(path), "expected NAME=FILE"),
        ("x=/nowhere", "cannot be read"),
        ("=x", "expected NAME=FILE"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_word_list(text)
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no words"):
        read_word_list(f"x={path}")
    path.write_text("not at all\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'not at all' is more than one word"):
        read_word_list(f"x={path}")


def test_a_tokenizer_that_marks_no_words(tmp_path: Path) -> None:
    corpus, tokenizer = corpus_of(tmp_path, "wordpiece")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"must mark where words start; omit --words .*cannot determine word starts"):
        WordFinder(corpus, LISTS)
