"""Small corpora of sentence pairs whose labels can be learnt from the words."""

from pathlib import Path

import numpy as np

from data_pipeline.files import sha256_file
from data_pipeline.shards import Manifest, SpecialTokens, write_manifest, write_shard
from tests.support.corpora import CLS, MASK, PAD, SEP, SPECIAL, UNK, make_tokenizer

LENGTH = 24
_WORDS = 20


def make_pairs(folder: Path, packing: str, *, rows: int = 240, seed: int = 0, shard_rows: int = 100) -> Path:
    """Write a corpus as `--packing nsp` or `sop` does, half of the rows with label 1.

    The words of first segments are w0 … w9, those of second ones w10 … w19; with label 1 the two are swapped (sop), or
    the second has words of first ones (nsp). Segments are progressions, of random lengths; rows are padded.
    """
    vocab_size = make_tokenizer(folder / "tokenizer", _WORDS)
    random = np.random.default_rng(seed)
    ids = np.full((rows, LENGTH), PAD, np.uint16)
    starts, labels = np.zeros(rows, np.uint16), random.random(rows) < 0.5
    for row, label in enumerate(labels):
        halves = {"sop": (label, not label), "nsp": (0, not label)}[packing]
        segments = [_segment(random, int(half)) for half in halves]
        found = [CLS, *segments[0], SEP, *segments[1], SEP]
        ids[row, : len(found)] = found
        starts[row] = len(segments[0]) + 2
    shards = []
    for first in range(0, rows, shard_rows):
        here = slice(first, first + shard_rows)
        columns = {"segment_start": starts[here], "pair_label": labels[here]}
        name = f"shard-{len(shards):05d}.arrow"
        shards.append(write_shard(folder, name, ids[here], np.zeros(len(ids[here]), bool), columns))
    write_manifest(
        folder,
        Manifest(
            schema_version=2,
            tokenizer_sha256=sha256_file(folder / "tokenizer" / "tokenizer.json"),
            vocab_size=vocab_size,
            special_tokens=SpecialTokens(cls=CLS, sep=SEP, pad=PAD, mask=MASK, unk=UNK, all=tuple(range(len(SPECIAL)))),
            sequence_length=LENGTH,
            seed=0,
            packing=packing,
            rows=rows,
            tokens=int((ids != PAD).sum()),
            documents=rows,
            sources=(),
            shards=tuple(shards),
            columns=("segment_start", "pair_label"),
            labelled=int(labels.sum()),
            pair_probability=0.5,
        ),
    )
    return folder


def _segment(random: np.random.Generator, half: int) -> np.ndarray:
    words = _WORDS // 2
    return len(SPECIAL) + half * words + (random.integers(words) + np.arange(random.integers(4, 10))) % words
