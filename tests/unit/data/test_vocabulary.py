"""Word starts for every kind of tokenizer.json; token counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline.shards import Corpus
from maskvr_ds.data.vocabulary import frequency_scores, token_counts, word_starts
from tests.support.corpora import make_corpus


def starts(folder: Path, tokenizer: Tokenizer, *pieces: str) -> list[bool]:
    tokenizer.save(str(folder / "tokenizer.json"))
    table = word_starts(folder, tokenizer.get_vocab_size() + 3)
    return [bool(table[tokenizer.token_to_id(piece)]) for piece in pieces]


def numbered(*pieces: str) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


def test_word_piece(tmp_path: Path) -> None:
    pieces = ("[UNK]", "un", "##aff", "##able", "#", ",")
    tokenizer = Tokenizer(models.WordPiece(numbered(*pieces), unk_token="[UNK]"))
    assert starts(tmp_path, tokenizer, *pieces) == [True, True, False, False, True, True]


@pytest.mark.parametrize("in_sequence", [False, True])
def test_byte_level(tmp_path: Path, in_sequence: bool) -> None:
    pieces = ("Ġ", "t", "h", "Ġt", "th", ",", "Ċ")
    tokenizer = Tokenizer(models.BPE(numbered(*pieces), [("Ġ", "t"), ("t", "h")]))
    step = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), step]) if in_sequence else step
    assert starts(tmp_path, tokenizer, *pieces) == [True, False, False, True, False, False, True]


def test_unigram(tmp_path: Path) -> None:
    pieces = ("<unk>", "▁the", "re", "▁")
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert starts(tmp_path, tokenizer, *pieces[1:]) == [True, False, True]


def test_word_level(tmp_path: Path) -> None:
    assert starts(tmp_path, Tokenizer(models.WordLevel(numbered("a", "b"), "a")), "a", "b") == [True, True]


def test_unknown_word_markers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a</w>": 0}}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot determine word starts for a BPE model"):
        word_starts(tmp_path, 1)


def test_token_counts_add_over_shards(tmp_path: Path) -> None:
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=250, padded_last_row=True))
    shards = range(len(corpus.manifest.shards))
    expected = np.zeros((2, corpus.manifest.vocab_size), np.int64)
    for row in np.concatenate([corpus.input_ids(i) for i in shards]):
        passage: set[int] = set()
        for token in map(int, row):
            expected[0, token] += 1
            if token in corpus.manifest.special_tokens.all:
                passage = {token}
                expected[1, token] += 1
            elif token not in passage:
                passage.add(token)
                expected[1, token] += 1
    assert np.array_equal(token_counts(corpus, shards, of_passages=True), expected)
    parts = [token_counts(corpus, part, of_passages=True) for part in ([0, 2], [1], [])]
    assert np.array_equal(sum(parts), expected)
    assert not parts[2].any()
    alone = token_counts(corpus, shards, of_passages=False)
    assert np.array_equal(alone[0], expected[0])
    assert not alone[1].any()


def test_frequency_scores() -> None:
    counts = np.array([[0, 3, 99], [0, 3, 8]])
    assert np.allclose(frequency_scores(counts, 0.5), [1, 0.5, 0.1])
    assert np.allclose(frequency_scores(counts, 0.5, 0.5), [1, 0.25, 0.1 / 3])
    assert np.allclose(frequency_scores(counts, -1.0, 1.0), [1, 1, 100 / 9]), "the mean count in its passages"
