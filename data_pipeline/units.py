"""Stage 1: a unit of work becomes token files, which stage 2 packs.

For each side ("train", and "held_out" where asked for) a unit leaves two files in the work folder:

    unit-00000.train.ids     the stream: ids of its documents in order, each document closed by [SEP]
    unit-00000.train.ends    int64, positions of these [SEP] in the file: the documents' boundaries

Documents without a single token are left out, and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.documents import batches, read_documents
from data_pipeline.files import HashingFile, atomic_file, sha256_file
from data_pipeline.shards import SpecialTokens, id_dtype
from data_pipeline.sources import Piece, Progress, Source
from data_pipeline.tokenizer import Encoder

# Larger batches gain nothing: the tokenizer's own bookkeeping is some hundred bytes a token.
_BATCH = 1 << 20
SIDES = ("train", "held_out")


@dataclass(frozen=True)
class Job:
    """What all tasks of a build share. Folders as strings; `held_out` in [0, 1)."""

    work: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    special_tokens: SpecialTokens
    sequence_length: int
    documents: str
    text_field: str
    held_out: float
    seed: int

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocab_size)

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.held_out else SIDES[:1]

    def stream_path(self, unit: int, side: str) -> Path:
        return Path(self.work) / f"unit-{unit:05}.{side}.ids"

    def ends_path(self, unit: int, side: str) -> Path:
        return Path(self.work) / f"unit-{unit:05}.{side}.ends"


@lru_cache(maxsize=1)
def load_encoder(folder: str, sha256: str) -> Encoder:
    """The tokenizer, loaded once a process. `sha256` is part of the cache's key only."""
    return Encoder(folder)


class _StreamWriter:
    """Appends documents to the two files of one side of a unit."""

    def __init__(self, ids: HashingFile, ends: HashingFile, sep: int) -> None:
        self._ids, self._ends, self._sep = ids, ends, sep
        self._begun = 0  # tokens of the document that goes on in the next batch
        self.length = self.documents = self.empty = 0

    def add(self, ids: NDArray[np.unsignedinteger], counts: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        """ids: [T] of n texts; counts: int64 [n], ids of each; ended: bool [n], whether a document ends with
        it."""
        stops = np.cumsum(counts)
        tokens = np.diff(stops[ended], prepend=0)
        if len(tokens):
            tokens[0] += self._begun
            self._begun = len(ids) - int(stops[ended][-1])
        else:
            self._begun += len(ids)
        full = tokens > 0
        at = stops[ended][full]
        self._ids.write(np.insert(ids, at, self._sep).data)
        self._ends.write((self.length + at + np.arange(len(at))).data)
        self.length += len(ids) + len(at)
        self.documents += len(at)
        self.empty += len(tokens) - len(at)


def tokenize_unit(job: Job, unit: int, pieces: Sequence[tuple[Source, Piece]], progress: Progress) -> dict[str, Any]:
    """Write the token files of one unit.

    Returns {side: {"documents", "length" (ids of the stream), "empty"}, "sha256": {source name: hex}}; a
    source is hashed with its first piece, while it is warm in the page cache.
    """
    encoder = load_encoder(job.tokenizer, job.tokenizer_sha256)
    result: dict[str, Any] = {"sha256": {}}
    with ExitStack() as stack:
        writers = [
            _StreamWriter(
                stack.enter_context(atomic_file(job.stream_path(unit, side))),
                stack.enter_context(atomic_file(job.ends_path(unit, side))),
                encoder.special_tokens.sep,
            )
            for side in job.sides
        ]
        for source, piece in pieces:
            source.check_unchanged()
            if piece.start == 0:
                result["sha256"][source.name] = sha256_file(Path(source.path))
            begun: bool | None = None
            for texts, ends in batches(read_documents(source, piece, job.documents, job.text_field, progress), _BATCH):
                ids, counts = encoder.encode(texts)
                ended = np.array(ends)
                progress(0, len(ids))
                if not job.held_out:
                    writers[0].add(ids, counts, ended)
                    continue
                held = _held_out(job, texts, ends, begun)
                begun = None if ends[-1] else bool(held[-1])
                for writer, mine in zip(writers, (~held, held), strict=True):
                    writer.add(ids[np.repeat(mine, counts)], counts[mine], ended[mine])
            source.check_unchanged()
        for side, writer in zip(job.sides, writers, strict=True):
            result[side] = {
                "documents": writer.documents,
                "length": writer.length,
                "empty": writer.empty,
            }
    return result


def _held_out(job: Job, texts: list[str], ends: list[bool], begun: bool | None) -> NDArray[np.bool_]:
    """Side of each text: a function of the seed and the document's text (of its first piece) alone, so equal
    documents are on one side. `begun` is the side of the document that the first text continues, or None."""
    key = str(job.seed).encode()
    held = np.empty(len(texts), np.bool_)
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        if begun is None:
            digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
            begun = int.from_bytes(digest, "little") < job.held_out * 2**64
        held[i] = begun
        if end:
            begun = None
    return held
