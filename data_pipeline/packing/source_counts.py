"""What a corpus holds of each source of its description: the manifest's entries of the mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import MixtureEntry
from data_pipeline.tokenization.token_shards import SideReader, TokenManifest

# Documents whose hashes are held in memory: 32 MB.
_SAMPLE = 1 << 22


def sample_modulus(documents: int) -> int:
    """k: equal documents are looked for among those whose hash is a multiple of k. Equal ones have equal hashes, so
    that the sample has as large a share of repeated ones as the whole."""
    return max(1, documents // _SAMPLE)


def is_repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a hash was there before: uint64 [n] to bool [n]."""
    found = np.ones(len(hashes), np.bool_)
    found[np.unique(hashes, return_index=True)[1]] = False
    return found


def _repeated(folder: Path, manifest: TokenManifest, side: str) -> list[float | None]:
    """Of each source, the share of its documents that equal an earlier one; None where nothing says so."""
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
    """Of one side. weights, documents, tokens: of each source, as the corpus has them. Nothing for sources without a
    name."""
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
