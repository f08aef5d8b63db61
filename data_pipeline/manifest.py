"""The corpus manifest: schema, validation, reading and writing. Training imports it from `shards`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from data_pipeline.checksums import with_checksum, without_checksum
from data_pipeline.files import CorpusError, atomic_file

# Version 1 has none of the fields after `shards`. Corpora that need none of them are still written as version 1.
SCHEMA_VERSION: Literal[1] = 1
LATEST_VERSION: Literal[2] = 2
PACKINGS = ("full_sequences", "documents", "nsp", "sop")
# Optional columns, in the order in which shards store them after input_ids and document_end.
COLUMNS = ("word_start", "sentence_start", "segment_start", "pair_label")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
HELD_OUT = "held_out"
# The description that the corpus was built from, if one was given.
DESCRIPTION = "description.yaml"


def plain_name(name: str) -> str:
    """Return `name` unchanged. Raises ValueError if it could refer to a file outside the corpus folder: manifests are
    untrusted input."""
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name: shards must be in the corpus folder")
    return name


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceEntry(_Frozen):
    """One input file: name relative to the common parent folder of all inputs; size and SHA-256 of the file on disk."""

    name: str
    bytes: NonNegativeInt
    sha256: Sha256


class ShardEntry(_Frozen):
    """One shard: plain file name, rows, file size in bytes, SHA-256 of the file. length: positions per row if fewer
    than the sequence length of the corpus (length bins)."""

    file: Annotated[str, AfterValidator(plain_name)]
    rows: PositiveInt
    bytes: PositiveInt
    sha256: Sha256
    length: PositiveInt | None = None


class MixtureEntry(_Frozen):
    """One source of the mixture.

    documents, tokens: in the corpus, counting copies, without special tokens. Independent of the weight: unknown, share
    of [UNK] among the tokens of the source; repeated, share of its documents that equal an earlier one in the corpus
    (estimated from a sample for millions of documents); dropped, number of dropped documents by reason.
    """

    name: str
    weight: Annotated[float, Field(gt=0)]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    unknown: Annotated[float, Field(ge=0, le=1)] | None = None
    repeated: Annotated[float, Field(ge=0, le=1)] | None = None
    dropped: dict[str, NonNegativeInt] = {}


class SpecialTokens(_Frozen):
    """Token ids of the five roles, and `all` special ids of the tokenizer, ascending, including ids below its
    vocabulary size that have no token. unk: None for byte-level tokenizers, which encode any text."""

    cls: NonNegativeInt
    sep: NonNegativeInt
    pad: NonNegativeInt
    mask: NonNegativeInt
    unk: NonNegativeInt | None
    all: tuple[NonNegativeInt, ...]


class Manifest(_Frozen):
    """Corpus manifest. tokens: all ids except [PAD], that is, including [CLS] and [SEP].

    Since version 2: columns, the members of COLUMNS that the shards store; dropped, number of dropped documents by
    reason; replaced, documents with replaced bytes; unused, tokens not used by a pair packing; labelled, rows with
    pair_label set, and pair_probability, the requested share of those.
    """

    schema_version: Literal[1, 2]
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    special_tokens: SpecialTokens
    sequence_length: PositiveInt
    seed: NonNegativeInt
    packing: Literal["full_sequences", "documents", "nsp", "sop"]
    rows: PositiveInt
    tokens: PositiveInt
    documents: PositiveInt
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]
    columns: tuple[Literal["word_start", "sentence_start", "segment_start", "pair_label"], ...] = ()
    mixture: tuple[MixtureEntry, ...] = ()
    dropped: dict[str, NonNegativeInt] = {}
    replaced: NonNegativeInt = 0
    unused: NonNegativeInt = 0
    labelled: NonNegativeInt = 0
    pair_probability: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if (found := sum(shard.rows for shard in self.shards)) != self.rows:
            raise ValueError(f"rows is {self.rows}, but the shards have {found} rows in total")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        if not self.tokens <= self.rows * self.sequence_length:
            raise ValueError(f"tokens is {self.tokens}, more than rows x sequence_length")
        if self.schema_version == 1 and self.needs_version_2:
            raise ValueError("schema_version 1 allows only full sequences in two columns; this needs version 2")
        if self.columns != tuple(column for column in COLUMNS if column in self.columns):
            raise ValueError(f"columns must be in the order {', '.join(COLUMNS)}, each once")
        if any(shard.length and shard.length > self.sequence_length for shard in self.shards):
            raise ValueError(f"rows of a shard are longer than sequence_length {self.sequence_length}")
        roles = self.special_tokens
        if max(roles.cls, roles.sep, roles.pad, roles.mask, roles.unk or 0, *roles.all) >= self.vocab_size:
            raise ValueError(f"special token ids must be below vocab_size {self.vocab_size}")
        return self

    @property
    def needs_version_2(self) -> bool:
        return self.packing != "full_sequences" or bool(
            self.columns or self.mixture or self.dropped or self.replaced or any(s.length for s in self.shards)
        )


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 or uint32, whichever is the smallest for ids below `vocab_size`. Raises CorpusError if neither fits."""
    if vocab_size > 2**32:
        raise CorpusError(f"vocabulary of {vocab_size:,} entries: token ids are at most 32 bits wide")
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and validate `folder/manifest.json`.

    Raises CorpusError if it is missing or invalid, or if its content differs from the hash that it carries.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.lexists(folder):
            raise CorpusError(f"{folder}: no such folder. Correct the path, or build the corpus first") from None
        raise CorpusError(
            f"{path}: not found. This is not a corpus, or its build has not finished: rerun the build command"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON ({error}). Build the corpus again") from None
    if isinstance(raw, dict) and raw.get("kind") == "tokens":
        raise CorpusError(f"{path}: describes token shards, not a corpus. Build one from them with the command pack")
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in (SCHEMA_VERSION, LATEST_VERSION):
        raise CorpusError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION} and {LATEST_VERSION}. "
            "Build the corpus again"
        )
    raw = without_checksum(raw, path, "Restore it from a copy or build the corpus again")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise CorpusError(f"{path}: {faults}") from None


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically, with a hash of itself. Its presence marks the corpus as complete."""
    later = ("columns", "mixture", "dropped", "replaced", "unused", "labelled", "pair_probability")
    exclude: Any = dict.fromkeys(later, True) | {"shards": {"__all__": {"length"}}}
    exclude = exclude if manifest.schema_version == 1 else None
    content = with_checksum(manifest.model_dump(mode="json", exclude=exclude))
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    with atomic_file(Path(folder) / MANIFEST, len(data)) as file:
        file.write(data)
