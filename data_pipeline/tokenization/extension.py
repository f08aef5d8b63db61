"""Extending a tokenizer: new tokens for the words of a text that it splits, in its own vocabulary and with its own ids.

The new tokens are entries of the tokenizer's model, not added tokens, which would be matched before words are split, in
the middle of words too, and would lose the marks of word starts. By model:

- WordPiece: whole words, those that save most tokens: occurrences × (pieces - 1). Its longest-match rule finds them.
- Unigram: the same words; the score of a new piece is that of its parts together plus a little, so that texts without
  these parts are segmented as before.
- BPE: its training is continued on the text (Purason et al. 2025, arXiv 2512.03989): the most frequent pair of tokens
  within words becomes a token, again and again. The merges come after those that there are, so that no other merge is
  affected; a whole word without the tokens that lead to it cannot be reached by merges.

Words are those of the tokenizer's normalizer and pre-tokenizer, letters and digits only, at least one letter.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import CorpusError
from data_pipeline.tokenization.bert_folder import check_agreement
from data_pipeline.tokenization.classes import check_class
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Added to the score of a Unigram piece: nats.
_MARGIN = 1e-3
_HEAD = re.compile(r"▁[^\W_]+")
# Files that state the vocabulary a second time, and would contradict tokenizer.json.
_OUTDATED = ("vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Extension:
    """vocab_size: with the new tokens. before, after: tokens of the text's words."""

    vocab_size: int
    tokens: tuple[str, ...]
    before: int
    after: int


class TokenizerExtension:
    """Collects the words of a text (`count`), then extends the tokenizer (`extend`).

    `words`: occurrences of each pre-token. base: folder of the tokenizer. folder: existing, to write to. Raises
    CorpusError if it is not a usable tokenizer, or of a model that cannot be extended.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self._base, self._folder = base, folder
        copy_tokenizer(base, folder / "copy")
        for path in (folder / "copy").iterdir():
            path.rename(folder / path.name)
        (folder / "copy").rmdir()
        self._encoder = Encoder(folder)
        self._tokenizer: Tokenizer = self._encoder.tokenizer
        self._content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        model = self._content["model"]
        self._kind = model["type"]
        self._is_byte_level = '"ByteLevel"' in json.dumps(self._content.get("pre_tokenizer"))
        reason = None
        if self._kind not in ("WordPiece", "BPE", "Unigram"):
            reason = f"a {self._kind} model"
        elif model.get("end_of_word_suffix"):
            reason = "a BPE model that marks the ends of words"
        elif self._tokenizer.pre_tokenizer is None:
            reason = "no pre-tokenizer, which would say what a word is"
        if reason:
            raise CorpusError(
                f"{base / 'tokenizer.json'}: has {reason}; WordPiece, BPE and Unigram models of words can be extended"
            )
        self.words: Counter[str] = Counter()

    def count(self, texts: Iterable[str]) -> None:
        """Count the words of texts."""
        normalizer, split = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer.pre_tokenize_str
        for text in texts:
            self.words.update(word for word, _ in split(normalizer.normalize_str(text) if normalizer else text))

    def extend(self, number: int) -> Extension:
        """Write the tokenizer with `number` new tokens. Raises CorpusError if the text yields fewer."""
        before, words = self._tokens(self._tokenizer), self._candidates()
        first = self._fill_holes()
        new = self._merges(words, number) if self._kind == "BPE" else self._best_words(words, number)
        if len(new) < number:
            raise CorpusError(
                f"--add {number:,}: the text yields only {len(new):,} new tokens for words that the tokenizer splits. "
                f"Use --add {len(new)} or other text"
                if new
                else f"--add {number:,}: the tokenizer splits no word of the text; there is nothing to add"
            )
        self._insert(new, first, words)
        return Extension(first + number, tuple(new), before, self._tokens(self._save().tokenizer))

    def _tokens(self, tokenizer: Tokenizer) -> int:
        """Tokens of the text."""
        return sum(count * len(tokenizer.model.tokenize(word)) for word, count in self.words.items())

    def _readable(self, word: str) -> bool:
        """Whether a pre-token is a word: letters and digits, at least one letter."""
        from tokenizers import decoders

        text = decoders.ByteLevel().decode([word]) if self._is_byte_level else word
        text = text.replace("▁", "").strip()
        return text.isalnum() and any(map(str.isalpha, text))

    def _candidates(self) -> dict[str, tuple[list[str], int]]:
        """Words that are split in known pieces -> the pieces, and occurrences."""
        counts: Counter[str] = Counter()
        for word, count in self.words.items():
            # Without a pre-tokenizer of punctuation, "▁word," is a pre-token.
            head = _HEAD.match(word)
            counts[head[0] if head else word] += count
        unknown, tokenize = self._unknown(), self._tokenizer.model.tokenize
        found = {}
        for word, count in sorted(counts.items()):
            pieces = [token.value for token in tokenize(word)]
            if len(pieces) > 1 and unknown not in pieces and self._readable(word):
                found[word] = pieces, count
        return found

    def _unknown(self) -> str | None:
        model = self._content["model"]
        if self._kind == "Unigram" and model.get("unk_id") is not None:
            return str(model["vocab"][model["unk_id"]][0])
        unknown = model.get("unk_token")
        return unknown if isinstance(unknown, str) else None

    def _best_words(self, words: dict[str, tuple[list[str], int]], number: int) -> list[str]:
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        saved = {word: count * (len(pieces) - 1) for word, (pieces, count) in words.items() if word not in known}
        return sorted(saved, key=lambda word: (-saved[word], word))[:number]

    def _merges(self, words: dict[str, tuple[list[str], int]], number: int) -> list[str]:
        """Continue BPE's training: the new merges, appended to the model's, and their tokens."""
        known = set(self._tokenizer.get_vocab(with_added_tokens=True))
        split = [(list(pieces), count) for pieces, count in words.values()]
        counts: Counter[tuple[str, str]] = Counter()
        places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        for i, (pieces, count) in enumerate(split):
            for pair in pairwise(pieces):
                counts[pair] += count
                places[pair].add(i)
        new: list[str] = []
        while len(new) < number and counts:
            pair = min(counts, key=lambda pair: (-counts[pair], pair))
            merged = pair[0] + pair[1]
            if merged in known:  # the model has the token, but does not reach it from these parts
                del counts[pair]
                continue
            known.add(merged)
            new.append(merged)
            self._content["model"]["merges"].append(list(pair))
            for i in sorted(places.pop(pair)):
                pieces, count = split[i]
                for old in pairwise(pieces):
                    counts[old] -= count
                    if counts[old] <= 0:
                        del counts[old]
                pieces[:] = _merge(pieces, pair, merged)
                for following in pairwise(pieces):
                    counts[following] += count
                    places[following].add(i)
        return new

    def _fill_holes(self) -> int:
        """Give added tokens that are not in the model's vocabulary an entry, as ids follow each other there; returns
        the first new id."""
        vocabulary = self._content["model"]["vocab"]
        size = len(vocabulary)
        added = {token["id"]: token["content"] for token in self._content["added_tokens"]}
        if self._kind == "Unigram":
            lowest = min((score for _, score in vocabulary), default=0.0)
            while size in added:
                vocabulary.append([added[size], lowest - 100.0])
                size += 1
        else:
            size = max(vocabulary.values()) + 1
            while size in added:
                vocabulary.setdefault(added[size], size)
                size += 1
        if size != self._encoder.vocab_size:
            raise CorpusError(
                f"{self._base / 'tokenizer.json'}: ids of its added tokens do not follow those of its vocabulary "
                f"({size:,} of {self._encoder.vocab_size:,}); a tokenizer with gaps cannot be extended"
            )
        return size

    def _insert(self, new: list[str], first: int, words: dict[str, tuple[list[str], int]]) -> None:
        vocabulary = self._content["model"]["vocab"]
        if self._kind != "Unigram":
            vocabulary.update({token: first + i for i, token in enumerate(new)})
            return
        scores = dict(vocabulary)
        vocabulary += [[token, sum(scores[piece] for piece in words[token][0]) + _MARGIN] for token in new]

    def _save(self) -> Encoder:
        folder = self._folder
        for path in folder.iterdir():
            if path.name in _OUTDATED or path.suffix == ".model":
                path.unlink()
        path = folder / "tokenizer.json"
        stored = json.loads(path.read_text(encoding="utf-8")) | {"model": self._content["model"]}
        path.write_text(json.dumps(stored, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        if (folder / "vocab.txt").is_file():
            vocabulary = self._content["model"]["vocab"]
            lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
            (folder / "vocab.txt").write_text(lines, encoding="utf-8")
        encoder = Encoder(folder)
        check_agreement(folder)
        check_class(folder, json.loads(encoder.tokenizer.to_str()))
        return encoder


def _merge(pieces: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    found: list[str] = []
    i = 0
    while i < len(pieces):
        if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair:
            found.append(merged)
            i += 2
        else:
            found.append(pieces[i])
            i += 1
    return found
