"""Positions of listed words in rows of token ids: nouns, verbs, negation, or whatever a list of the user's names."""

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.data.vocabulary import read_tokenizer, word_ends, word_starts


@dataclass(frozen=True)
class WordList:
    """name: for tables. words: in lower case."""

    name: str
    words: frozenset[str]


def read_word_list(text: str) -> WordList:
    """NAME=FILE, a file of one word per line. Raises ConfigError for another form, or a file without words."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise ConfigError(f"--words {text}: expected NAME=FILE, a file with one word per line")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--words {text}: {path} cannot be read: {error}") from None
    words = frozenset(line.strip().casefold() for line in lines) - {""}
    if phrases := sorted(word for word in words if len(word.split()) > 1):
        raise ConfigError(f"--words {text}: {phrases[0]!r} is more than one word; expected one word per line")
    if not words:
        raise ConfigError(f"--words {text}: {path} has no words; expected one per line")
    return WordList(name, words)


class WordFinder:
    """Finds the words of lists in rows of a corpus. A word is what its tokenizer takes for one: BERT's splits "don't"
    at the apostrophe, byte-level ones at spaces only. Punctuation at its ends is not part of it; case does not matter.

    Raises ConfigError if the tokenizer does not mark words.
    """

    def __init__(self, corpus: Corpus, lists: tuple[WordList, ...]) -> None:
        self.lists, folder, size = lists, corpus.tokenizer_folder, corpus.manifest.vocab_size
        try:
            self._tokenizer = read_tokenizer(folder)
            starts, ends = word_starts(folder, size), word_ends(folder, size)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--words: the tokenizer {folder} must mark where words start; omit --words ({error})"
            ) from None
        special = np.zeros(size, np.bool_)
        special[list(corpus.manifest.special_tokens.all)] = True
        self._special, self._starts = special, starts | special
        # The token after one of these starts a word, whether or not it is marked.
        self._ends = special if ends is None else special | ends

    def columns(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
        """List -> whether a position is part of one of its words: ids [l] -> bool [l]."""
        starts = self._starts[ids]
        starts[0] = True
        starts[1:] |= self._ends[ids[:-1]]
        first = np.flatnonzero(starts)
        found = {entry.name: np.zeros(len(ids), np.bool_) for entry in self.lists}
        for begin, end in zip(first, [*first[1:], len(ids)], strict=True):
            if self._special[ids[begin]]:
                continue
            text = "".join(self._tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False).split())
            word = text.strip(string.punctuation).casefold()
            for entry in self.lists:
                if word in entry.words:
                    found[entry.name][begin:end] = True
        return found
