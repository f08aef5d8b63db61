"""Scan of all rows of a corpus: the counts for the command stats, and the checks of the command verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.checksums import is_hashed
from data_pipeline.files import CorpusError, sha256_file
from data_pipeline.numbers import counted
from data_pipeline.packing.source_counts import sample_modulus
from data_pipeline.shards import (
    HELD_OUT,
    MANIFEST,
    TOKENIZER,
    Corpus,
    Manifest,
    SpecialTokens,
    beyond_vocabulary,
    check_tokenizer,
    read_manifest,
    verify_shards,
)
from data_pipeline.tokenization.token_shards import TOKENS_REMEDY, TokenManifest, size_fault, token_files
from data_pipeline.tokenization.tokenizer import Encoder

_ROWS = 1 << 14
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Scan:
    """Result of a scan. counts: int64 [V], occurrences of each id; lengths: number of documents by length; faults: one
    message per bad row; hashes: of the documents sampled with `modulus` (packing.source_counts.sample_modulus)."""

    counts: NDArray[np.int64]
    lengths: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    modulus: int = 1

    @property
    def documents(self) -> int:
        return sum(self.lengths.values())

    def length_quantiles(self) -> list[int]:
        """Document lengths in tokens at QUANTILES, rounded up to the next document."""
        lengths = np.array(sorted(self.lengths), np.int64)
        ranks = np.cumsum([self.lengths[length] for length in lengths.tolist()])
        wanted = np.ceil(np.array(QUANTILES) * ranks[-1]).clip(min=1)
        return lengths[np.searchsorted(ranks, wanted)].tolist()


def scan(corpus: Corpus, progress: Callable[[int], object] | None = None, hashes: bool = False) -> Scan:
    """Read all rows once, in blocks. progress: called with the bytes read; hashes: also hash documents, to find equal
    ones."""
    manifest = corpus.manifest
    special = manifest.special_tokens
    result = Scan(np.zeros(manifest.vocab_size, np.int64), modulus=sample_modulus(manifest.documents))
    # The [SEP] of pairs do not end documents, so these cannot be counted.
    pairs = manifest.packing in ("nsp", "sop")
    # Tokens and hash of the document that continues in the next block.
    pending, pending_hash = 0, np.zeros(1, np.uint64)
    for i, shard in enumerate(manifest.shards):
        ids, ends = corpus.input_ids(i), corpus.document_end(i)
        for first in range(0, len(ids), _ROWS):
            block = ids[first : first + _ROWS]
            if fault := beyond_vocabulary(corpus.folder / shard.file, first, block, manifest.vocab_size):
                result.faults.append(fault)
                break
            if (block[:, 0] != special.cls).any():
                row = first + int((block[:, 0] != special.cls).argmax())
                result.faults.append(
                    f"{corpus.folder / shard.file}: row {row:,} does not start with [CLS] ({special.cls}). "
                    "Build the corpus again"
                )
            result.counts += np.bincount(block.reshape(-1), minlength=manifest.vocab_size)
            if not pairs:
                here = block[:, 1:], ends[first : first + _ROWS], special, pending
                if hashes:
                    found, pending_hash = _hash_documents(*here, pending_hash)
                    result.hashes.append(found[found % np.uint64(result.modulus) == 0])
                pending = _count_lengths(result.lengths, *here)
            if progress:
                progress(block.nbytes)
    return result


def _count_lengths(
    lengths: dict[int, int],
    ids: NDArray[np.unsignedinteger],
    document_end: NDArray[np.bool_],
    special: SpecialTokens,
    pending: int,
) -> int:
    """Add the lengths of the documents that end in a block of rows to `lengths`.

    ids: [R, L - 1], without [CLS]; document_end: bool [R]; pending: tokens of the first document in earlier blocks.
    Returns the number of tokens after the last document end.
    """
    separators = ids == special.sep
    tokens = ~separators & (ids != special.pad)
    # The final [SEP] of a row ends a document only if the bit is set.
    separators[:, -1] &= document_end
    so_far = np.cumsum(tokens.reshape(-1))
    at_end = so_far[separators.reshape(-1)]
    if len(at_end) == 0:
        return pending + int(so_far[-1])
    found = np.diff(at_end, prepend=-pending)
    for length, count in zip(*(a.tolist() for a in np.unique(found, return_counts=True)), strict=True):
        lengths[length] = lengths.get(length, 0) + count
    return int(so_far[-1] - at_end[-1])


def _hash_documents(
    ids: NDArray[np.unsignedinteger],
    document_end: NDArray[np.bool_],
    special: SpecialTokens,
    pending: int,
    pending_hash: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of the documents that end in a block of rows, and the hash of the tokens after them, uint64 [1].

    Arguments as in `_count_lengths`. The hash of a document is the sum, modulo 2^64, of mixed (token, position in the
    document), so that the hashes of pieces can be added.
    """
    separators = ids == special.sep
    tokens = (~separators & (ids != special.pad)).reshape(-1)
    separators[:, -1] &= document_end
    at = np.flatnonzero(separators)
    so_far = np.cumsum(tokens)
    starts = np.concatenate([[-pending], so_far[at]])
    place = so_far - np.repeat(starts, np.diff(np.concatenate([[0], at + 1, [len(so_far)]])))
    mixed = (ids.reshape(-1).astype(np.uint64) << np.uint64(32)) + place.astype(np.uint64)
    for shift in (30, 27):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    mixed[~tokens] = 0
    sums = np.cumsum(mixed)
    found = np.diff(sums[at], prepend=np.uint64(0))
    # Arrays of length 1, since NumPy warns when scalars overflow.
    if len(found):
        found[:1] += pending_hash
        return found, sums[-1:] - sums[at[-1:]]
    return found, sums[-1:] + pending_hash


def verify(folder: str | Path, progress: Callable[[int], object] | None = None) -> list[Manifest]:
    """Check all data of a corpus and of its held-out corpus, if any; returns their manifests.

    Checks the tokenizer, size and SHA-256 of every shard, then all rows: [CLS], ids below the vocabulary size, and the
    numbers of tokens and documents. Of a manifest without a hash of itself, special tokens and vocabulary size are
    compared with the tokenizer. progress: called with the bytes read.
    Raises one CorpusError with one line per fault.
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


def verify_tokens(folder: str | Path, manifest: TokenManifest, progress: Callable[[int], object] | None = None) -> None:
    """Check size and SHA-256 of every file, and the SHA-256 of the tokenizer. progress: called with the bytes read.

    Raises one CorpusError with one line per bad file.
    """
    tokenizer = Path(folder) / TOKENIZER / "tokenizer.json"
    if tokenizer.is_file():
        found = [_hash_fault(tokenizer, manifest.tokenizer_sha256, None)]
    else:
        found = [f"{tokenizer}: file missing. {TOKENS_REMEDY}"]
    found += [
        size_fault(path, file) or _hash_fault(path, file.sha256, progress)
        for path, file in token_files(folder, manifest)
    ]
    if faults := [fault for fault in found if fault]:
        raise CorpusError("\n".join(faults))


def _hash_fault(path: Path, expected: str, progress: Callable[[int], object] | None) -> str | None:
    """One sentence if a file differs from its SHA-256."""
    found = sha256_file(path, progress)
    return None if found == expected else f"{path}: sha256 {expected} expected, {found} found. {TOKENS_REMEDY}"


def shards_of(manifests: list[Manifest]) -> str:
    """How many shards `verify` has checked, in words."""
    found, *held_out = (counted(len(manifest.shards), "shard") for manifest in manifests)
    return found + "".join(f" and {others} of its held-out split" for others in held_out)


def _verify_one(folder: Path, progress: Callable[[int], object] | None) -> Manifest:
    manifest = read_manifest(folder)
    faults = []
    for check in (
        lambda: check_tokenizer(folder, manifest),
        lambda: _check_unhashed(folder, manifest),
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
        for name, stated, number in (
            ("tokens", manifest.tokens, tokens),
            ("documents", manifest.documents, found.documents),
        ):
            known = name != "documents" or manifest.packing not in ("nsp", "sop")
            if known and stated != number and not found.faults:
                faults.append(
                    f"{folder / MANIFEST}: {stated:,} {name} stated, {number:,} found in the shards. "
                    "Restore the manifest or build the corpus again"
                )
    if faults:
        raise CorpusError("\n".join(faults))
    return manifest


def _check_unhashed(folder: Path, manifest: Manifest) -> None:
    """Compare a manifest without a hash of itself with the corpus's tokenizer: the roles that training uses, and the
    vocabulary size. Raises CorpusError if they differ.
    """
    if is_hashed(folder / MANIFEST):
        return
    encoder = Encoder(folder / TOKENIZER)
    found = {"vocab_size": (manifest.vocab_size, encoder.vocab_size)} | {
        f"special_tokens.{role}": (getattr(manifest.special_tokens, role), getattr(encoder.special_tokens, role))
        for role in ("cls", "sep", "pad", "mask")
    }
    if faults := [f"{name} is {stated}, {of}" for name, (stated, of) in found.items() if stated != of]:
        raise CorpusError(
            f"{folder / MANIFEST}: {'; '.join(f'{fault} in the tokenizer' for fault in faults)}. "
            "Restore the manifest or build the corpus again"
        )
