"""Per-source counts of a corpus: the mixture entries of its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import MixtureEntry
from data_pipeline.tokenization.token_shards import SideReader, TokenManifest

# Maximum number of document hashes held in memory: 32 MB.
_SAMPLE = 1 << 22


def sample_modulus(documents: int) -> int:
    """k such that repeated documents are counted among those whose hash is a multiple of k. Equal documents have equal
    hashes, so the share of repeated documents in this sample is an estimate for the corpus."""
    return max(1, documents // _SAMPLE)


def is_repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether an equal hash occurs earlier: bool [n]. hashes: uint64 [n]."""
    found = np.ones(len(hashes), np.bool_)
    found[np.unique(hashes, return_index=True)[1]] = False
    return found


def _repeated(folder: Path, manifest: TokenManifest, side: str) -> list[float | None]:
    """Share of documents that equal an earlier one, for each source; None if hashes were not stored."""
    names, shards = manifest.names, manifest.shards
    if not all("keys" in shard.sides[side].files for shard in shards):
        return [None] * len(names)
    modulus = np.uint64(sample_modulus(sum(shard.sides[side].documents for shard in shards)))
    samples = []
    for i in range(len(shards)):
        keys = SideReader(folder, manifest, i, side).kept_keys()
        samples.append(keys[keys % modulus == 0])
    repeated = is_repeated(np.concatenate(samples))
    sources = np.repeat([shard.source for shard in shards], [len(sample) for sample in samples])
    counts, again = (np.bincount(s, minlength=len(names)).tolist() for s in (sources, sources[repeated]))
    return [m / n if n else None for m, n in zip(again, counts, strict=True)]


def mixture_entries(
    folder: Path,
    manifest: TokenManifest,
    side: str,
    weights: Sequence[float],
    documents: Sequence[int],
    tokens: Sequence[int],
) -> tuple[MixtureEntry, ...]:
    """Mixture entries of one side, empty for sources without names. weights, documents, tokens: per source, as in the
    corpus."""
    if manifest.names == ("",):
        return ()
    found = []
    repeated = _repeated(folder, manifest, side)
    for i, name in enumerate(manifest.names):
        mine = [shard for shard in manifest.shards if shard.source == i]
        text = sum(shard.sides[side].length - shard.sides[side].documents for shard in mine)
        unknown = sum(shard.sides[side].unknown for shard in mine)
        dropped = sum((Counter(shard.dropped) for shard in mine), Counter[str]())
        found.append(
            MixtureEntry(
                name=name,
                weight=weights[i],
                documents=documents[i],
                tokens=tokens[i],
                unknown=unknown / text if text else None,
                repeated=repeated[i],
                dropped=dict(sorted(dropped.items())),
            )
        )
    return tuple(found)
