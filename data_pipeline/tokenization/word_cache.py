"""Cache of the token ids of words: most words of a text have occurred before.

Exact only for word-wise tokenizers, for which the ids of a text are the concatenated ids of its white-space-separated
words. `why_not_word_wise` decides this from tokenizer.json. The conditions:

- all added tokens are special (special tokens are not matched in text), and truncation is off;
- the normalizer steps (BERT's, Unicode forms, lower-casing, accent stripping) never look across white space:
  composition and reordering of marks stop at a space (combining class 0, composes with nothing), and lower-casing a
  letter depends at most on adjacent letters;
- the first pre-tokenizer step splits at white space and drops it, further steps only split further;
- the model is deterministic (no BPE dropout).

BERT's pre-tokenizer makes each ASCII punctuation character a word: the ids of an ASCII word are then those of its
alphanumeric runs and its punctuation, and "word," needs no cache entry.

Other tokenizers encode complete texts. White space means characters on which Python's `str.split` and Unicode's
White_Space agree: texts with one of the eight characters on which they differ, or which BERT removes as control
characters, are split only at spaces, tabs and line ends.
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
_SPACES = frozenset(filter(str.isspace, map(chr, range(0x3001))))
_PLAIN = re.compile("[ \t\r\n]+")
# Limits at which the cache is cleared: about 100 MB.
_ENTRIES = 400_000
_CHARACTERS = 8_000_000


def why_not_word_wise(tokenizer: Tokenizer) -> str | None:
    """The reason why a tokenizer is not word-wise, or None if it is."""
    content = json.loads(tokenizer.to_str())
    if odd := [token["content"] for token in content.get("added_tokens", ()) if not token["special"]]:
        return f"added token {odd[0]!r} is not special"
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] not in _NORMALIZERS:
            return f"normalizer {step['type']}"
    splitters = list(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    if not splitters or splitters[0]["type"] not in _SPLITTERS:
        return f"pre-tokenizer {splitters[0]['type'] if splitters else 'none'}"
    for step in splitters[1:]:
        if step["type"] not in _SPLITTERS | _OTHERS:
            return f"pre-tokenizer {step['type']}"
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
    """1 if a token starts a word of the pre-tokenizer, else 0."""
    before: int | None = -1
    out = []
    for word in word_ids:
        out.append(int(word != before))
        before = word
    return out


class WordCache:
    """Cached equivalent of a word-wise `tokenizer`. dtype: of the ids, uint16 or uint32.

    `breaks`: characters behind which a sentence that starts there can be encoded on its own."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._code = {2: "H", 4: "I"}[dtype.itemsize]
        self._ids: dict[str, bytes] = {}
        self._starts: dict[str, bytes] = {}
        self._characters = 0
        content = json.loads(tokenizer.to_str())
        first = next(iter(_steps(content.get("pre_tokenizer"), "pretokenizers")))
        self._isolates = first["type"] == "BertPreTokenizer"
        # BERT removes the doubtful ones, and isolates the punctuation before them; other tokenizers keep them in words.
        removes = any(step.get("clean_text") for step in _steps(content.get("normalizer"), "normalizers"))
        self.breaks = _SPACES if self._isolates and removes else frozenset(_DOUBTFUL.sub("", "".join(_SPACES)))

    def encode(
        self, texts: list[str], with_starts: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.bool_] | None]:
        """Ids of all texts [T], ids per text, int64 [len(texts)], and, if requested, word starts, bool [T]."""
        split = [_PLAIN.split(text) if _DOUBTFUL.search(text) else text.split() for text in texts]
        known = self._starts if with_starts else self._ids
        self._learn(set(chain.from_iterable(split)).difference(known), with_starts)
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
            known = self._starts if with_starts else self._ids
            words = words.difference(compounds).union(*compounds.values()).difference(known)
        new = sorted(words)
        # encode_batch_fast does not return word ids.
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
