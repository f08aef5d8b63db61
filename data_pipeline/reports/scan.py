"""What a corpus holds, read from its rows: the counts behind `stats`, and the deep half of `verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError
from data_pipeline.packing.source_counts import sample_modulus
from data_pipeline.shards import (
    HELD_OUT,
    MANIFEST,
    Corpus,
    Manifest,
    SpecialTokens,
    check_tokenizer,
    read_manifest,
    verify_shards,
)

_ROWS = 1 << 14
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Scan:
    """Counts over a corpus: `counts` int64 [V], how often each id occurs; `lengths` documents of each
    length; `hashes` of documents, of the sample of mixture.sample_modulus."""

    counts: NDArray[np.int64]
    lengths: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    modulus: int = 1

    @property
    def documents(self) -> int:
        return sum(self.lengths.values())

    def length_quantiles(self) -> list[int]:
        """Tokens of the document at each of QUANTILES (the next one where it falls between two)."""
        lengths = np.array(sorted(self.lengths), np.int64)
        ranks = np.cumsum([self.lengths[length] for length in lengths.tolist()])
        wanted = np.ceil(np.array(QUANTILES) * ranks[-1]).clip(min=1)
        return lengths[np.searchsorted(ranks, wanted)].tolist()


def scan(corpus: Corpus, progress: Callable[[int], object] | None = None, hashes: bool = False) -> Scan:
    """Read all rows once, in blocks; `progress` is called with the bytes read. Faults name shard and row.

    hashes: whether to hash documents, so as to find equal ones.
    """
    manifest = corpus.manifest
    special = manifest.special_tokens
    result = Scan(np.zeros(manifest.vocab_size, np.int64), modulus=sample_modulus(manifest.documents))
    # A pair's [SEP] end no documents: these cannot be counted.
    pairs = manifest.packing in ("nsp", "sop")
    begun, begun_hash = 0, np.zeros(1, np.uint64)  # tokens, hash of the document that goes on in the next block
    for i, shard in enumerate(manifest.shards):
        ids, ends = corpus.input_ids(i), corpus.document_end(i)
        for first in range(0, len(ids), _ROWS):
            block = ids[first : first + _ROWS]
            if block.max() >= manifest.vocab_size:
                row = first + int((block >= manifest.vocab_size).any(axis=1).argmax())
                result.faults.append(
                    f"{corpus.folder / shard.file}: row {row:,} has the id {block.max()}, not below the "
                    f"vocabulary size {manifest.vocab_size:,}. Build the corpus again"
                )
                break
            if (block[:, 0] != special.cls).any():
                row = first + int((block[:, 0] != special.cls).argmax())
                result.faults.append(
                    f"{corpus.folder / shard.file}: row {row:,} does not begin with [CLS] ({special.cls}). "
                    "Build the corpus again"
                )
            result.counts += np.bincount(block.reshape(-1), minlength=manifest.vocab_size)
            if not pairs:
                here = block[:, 1:], ends[first : first + _ROWS], special, begun
                if hashes:
                    found, begun_hash = _hash_documents(*here, begun_hash)
                    result.hashes.append(found[found % np.uint64(result.modulus) == 0])
                begun = _count_lengths(result.lengths, *here)
            if progress:
                progress(block.nbytes)
    return result


def _count_lengths(
    lengths: dict[int, int],
    ids: NDArray[np.unsignedinteger],
    document_end: NDArray[np.bool_],
    special: SpecialTokens,
    begun: int,
) -> int:
    """Add the lengths of the documents that end in a block of rows, [CLS] cut off: ids [R, L - 1].

    `begun` tokens belong to the first of them already; returns how many are left over behind the last.
    """
    separators = ids == special.sep
    tokens = ~separators & (ids != special.pad)
    # The final [SEP] closes the row; it closes a document too only where the bit says so.
    separators[:, -1] &= document_end
    so_far = np.cumsum(tokens.reshape(-1))
    at_end = so_far[separators.reshape(-1)]
    if len(at_end) == 0:
        return begun + int(so_far[-1])
    found = np.diff(at_end, prepend=-begun)
    for length, count in zip(*(a.tolist() for a in np.unique(found, return_counts=True)), strict=True):
        lengths[length] = lengths.get(length, 0) + count
    return int(so_far[-1] - at_end[-1])


def _hash_documents(
    ids: NDArray[np.unsignedinteger],
    document_end: NDArray[np.bool_],
    special: SpecialTokens,
    begun: int,
    begun_hash: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of the documents that end in a block of rows (arguments as of `_count_lengths`), and that of what is left
    over, uint64 [1].

    A document's hash is the sum, modulo 2^64, of mixed (token, place in the document): sums of pieces add up.
    """
    separators = ids == special.sep
    tokens = (~separators & (ids != special.pad)).reshape(-1)
    separators[:, -1] &= document_end
    at = np.flatnonzero(separators)
    so_far = np.cumsum(tokens)
    starts = np.concatenate([[-begun], so_far[at]])
    place = so_far - np.repeat(starts, np.diff(np.concatenate([[0], at + 1, [len(so_far)]])))
    mixed = (ids.reshape(-1).astype(np.uint64) << np.uint64(32)) + place.astype(np.uint64)
    for shift in (30, 27):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed[~tokens] = 0
    sums = np.cumsum(mixed)
    found = np.diff(sums[at], prepend=np.uint64(0))
    # Arrays, not scalars: NumPy warns where these wrap.
    if len(found):
        found[:1] += begun_hash
        return found, sums[-1:] - sums[at[-1:]]
    return found, sums[-1:] + begun_hash


def verify(folder: str | Path, progress: Callable[[int], object] | None = None) -> list[Manifest]:
    """Check a corpus in full, and the held-out corpus inside of it; returns their manifests.

    Tokenizer, size and SHA-256 of every shard, then from the rows: ids below the vocabulary size, and the
    numbers of tokens and documents. `progress` is called with the bytes read.
    Raises one CorpusError that has a line for every fault.
    """
    folders = [Path(folder)]
    if (folders[0] / HELD_OUT).exists():
        folders.append(folders[0] / HELD_OUT)
    manifests, faults = [], []
    for one in folders:
        try:
            manifests.append(_verify_one(one, progress))
        except CorpusError as error:
            faults.append(str(error))
    if faults:
        raise CorpusError("\n".join(faults))
    return manifests


def _verify_one(folder: Path, progress: Callable[[int], object] | None) -> Manifest:
    manifest = read_manifest(folder)
    faults = []
    for check in (
        lambda: check_tokenizer(folder, manifest),
        lambda: verify_shards(folder, manifest, progress=progress),
    ):
        try:
            check()
        except CorpusError as error:
            faults.append(str(error))
    if not faults:
        found = scan(Corpus(folder), progress)
        faults += found.faults
        tokens = int(found.counts.sum() - found.counts[manifest.special_tokens.pad])
        for name, said, counted in (
            ("tokens", manifest.tokens, tokens),
            ("documents", manifest.documents, found.documents),
        ):
            counts = name != "documents" or manifest.packing not in ("nsp", "sop")
            if counts and said != counted and not found.faults:
                faults.append(
                    f"{folder / MANIFEST}: {said:,} {name} stated, {counted:,} found in the shards. "
                    "Restore the manifest or build the corpus again"
                )
    if faults:
        raise CorpusError("\n".join(faults))
    return manifest
