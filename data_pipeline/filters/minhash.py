"""MinHash signatures of documents (Broder 1997), by the library rensa, and which documents duplicate earlier ones.

Two signatures of P values agree in a share of places whose mean is the Jaccard similarity J of the documents' sets of
shingles, and whose standard deviation is √(J(1 − J)/P): 0.035 at J = 0.8 and P = 128. Documents whose signatures
agree in at least `similarity` − 0.1 of the places are near-duplicates: at J = `similarity` = 0.8 that misses 1 pair
in 400, at J = 0.5 it takes less than 1 in 100,000 for one.

Candidates come from 25 bands of 5 places (locality-sensitive hashing): a pair that agrees in no whole band is not
compared; at J = 0.8 that is 1 in 20,000. Documents are visited in order, those held out first, and each is compared
with those kept before it: every dropped document resembles a kept one, and no chain of similar documents drops what
resembles none.

Memory: a signature is 512 bytes on disk; finding duplicates needs 33 bytes a document in memory, and about 3 kB for
each one that shares a band with another.

Shapes: D documents, P = 128 places, S shingles.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """`rensa` and its version, for the manifest. Raises CorpusError where it is not installed."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise CorpusError(
            "documents.duplicates near: needs the package rensa. Install it (pip install 'maskvr_ds[dedup]') "
            "or choose exact"
        ) from None
    from importlib.metadata import version

    return f"rensa {version('rensa')}"


class Signature:
    """Signature of one document at a time, added up over its pieces."""

    def __init__(self, shingle: int) -> None:
        check_library()
        self._shingle = shingle
        self.begin()

    def begin(self) -> None:
        self._values = np.full(PLACES, _EMPTY, np.uint32)
        self._tail = np.empty(0, np.uint64)
        self._any = False

    def add(self, words: NDArray[np.uint64]) -> None:
        """words: uint64 [W], hashes of the next words of the document."""
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
        """uint32 [P]. A document shorter than a shingle is one shingle."""
        if not self._any and len(self._tail):
            self._update(ngram_hashes(self._tail, len(self._tail)))
        return self._values


def exact_duplicates(digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether an earlier document has the same digest. digests: uint8 [D, 16]; bool [D]."""
    halves = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first comes first
    ordered = halves[order]
    out = np.zeros(len(digests), np.bool_)
    out[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return out


def band_keys(signatures: NDArray[np.uint32], bands: Sequence[int]) -> NDArray[np.uint64]:
    """uint64 [D, len(bands)]: hashes of the bands' places and numbers. signatures: uint32 [D, P]."""
    out = np.zeros((len(signatures), len(bands)), np.uint64)
    out[:] = np.array(bands, np.uint64)
    for place in range(BAND):
        out ^= signatures[:, [band * BAND + place for band in bands]]
        out *= np.uint64(0x9E3779B97F4A7C15)
        out ^= out >> np.uint64(29)
    return out


def _sharing(signatures: Sequence[NDArray[np.uint32]], usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Documents that agree with another in a whole band: bool [D]. signatures: parts of uint32 [D, P]."""
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
    """Whether a document resembles an earlier one that is kept.

    signatures: parts that join to uint32 [D, P], for instance memory maps; usable: bool [D], documents that are not
    dropped already. Returns bool [D], False where not usable. A document without a word resembles none.
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
