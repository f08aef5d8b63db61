"""Word and n-gram hashes, and the n-grams of task files for decontamination.

A word is a run of letters, marks, digits and underscores, case-folded; each character of scripts without spaces
between words (Chinese, Japanese) is a word. Hashes have 64 bits: another n-gram collides with one of N n-grams with
probability N / 2^64.

Shapes: W words, N n-grams.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError, reading_input, sha256_file

_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
_LIMIT = 1 << 19
# The limit of the csv module, 131,072 characters, is less than an article.
_LONGEST_CELL = 2_000_000_000
# Multiplier of the polynomial over the words (odd and of full period: Knuth's MMIX), and splitmix64's finaliser.
_BASE = np.uint64(6364136223846793005)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SUFFIXES = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".parquet")


class WordHashes(dict[str, int]):
    """Hashes of the words of a text, cached; the cache is cleared when it exceeds its limit."""

    def __missing__(self, word: str) -> int:
        found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = found
        return found

    def __call__(self, text: str) -> NDArray[np.uint64]:
        """Hashes of the words of `text`, uint64 [W]."""
        if len(self) > _LIMIT:
            self.clear()
        words = _WORD.findall(text.casefold())
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hashes of the n-grams, uint64 [max(W - n + 1, 0)]. words: uint64 [W]."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    count = len(words) - n + 1
    out = words[:count].copy()
    for i in range(1, n):
        out *= _BASE
        out += words[i : i + count]
    for shift, factor in zip((30, 27), _MIX, strict=True):
        out ^= out >> np.uint64(shift)
        out *= factor
    return out ^ (out >> np.uint64(31))


def task_digests(paths: Sequence[str | Path]) -> dict[str, str]:
    """SHA-256 of each task file, by path. Raises CorpusError if a file is missing, unreadable or of an unknown
    type."""
    found = {}
    for path in paths:
        _kind(Path(path))
        with reading_input(path):
            found[str(path)] = sha256_file(Path(path))
    return found


def task_ngrams(paths: Sequence[str | Path], n: int) -> NDArray[np.uint64]:
    """Hashes of all n-grams of all texts in task files: uint64 [N], ascending and unique.

    A text is a line of .txt, a cell of .tsv or .csv, or a string at any depth of .json, .jsonl or .parquet; all but the
    last may be gzipped (.gz). Raises CorpusError if a file is missing, of an unknown type, unreadable, or has no text
    of at least n words.
    """
    hashes = WordHashes()
    found: list[NDArray[np.uint64]] = []
    for path in map(Path, paths):
        grams = []
        for text in _texts(path):
            grams.append(ngram_hashes(hashes(text), n))
        found.append(np.unique(np.concatenate([np.empty(0, np.uint64), *grams])))
        if len(found[-1]) == 0:
            raise CorpusError(f"{path}: no text has {n} words. Use a smaller decontaminate_words or other files")
    return np.unique(np.concatenate(found))


def _kind(path: Path) -> tuple[str, bool]:
    """Suffix of a task file, and whether it is gzipped. Raises CorpusError if it is missing or of an unknown type."""
    gzipped = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if gzipped else path.name).suffix.lower()
    if suffix not in SUFFIXES or not path.is_file():
        raise CorpusError(f"{path}: decontamination needs an existing file of type {', '.join(SUFFIXES)}")
    return suffix, gzipped


def _texts(path: Path) -> Iterator[str]:
    suffix, gzipped = _kind(path)
    try:
        if suffix == ".parquet" and not gzipped:
            import pyarrow.parquet as pq

            for column in pq.read_table(path).columns:
                if _has_strings(column.type):
                    yield from _strings(column.to_pylist())
            return
        with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8", newline="") as file:
            if suffix == ".json":
                yield from _strings(json.load(file))
            elif suffix == ".jsonl":
                for line in file:
                    if line.strip():
                        yield from _strings(json.loads(line))
            elif suffix == ".csv":
                csv.field_size_limit(_LONGEST_CELL)
                for row in csv.reader(file):
                    yield from row
            else:
                for line in file:
                    yield from line.split("\t") if suffix == ".tsv" else (line,)
    except (ValueError, RecursionError, OSError, EOFError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read ({error}). Correct the file or remove it from the list") from error


def _has_strings(kind: Any) -> bool:
    """Whether values of an Arrow type are or hold strings."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _has_strings(kind.value_type)
    if pa.types.is_nested(kind):
        return any(_has_strings(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):  # tuples are entries of Arrow's maps
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
