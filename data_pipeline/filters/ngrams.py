"""Hashes of words and of runs of n words, and the n-grams of task files that a corpus must not share.

A word is a run of letters, marks, digits and underscores, case folded; a sign of the scripts that put no spaces between
words (Chinese, Japanese) is a word of its own. Hashes are 64 bits: among N n-grams a foreign one is taken for one of
them with probability N / 2^64.

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

from data_pipeline.files import CorpusError, sha256_file

_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
_LIMIT = 1 << 19
# An odd multiplier of full period for the polynomial over the words (Knuth's MMIX), and splitmix64's finaliser.
_BASE = np.uint64(6364136223846793005)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SUFFIXES = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".parquet")


class WordHashes(dict[str, int]):
    """Text → hashes of its words; remembers words, and forgets them all when they are many."""

    def __missing__(self, word: str) -> int:
        found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = found
        return found

    def __call__(self, text: str) -> NDArray[np.uint64]:
        """uint64 [W]."""
        if len(self) > _LIMIT:
            self.clear()
        words = _WORD.findall(text.casefold())
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hashes of the runs of n words: uint64 [max(W - n + 1, 0)]. words: uint64 [W]."""
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
    """SHA-256 of each task file, by its path. Raises CorpusError where one is missing or of another kind."""
    for path in map(Path, paths):
        _kind(path)
    return {str(path): sha256_file(Path(path)) for path in paths}


def task_ngrams(paths: Sequence[str | Path], n: int) -> NDArray[np.uint64]:
    """Hashes of all n-grams of all texts of task files: uint64 [N] ascending. Texts shorter than n words have none.

    Files: .txt (a text a line), .tsv and .csv (each cell), .json, .jsonl (each string in it, at any depth), .parquet
    (each column of strings); each but the last also .gz. Raises CorpusError where a file is missing, of another kind,
    broken, or holds no n-gram.
    """
    hashes = WordHashes()
    found: list[NDArray[np.uint64]] = []
    for path in map(Path, paths):
        grams = []
        for text in _texts(path):
            grams.append(ngram_hashes(hashes(text), n))
        found.append(np.unique(np.concatenate([np.empty(0, np.uint64), *grams])))
        if len(found[-1]) == 0:
            raise CorpusError(f"{path}: no text in it has {n} words. Give a smaller decontaminate_words or other files")
    return np.unique(np.concatenate(found))


def _kind(path: Path) -> tuple[str, bool]:
    """Suffix of a task file, and whether it is packed."""
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    if suffix not in SUFFIXES or not path.is_file():
        raise CorpusError(f"{path}: must be a file of {', '.join(SUFFIXES)} to decontaminate against")
    return suffix, packed


def _texts(path: Path) -> Iterator[str]:
    suffix, packed = _kind(path)
    try:
        if suffix == ".parquet" and not packed:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            for column in table.columns:
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    yield from (text for text in column.to_pylist() if text)
            return
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8", newline="") as file:
            if suffix == ".json":
                yield from _strings(json.load(file))
            elif suffix == ".jsonl":
                for line in file:
                    if line.strip():
                        yield from _strings(json.loads(line))
            elif suffix == ".csv":
                for row in csv.reader(file):
                    yield from row
            else:
                for line in file:
                    yield from line.split("\t") if suffix == ".tsv" else (line,)
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read ({error}). Correct the file or leave it out") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
