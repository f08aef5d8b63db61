"""Words → ids, remembered: text is mostly words that were there before.

Exact only where a tokenizer is word-wise: the ids of a text are those of its white-space-separated words, one after the
other. `why_not_word_wise` decides this from tokenizer.json alone, and knows these to be:

- added tokens are all special (they are not looked for in text), and there is no truncation of its own;
- the normaliser's steps (BERT's, Unicode forms, lower case, accents) never look across white space: composition and the
  order of marks stop at a space (which has combining class 0 and composes with nothing), and a letter's lower case
  depends on the letters beside it at most;
- the first pre-tokeniser step splits at white space and drops it, the others split further;
- the model has no chance in it (BPE dropout).

BERT's pre-tokeniser makes every sign of ASCII punctuation a word: there the ids of an ASCII word are those of its
runs of letters and digits and of its signs, and "word," needs no look-up of its own.

Anything else is encoded as a whole. White space here is what Python's `str.split` and Unicode's White_Space agree on:
texts with one of the eight signs of which they differ, or which BERT removes as control characters, are split at
plain spaces, tabs and line ends only.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_OTHERS = {"Punctuation", "Digits"}
_MODELS = {"WordPiece", "WordLevel", "BPE"}
_DOUBTFUL = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
_RUNS = re.compile("[A-Za-z0-9]+|[^A-Za-z0-9]")
_PLAIN = re.compile("[ \t\r\n]+")
# Entries and characters at which everything is forgotten: about 100 MB.
_ENTRIES = 400_000
_CHARACTERS = 8_000_000


def why_not_word_wise(tokenizer: Tokenizer) -> str | None:
    """What keeps a tokenizer from being word-wise, or None where it is."""
    content = json.loads(tokenizer.to_str())
    if odd := [token["content"] for token in content.get("added_tokens", ()) if not token["special"]]:
        return f"added token {odd[0]!r} is not special"
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] not in _NORMALIZERS:
            return f"normaliser {step['type']}"
    splitters = list(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    if not splitters or splitters[0]["type"] not in _SPLITTERS:
        return f"pre-tokeniser {splitters[0]['type'] if splitters else 'none'}"
    for step in splitters[1:]:
        if step["type"] not in _SPLITTERS | _OTHERS:
            return f"pre-tokeniser {step['type']}"
    model = content["model"]
    kind = model.get("type")
    if kind not in _MODELS:
        return f"model {kind}"
    if model.get("dropout"):
        return "BPE dropout"
    return None


def _steps(step: Any, key: str) -> Iterable[dict[str, Any]]:
    if not step:
        return
    if step["type"] == "Sequence":
        for part in step[key]:
            yield from _steps(part, key)
    else:
        yield step


def word_starts(word_ids: Iterable[int | None]) -> list[int]:
    """1 where a token begins a word of the pre-tokeniser, else 0."""
    before: int | None = -1
    out = []
    for word in word_ids:
        out.append(int(word != before))
        before = word
    return out


class WordMemo:
    """Encodes as `tokenizer` does, which must be word-wise. dtype: of the ids, uint16 or uint32."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._code = {2: "H", 4: "I"}[dtype.itemsize]
        self._ids: dict[str, bytes] = {}
        self._starts: dict[str, bytes] = {}
        self._characters = 0
        first = next(iter(_steps(json.loads(tokenizer.to_str()).get("pre_tokenizer"), "pretokenizers")))
        self._isolates = first["type"] == "BertPreTokenizer"

    def encode(
        self, texts: list[str], with_starts: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.bool_] | None]:
        """Ids of all texts [T], how many of each, int64 [len(texts)], and, if asked, bool [T]: a word begins here."""
        split = [_PLAIN.split(text) if _DOUBTFUL.search(text) else text.split() for text in texts]
        self._learn(set(chain.from_iterable(split)).difference(self._ids), with_starts)
        parts = [b"".join(map(self._ids.__getitem__, words)) for words in split]
        counts = np.fromiter(map(len, parts), np.int64, len(parts)) // self._dtype.itemsize
        ids = np.frombuffer(bytearray().join(parts), self._dtype)
        starts = None
        if with_starts:
            flags = b"".join(map(self._starts.__getitem__, chain.from_iterable(split)))
            starts = np.frombuffer(flags, np.bool_)
        if len(self._ids) > _ENTRIES or self._characters > _CHARACTERS:
            self._ids.clear()
            self._starts.clear()
            self._characters = 0
        return ids, counts, starts

    def _learn(self, words: set[str], with_starts: bool) -> None:
        compounds: dict[str, list[str]] = {}
        if self._isolates:
            compounds = {w: _RUNS.findall(w) for w in words if w.isascii() and w.isprintable() and not w.isalnum()}
            words = words.difference(compounds).union(*compounds.values()).difference(self._ids)
        new = sorted(words)
        # The fast call knows nothing of words.
        encode = self._tokenizer.encode_batch if with_starts else self._tokenizer.encode_batch_fast
        for word, encoding in zip(new, encode(new, add_special_tokens=False), strict=True):
            self._ids[word] = array(self._code, encoding.ids).tobytes()
            self._characters += len(word)
            if with_starts:
                self._starts[word] = bytes(word_starts(encoding.word_ids))
        for word, runs in compounds.items():
            self._ids[word] = b"".join(map(self._ids.__getitem__, runs))
            self._characters += len(word)
            if with_starts:
                self._starts[word] = b"".join(map(self._starts.__getitem__, runs))
