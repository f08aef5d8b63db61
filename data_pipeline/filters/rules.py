"""Per-document cleaning and filtering rules.

Applied in this order: invalid UTF-8, Unicode normalisation and control characters, length, quality, contamination.
A document is dropped by the first rule it violates, and counted under the name of that rule. Shares count characters
by Unicode category, so the rules work for every script.

Documents longer than sources.documents.PIECE characters arrive in pieces: length and quality are checked on the first
piece, invalid bytes and contamination on all of them.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from data_pipeline.filters.ngrams import WordHashes, ngram_hashes

# Rules of records that earlier versions did not have.
NEWER_RULES = ("no_text", "bad_records")
Share = Annotated[float, Field(ge=0, le=1)]
DIGEST = 16

# Invalid bytes decoded with "surrogateescape"; JSON escapes may also contain any lone surrogate.
_BAD = re.compile("[\ud800-\udfff]+")
# C0, DEL and C1, except tab, line feed, and the other line ends (those become line feeds).
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_LETTER, _DIGIT, _SPACE, _OTHER = range(4)


class DocumentRules(BaseModel):
    """Section `documents` of a corpus description. The defaults neither change nor drop any document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bad_bytes: Literal["error", "replace", "skip"] = Field(
        default="error",
        description="invalid UTF-8: raise an error, replace by U+FFFD, or skip the document",
    )
    no_text: Literal["error", "skip"] = Field(
        default="error", description="records whose text is null or missing: raise an error, or skip and count them"
    )
    bad_records: Literal["error", "skip"] = Field(
        default="error",
        description="lines that are not JSON objects with a string as text: raise an error, or skip and count them",
    )
    normalize: Literal["none", "nfc"] = Field(default="none", description="Unicode normalisation form of the text")
    control_characters: Literal["keep", "remove"] = Field(
        default="keep", description="remove: delete control characters except tab, convert all line ends to line feeds"
    )
    min_characters: int = Field(default=0, ge=0, description="shorter documents are dropped")
    max_characters: int | None = Field(default=None, ge=1, le=1 << 20, description="longer documents are dropped")
    min_letters: Share = Field(
        default=0.0, description="minimum share of letters and marks among non-white-space characters"
    )
    max_digits: Share = Field(default=1.0, description="maximum share of digits among non-white-space characters")
    max_repeated_lines: Share = Field(default=1.0, description="maximum share of characters in repeated lines")
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="exact: keep only the first of equal documents; near: also of similar ones (MinHash)",
    )
    similarity: float = Field(
        default=0.8, ge=0.5, le=1, description="Jaccard similarity from which documents are near-duplicates"
    )
    shingle: int = Field(default=5, ge=1, le=64, description="words per shingle for the Jaccard similarity")
    decontaminate: tuple[str, ...] = Field(
        default=(), description="task files or globs: drop documents that share an n-gram with them"
    )
    decontaminate_words: PositiveInt = Field(default=13, le=64, description="words per n-gram for decontamination")

    @model_validator(mode="after")
    def _lengths(self) -> DocumentRules:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        return self

    @property
    def cleans(self) -> bool:
        """Whether the rules may change the text of a document."""
        return self != DocumentRules() and (
            self.bad_bytes != "error" or self.normalize != "none" or self.control_characters != "keep"
        )


@lru_cache(maxsize=1)
def _classes() -> NDArray[np.uint8]:
    """Class of each code point (_LETTER, _DIGIT, _SPACE, _OTHER): uint8 [0x110000]."""
    kinds = {"L": _LETTER, "M": _LETTER, "N": _DIGIT, "Z": _SPACE}
    found = [kinds.get(unicodedata.category(chr(point))[0], _OTHER) for point in range(0x110000)]
    for sign in "\t\n\r\x0b\x0c":
        found[ord(sign)] = _SPACE
    return np.array(found, np.uint8)


def clean(text: str, rules: DocumentRules) -> tuple[str, bool]:
    """The cleaned text, and whether it had invalid bytes (bad_bytes "error" does not look for them)."""
    bad = False
    if not text.isascii():
        if rules.bad_bytes != "error" and _BAD.search(text):
            bad = True
            text = _BAD.sub("\ufffd", text)
        if rules.normalize == "nfc":
            text = unicodedata.normalize("NFC", text)
    if rules.control_characters == "remove":
        text = _CONTROL.sub("", _LINE_ENDS.sub("\n", text))
    return text, bad


def quality_fault(text: str, rules: DocumentRules) -> str | None:
    """Name of the first length or quality rule that the text violates, or None."""
    if len(text) < rules.min_characters:
        return "too_short"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return "too_long"
    if rules.min_letters > 0 or rules.max_digits < 1:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        counts = np.bincount(_classes()[points], minlength=4)
        visible = max(len(text) - int(counts[_SPACE]), 1)
        if counts[_LETTER] < rules.min_letters * visible:
            return "few_letters"
        if counts[_DIGIT] > rules.max_digits * visible:
            return "many_digits"
    if rules.max_repeated_lines < 1:
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        repeated = sum(map(len, lines)) - sum(map(len, set(lines)))
        if repeated > rules.max_repeated_lines * max(sum(map(len, lines)), 1):
            return "repeated_lines"
    return None


@dataclass
class FilteredBatch:
    """Texts of a batch that passed the rules; `ends` says which of them end a document.

    Per document that ends: digests; signatures, uint32 [P] each; late, the rule violated by a document some of whose
    pieces were already passed on (it must be dropped afterwards), else None.
    """

    texts: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    signatures: list[NDArray[np.uint32]] = field(default_factory=list)
    late: list[str | None] = field(default_factory=list)


class DocumentFilter:
    """Applies the rules to a sequence of texts; keeps the state of an unfinished document between calls.

    `dropped` counts dropped documents by rule, `replaced` documents with replaced bytes. fingerprints: compute digests,
    and MinHash signatures if the rules ask for near-duplicates. contaminated: uint64 [N] ascending, hashes of the
    n-grams of task files.
    """

    def __init__(self, rules: DocumentRules, fingerprints: bool, contaminated: NDArray[np.uint64] | None) -> None:
        from data_pipeline.filters.minhash import Signature

        self._rules = rules
        self._fingerprints = fingerprints
        self._contaminated = contaminated
        self.dropped: Counter[str] = Counter()
        self.replaced = 0
        # State of the current document.
        self._started = False
        self._fault: str | None = None
        self._bad = False
        self._written = False  # some of its pieces are in the output
        self._digest = hashlib.blake2b(digest_size=DIGEST)
        near = fingerprints and rules.duplicates == "near"
        self._words = WordHashes() if near or contaminated is not None else None
        self._signature = Signature(rules.shingle) if near else None
        self._tail = np.empty(0, np.uint64)  # last words, for n-grams that continue in the next piece

    def __call__(self, texts: Sequence[str], ends: Sequence[bool]) -> FilteredBatch:
        out = FilteredBatch()
        for text, end in zip(texts, ends, strict=True):
            self._add(text, end, out)
        return out

    def _add(self, text: str, end: bool, out: FilteredBatch) -> None:
        rules = self._rules
        first = not self._started
        if first:
            self._fault, self._bad, self._written = None, False, False
            self._digest = hashlib.blake2b(digest_size=DIGEST)
            self._tail = self._tail[:0]
            if self._signature:
                self._signature.reset()
        self._started = not end
        if rules.cleans:
            text, bad = clean(text, rules)
            text = text.lstrip() if first else text
            text = text.rstrip() if end else text
            if bad and not self._bad:
                self._bad = True
                self.replaced += rules.bad_bytes == "replace"
                if rules.bad_bytes == "skip":
                    self._fault = self._fault or "bad_bytes"
        if first and self._fault is None:
            self._fault = quality_fault(text, rules)
            if self._fault is None and rules.max_characters is not None and not end:
                self._fault = "too_long"
        if self._fault is None:
            self._fingerprint(text)
        if self._fault is None or self._written:
            self._written = True
            out.texts.append(text)
            out.ends.append(end)
        if not end:
            return
        if self._fault:
            self.dropped[self._fault] += 1
        if self._written:
            out.late.append(self._fault)
            if self._fingerprints:
                out.digests.append(self._digest.digest())
                if self._signature:
                    out.signatures.append(self._signature.end())

    def _fingerprint(self, text: str) -> None:
        """Update digest and signature with a piece; set the fault if it shares an n-gram with a task file."""
        if self._fingerprints:
            self._digest.update(text.encode())
        if self._words is None:
            return
        words = self._words(text)
        if self._contaminated is not None:
            n = self._rules.decontaminate_words
            joined = np.concatenate([self._tail, words])
            self._tail = joined[max(len(joined) - n + 1, 0) :]
            grams = ngram_hashes(joined, n)
            at = np.searchsorted(self._contaminated, grams).clip(max=len(self._contaminated) - 1)
            if len(self._contaminated) and (self._contaminated[at] == grams).any():
                self._fault = "contaminated"
        if self._signature:
            self._signature.add(words)
