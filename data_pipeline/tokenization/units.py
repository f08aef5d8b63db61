"""Tokenization of one unit of work: reads and filters its documents and writes them as a token shard.

Documents without tokens are dropped and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import fsync_path
from data_pipeline.filters.minhash import PLACES
from data_pipeline.filters.rules import DIGEST, DocumentFilter, DocumentRules
from data_pipeline.shards import SpecialTokens, id_dtype
from data_pipeline.sources.documents import batches, read_documents
from data_pipeline.sources.inputs import Piece, Progress, Source
from data_pipeline.sources.reading import LIMITS, Limits, Reading
from data_pipeline.sources.sentences import TAIL, sentence_starts
from data_pipeline.tokenization.token_shards import DROPS, PLANES, SIDES, SideWriter
from data_pipeline.tokenization.tokenizer import Encoder

# Characters per batch. Larger ones are no faster and cost memory: the tokenizer needs some hundred bytes per token.
_BATCH = 1 << 20
# Per-document files that only the search for duplicates reads; deleted afterwards.
TEMPORARY = ("late", "digests", "signatures")


@dataclass(frozen=True)
class Job:
    """Settings shared by the tokenization tasks of a build.

    work: folder of the token shards; documents, text_fields: document format and text field of each source; sentences:
    mode of sentences.sentence_starts, or None; words: store word starts; keys: store a hash of each document; ngrams:
    file with the n-grams of task files, or ""; held_out: share of documents, in [0, 1);
    held_out_files: names of the files to hold out, instead of that share; None: documents are held out.
    """

    work: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    special_tokens: SpecialTokens
    documents: tuple[str, ...]
    text_fields: tuple[str, ...]
    rules: DocumentRules
    sentences: str | None
    words: bool
    keys: bool
    ngrams: str
    held_out: float
    seed: int
    limits: Limits = LIMITS
    held_out_files: frozenset[str] | None = None

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocab_size)

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.held_out else SIDES[:1]

    @property
    def planes(self) -> tuple[str, ...]:
        wanted = {"word_start": self.words, "sentence_start": self.sentences is not None}
        return tuple(plane for plane in PLANES if wanted[plane])

    @property
    def of_documents(self) -> tuple[str, ...]:
        """Suffixes of the files with one row per document, except `ends`."""
        rules = self.rules
        wanted = {
            "keys": self.keys,
            "late": rules.bad_bytes == "skip" or bool(rules.decontaminate),
            "digests": rules.duplicates != "keep",
            "signatures": rules.duplicates == "near",
        }
        return tuple(name for name in wanted if wanted[name])


@lru_cache(maxsize=1)
def load_encoder(folder: str, sha256: str) -> Encoder:
    """Load the tokenizer once per process. `sha256` only serves as part of the cache key."""
    return Encoder(folder)


@lru_cache(maxsize=1)
def _load_ngrams(path: str) -> NDArray[np.uint64]:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def tokenize_unit(
    job: Job, unit: int, group: int, pieces: Sequence[tuple[Source, Piece]], progress: Progress
) -> dict[str, Any]:
    """Write the token shard of one unit; all its pieces belong to source `group`.

    Returns {"source", "sides": {side: TokenSide as a dict}, "empty", "dropped", "replaced", "sha256": {file name:
    hex}}. A file is hashed along with its first piece, while it is in the page cache.
    """
    encoder = load_encoder(job.tokenizer, job.tokenizer_sha256)
    fingerprints = job.rules.duplicates != "keep"
    ngrams = _load_ngrams(job.ngrams) if job.ngrams else None
    rule_filter = DocumentFilter(job.rules, fingerprints, ngrams) if job.rules != DocumentRules() else None
    sha256: dict[str, str] = {}
    rules = job.rules
    reading = Reading(rules.bad_bytes != "error", rules.no_text, rules.bad_records, job.limits)
    with ExitStack() as stack:
        special = encoder.special_tokens
        writers = {
            side: SideWriter(stack, job.work, unit, side, special, planes=job.planes, documents=job.of_documents)
            for side in job.sides
        }
        for source, piece in pieces:
            source.check_unchanged()
            if piece.start == 0:
                sha256[source.name] = source.sha256()
            found = read_documents(source, piece, job.documents[group], job.text_fields[group], progress, reading)
            for batch in _encode(job, encoder, rule_filter, batches(found, _BATCH)):
                progress(0, len(batch[0]))
                _write(job, writers, source.name, *batch)
            source.check_unchanged()
        for writer in writers.values():
            writer.finish()
    fsync_path(Path(job.work))
    return {
        "source": group,
        "sides": {side: writer.entry().model_dump() for side, writer in writers.items()},
        "empty": sum(writer.empty for writer in writers.values()),
        "dropped": dict(reading.skipped + (rule_filter.dropped if rule_filter else Counter())),
        "replaced": rule_filter.replaced if rule_filter else 0,
        "sha256": sha256,
    }


_Batch = tuple[
    NDArray[np.unsignedinteger],
    NDArray[np.int64],
    NDArray[np.bool_],
    NDArray[np.uint64],
    dict[str, NDArray[np.bool_]],
    dict[str, NDArray[Any]],
]
"""ids [T], counts [n], ended [n], keys [n] (or [0]), planes [T], and per-document arrays for documents that end."""


def _encode(
    job: Job, encoder: Encoder, rule_filter: DocumentFilter | None, found: Iterator[tuple[list[str], list[bool]]]
) -> Iterator[_Batch]:
    key: int | None = None  # of the document that continues in the next batch
    before = ""
    for texts, ends in found:
        of_documents: dict[str, NDArray[Any]] = {}
        if rule_filter:
            filtered = rule_filter(texts, ends)
            texts, ends = filtered.texts, filtered.ends
            if not texts:
                continue
            codes = [DROPS.index(fault) + 1 if fault else 0 for fault in filtered.late]
            of_documents["late"] = np.array(codes, np.uint8)
            of_documents["digests"] = np.frombuffer(b"".join(filtered.digests), np.uint8).reshape(-1, DIGEST)
            of_documents["signatures"] = np.array(filtered.signatures, np.uint32).reshape(-1, PLACES)
        starts = None
        if job.sentences:
            starts = []
            for text, end in zip(texts, ends, strict=True):
                starts.append(sentence_starts(text, job.sentences, before))
                before = "" if end else (before + text)[-TAIL:]
        ids, counts, planes = encoder.encode_planes(texts, starts, job.words)
        ended = np.array(ends)
        keys = np.empty(0, np.uint64)
        if job.held_out or job.keys:
            keys = _keys(job, texts, ends, key)
            key = None if ends[-1] else int(keys[-1])
            of_documents["keys"] = keys[ended]
        yield ids, counts, ended, keys, planes, {name: of_documents[name] for name in job.of_documents}


def _write(
    job: Job,
    writers: dict[str, SideWriter],
    file: str,
    ids: NDArray[np.unsignedinteger],
    counts: NDArray[np.int64],
    ended: NDArray[np.bool_],
    keys: NDArray[np.uint64],
    planes: dict[str, NDArray[np.bool_]],
    of_documents: dict[str, NDArray[Any]],
) -> None:
    if not job.held_out:
        writers["train"].add(ids, counts, ended, planes, of_documents)
        return
    held = keys < job.held_out * 2.0**64
    if job.held_out_files is not None:
        held = np.full(len(keys), file in job.held_out_files)
    for side, mine in (("train", ~held), ("held_out", held)):
        tokens = np.repeat(mine, counts)
        writers[side].add(
            ids[tokens],
            counts[mine],
            ended[mine],
            {name: plane[tokens] for name, plane in planes.items()},
            {name: values[mine[ended]] for name, values in of_documents.items()},
        )


def files_to_hold_out(names: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """The share of the files, at least one, whose names have the smallest hashes with `seed`."""

    def key(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), digest_size=8, key=str(seed).encode()).digest()

    return frozenset(sorted(names, key=key)[: max(1, round(share * len(names)))])


def _keys(job: Job, texts: list[str], ends: list[bool], key: int | None) -> NDArray[np.uint64]:
    """Hash of each text's document, uint64 [n]: a function of the seed and the document's first piece alone, so that
    equal documents fall on the same side. key: of the document that the first text continues, or None."""
    secret = str(job.seed).encode()
    keys = np.empty(len(texts), np.uint64)
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        if key is None:
            key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=secret).digest(), "little")
        keys[i] = key
        if end:
            key = None
    return keys
