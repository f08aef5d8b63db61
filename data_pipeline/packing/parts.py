"""Packing options, and the stream of documents that they select from the token shards: its parts, and their readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import COLUMNS, HELD_OUT
from data_pipeline.tokenization.token_shards import SideReader, TokenManifest

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class PackOptions:
    """Packing options. bins: ascending row lengths for `documents`, the last of which is the sequence length;
    probability: of the label of a pair; columns: of word_start and sentence_start, those to store; weights: per source;
    shard_size: in MB."""

    sequence_length: int
    packing: str
    bins: tuple[int, ...]
    probability: float
    columns: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int
    shard_size: float

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Optional columns of the shards, in the order of COLUMNS."""
        wanted = {*self.columns, *(("segment_start", "pair_label") if self.packing in ("nsp", "sop") else ())}
        return tuple(column for column in COLUMNS if column in wanted)

    def rows_per_shard(self, length: int, dtype: np.dtype) -> int:
        planes = sum(column in ("word_start", "sentence_start") for column in self.columns)
        pair = 17 if self.packing in ("nsp", "sop") else 0
        bits = length * (8 * dtype.itemsize + planes) + 1 + pair
        return max(int(self.shard_size * 1e6) * 8 // bits, 1)


@dataclass(frozen=True)
class Part:
    """One copy of the documents of a token shard."""

    shard: int
    copy: int


def make_parts(manifest: TokenManifest, side: str, weights: Sequence[float]) -> list[Part]:
    """The parts of the stream of one side, in order."""
    uses = [1.0 if side == HELD_OUT else weights[shard.source] for shard in manifest.shards]
    copies = math.ceil(max(uses, default=0))
    return [Part(i, copy) for copy in range(copies) for i, weight in enumerate(uses) if weight > copy]


def open_part(
    folder: str | Path, manifest: TokenManifest, side: str, part: Part, weights: Sequence[float]
) -> SideReader:
    """Reader of a part, restricted to the documents that the weight of its source selects."""
    shard = manifest.shards[part.shard]
    share = 1.0 if side == HELD_OUT else min(weights[shard.source] - part.copy, 1.0)
    keep = None
    if share < 1:
        reader = SideReader(folder, manifest, part.shard, side)
        keys = reader.keys()
        # Hash again: the held-out split was selected by the same bits.
        mixed = (keys ^ (keys >> np.uint64(31))) * _GOLDEN
        keep = (mixed ^ (mixed >> np.uint64(29))) * _GOLDEN < np.uint64(share * 2.0**64)
    return SideReader(folder, manifest, part.shard, side, keep)
