"""Masks on corpora of every kind of tokenizer: whole words of the text, random replacements that are real tokens."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from data_pipeline.build import build
from data_pipeline.shards import Corpus
from data_pipeline.tokenization.tokenizer import Encoder
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.loader import read_rows
from maskvr_ds.masking.factory import create_masker
from tests.support.documents import write_text
from tests.support.tokenizers import enlarge, save

LENGTH = 64
# Kinds whose words are marked by white space alone.
MARKED = ["roberta", "roberta with a prefix space", "xlm-roberta", "albert", "modernbert", "eurobert"]
WORDS = ["the", "quick", "dogs", "sleep", "values", "Käfer", "x.", "isn't", "over;", "漢字", "3.14", "(lazy)"]


def documents() -> list[str]:
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS, 12)) + ("\nnew lines" if i % 3 else ".\nThe end") for i in range(60)]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Corpus]:
    @cache
    def made(kind: str, packing: str) -> Corpus:
        folder = tmp_path_factory.mktemp("kind")
        tokenizer = save(kind.removesuffix(" large"), folder / "tok")
        if kind.endswith(" large"):
            enlarge(tokenizer, 70_000)
        text = write_text(folder / "a.txt", documents())
        build([text], tokenizer, LENGTH, folder / "corpus", packing=packing, progress=False)
        return Corpus(folder / "corpus")

    return made


@pytest.mark.parametrize("kind", [*MARKED, "deberta-v2", "mpnet", "xlm-roberta large"])
@pytest.mark.parametrize("strategy", ["uniform", "frequency", "whole_word", "span"])
def test_predictions_and_replacements(kind: str, strategy: str, make: Callable[[str, str], Corpus]) -> None:
    corpus = make(kind, "full_sequences")
    special = set(corpus.manifest.special_tokens.all)
    masking = MaskingConfig(strategy=strategy, rate=0.3, mask_probability=0.0, random_probability=1.0)
    masker = create_masker(masking, corpus, seed=3, device=torch.device("cpu"))
    rows = np.arange(corpus.rows)
    replaced: set[int] = set()
    for epoch in range(8):
        batch = read_rows(corpus, rows, np.full(len(rows), epoch))
        masked = masker(batch)
        used = masked.weights != 0
        assert used.any()
        labels = batch.input_ids.long().gather(1, masked.positions)
        assert torch.equal(masked.labels[used], labels[used])
        assert not special & set(masked.labels[used].tolist())
        replaced |= set(masked.input_ids.gather(1, masked.positions)[used].tolist())
    assert not special & replaced
    tokenizer = Encoder(corpus.tokenizer_folder).tokenizer
    assert all(tokenizer.id_to_token(i) is not None for i in replaced)
    assert len(replaced) > min(corpus.manifest.vocab_size, 1000) / 4


@pytest.mark.parametrize("kind", MARKED)
@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_predicted_words_are_words_of_the_text(kind: str, strategy: str, make: Callable[[str, str], Corpus]) -> None:
    """Tokens of the same word of the text (between white space) are predicted together or not at all."""
    corpus = make(kind, "documents")
    encoder = Encoder(corpus.tokenizer_folder)
    texts = {tuple(encoder.encode([text])[0].tolist()): text for text in documents()}
    masker = create_masker(MaskingConfig(strategy=strategy, rate=0.4), corpus, seed=1, device=torch.device("cpu"))
    batch = read_rows(corpus, np.arange(corpus.rows), np.zeros(corpus.rows, np.int64))
    masked = masker(batch)
    predicted = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    predicted.scatter_(1, masked.positions, masked.weights != 0)
    checked = 0
    apart: dict[str, set[bool]] = {}
    for ids, chosen in zip(batch.input_ids.tolist(), predicted.tolist(), strict=True):
        row = [i for i in ids if i != corpus.manifest.special_tokens.pad][1:-1]
        if tuple(row) not in texts:
            continue
        text = texts[tuple(row)]
        words: dict[int, set[bool]] = {}
        encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
        for (start, stop), token, flag in zip(encoding.offsets, encoding.tokens, chosen[1:], strict=False):
            core = text[start:stop].lstrip()
            if core and token not in ("▁", "Ġ") and not any(c in text[start:stop] for c in "漢字"):
                # The number of words before the token; Han characters are words by themselves.
                before = text[: stop - len(core)].replace("漢", " 漢 ").replace("字", " 字 ")
                words.setdefault(len((before + "x").split()), set()).add(flag)
        assert all(len(flags) == 1 for flags in words.values()), text
        checked += len(words)
        for separator in (".\n", "\n"):
            last = len(text[: text.rfind(separator)].replace("漢", " 漢 ").replace("字", " 字 ").split())
            if separator in text and {last, last + 1} <= words.keys():
                apart.setdefault(separator, set()).add(words[last] == words[last + 1])
    assert checked > 300
    # Words on both sides of a line end are chosen independently.
    assert apart == {".\n": {True, False}, "\n": {True, False}}
