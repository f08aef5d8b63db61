"""Deduplication: exact duplicates by digest, near-duplicates by MinHash signatures (Broder 1997, library rensa).

The share of equal values of two signatures of length P estimates the Jaccard similarity J of the documents' shingle
sets, with standard deviation √(J(1 − J)/P): 0.035 at J = 0.8 and P = 128. Documents are near-duplicates if their
signatures agree in at least `similarity` − 0.1 of the values: with `similarity` = 0.8, 1 pair in 400 is missed at
J = 0.8, and less than 1 in 100,000 is a false positive at J = 0.5.

Candidate pairs come from 25 bands of 5 values (locality-sensitive hashing): a pair that agrees in no complete band is
not compared, which misses 1 in 20,000 at J = 0.8. Documents are visited in order, held-out ones first, and compared
only with documents kept so far: every dropped document resembles a kept one, so that chains of similar documents drop
nothing else.

Memory: a signature takes 512 bytes on disk; the search takes 33 bytes of RAM per document, and about 3 kB for each one
that shares a band with another.

Shapes: D documents, P = 128 values of a signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError
from data_pipeline.filters.ngrams import ngram_hashes

PLACES = 128
BANDS, BAND = 25, 5
_SEED = 1
_TOLERANCE = 0.1
_EMPTY = np.uint32(0xFFFFFFFF)


def check_library() -> str:
    """Name and version of the library. Raises CorpusError if rensa is not installed."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise CorpusError(
            "documents.duplicates near: requires the package rensa. Install it (pip install 'maskvr_ds[dedup]') "
            "or choose exact"
        ) from None
    from importlib.metadata import version

    return f"rensa {version('rensa')}"


class Signature:
    """MinHash signature of one document at a time, accumulated over its pieces."""

    def __init__(self, shingle: int) -> None:
        check_library()
        self._shingle = shingle
        self.reset()

    def reset(self) -> None:
        """Start a new document."""
        self._values = np.full(PLACES, _EMPTY, np.uint32)
        self._tail = np.empty(0, np.uint64)
        self._any = False

    def add(self, words: NDArray[np.uint64]) -> None:
        """Add a piece. words: uint64 [W], hashes of the next words of the document."""
        words = np.concatenate([self._tail, words])
        self._update(ngram_hashes(words, self._shingle))
        self._tail = words[-(self._shingle - 1) :] if self._shingle > 1 else words[:0]

    def _update(self, shingles: NDArray[np.uint64]) -> None:
        import rensa

        if len(shingles):
            offsets = np.array([0, len(shingles)], np.uint64)
            matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, PLACES, _SEED)
            np.minimum(self._values, np.array(matrix.to_rows()[0], np.uint32), out=self._values)
            self._any = True

    def end(self) -> NDArray[np.uint32]:
        """The signature, uint32 [P]. A document shorter than a shingle counts as one shingle."""
        if not self._any and len(self._tail):
            self._update(ngram_hashes(self._tail, len(self._tail)))
        return self._values


class MappedParts(Sequence[NDArray[Any]]):
    """Arrays [n, width] in files, given as (path, n > 0). One at a time is mapped: a map holds a descriptor, and there
    may be more files than a process may open."""

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: np.dtype, width: int) -> None:
        self._files, self._dtype, self._width = files, dtype, width
        self._mapped = -1
        self._array: NDArray[Any] = np.empty((0, width), dtype)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: Any) -> Any:
        if i != self._mapped:
            path, size = self._files[i]
            self._array, self._mapped = np.memmap(path, self._dtype, mode="r", shape=(size, self._width)), i
        return self._array

    def joined(self) -> NDArray[Any]:
        """All arrays in memory: [sum of n, width]."""
        out = np.empty((sum(size for _, size in self._files), self._width), self._dtype)
        start = 0
        for part in self:
            out[start : start + len(part)] = part
            start += len(part)
        return out


def exact_duplicates(digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether an earlier document has the same digest: bool [D]. digests: uint8 [D, 16]."""
    halves = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable sort: the first of equal documents stays first
    ordered = halves[order]
    out = np.zeros(len(digests), np.bool_)
    out[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return out


def band_keys(signatures: NDArray[np.uint32], bands: Sequence[int]) -> NDArray[np.uint64]:
    """Hashes of bands of signatures, including the band's index: uint64 [D, len(bands)]. signatures: uint32 [D, P]."""
    out = np.zeros((len(signatures), len(bands)), np.uint64)
    out[:] = np.array(bands, np.uint64)
    for place in range(BAND):
        out ^= signatures[:, [band * BAND + place for band in bands]]
        out *= np.uint64(0x9E3779B97F4A7C15)
        out ^= out >> np.uint64(29)
    return out


def _sharing(signatures: Sequence[NDArray[np.uint32]], usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a document shares a band with another usable one: bool [D]. signatures: parts of uint32 [D, P]."""
    shares = np.zeros(len(usable), np.bool_)
    for band in range(BANDS):
        keys = np.concatenate([band_keys(part, [band])[:, 0] for part in signatures])
        order = np.argsort(keys, kind="stable")
        order = order[usable[order]]
        same = keys[order[1:]] == keys[order[:-1]]
        shares[order[1:][same]] = True
        shares[order[:-1][same]] = True
    return shares


def near_duplicates(
    signatures: Sequence[NDArray[np.uint32]], usable: NDArray[np.bool_], similarity: float
) -> NDArray[np.bool_]:
    """Whether a document is a near-duplicate of an earlier kept one: bool [D], False if not usable.

    signatures: parts that concatenate to uint32 [D, P], for instance memory maps; usable: bool [D], documents not
    dropped yet. Documents without words have no near-duplicates.
    """
    out = np.zeros(len(usable), np.bool_)
    if not len(usable):
        return out
    empty = np.concatenate([(part == _EMPTY).all(axis=1) for part in signatures])
    bounds = np.cumsum([0, *map(len, signatures)])
    needed = int(np.ceil((similarity - _TOLERANCE) * PLACES))
    kept: list[NDArray[np.uint32]] = []
    buckets: dict[int, list[int]] = {}
    for document in np.flatnonzero(_sharing(signatures, usable & ~empty)).tolist():
        part = int(np.searchsorted(bounds, document, side="right")) - 1
        signature = np.array(signatures[part][document - bounds[part]])
        keys = band_keys(signature[None], range(BANDS))[0].tolist()
        candidates = sorted({other for key in keys for other in buckets.get(key, ())})
        if candidates and max((np.stack([kept[i] for i in candidates]) == signature).sum(axis=1)) >= needed:
            out[document] = True
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(signature)
    return out
