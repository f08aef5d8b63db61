"""Token shards: the output of tokenization and the input of packing. Tokenize once, pack many times.

Files of a token shard folder:

    manifest.json               tokenizer, counts, sources, and the shards with size and SHA-256 of each file
    tokens-00000.train.ids      uint16 or uint32: ids of the shard's documents in order, each terminated by [SEP]
    tokens-00000.train.ends     int64: positions of these [SEP]
    tokens-00000.train.word_start, .sentence_start    optional: one bit per position, least significant bit first
    tokens-00000.train.keys     uint64 per document: hash of its text, used to select shares of documents
    tokens-00000.train.drop     uint8 per document: 0, or the reason for dropping it (1 + index in DROPS); absent if
                                no document of the shard is dropped
    tokens-00000.held_out.…     the same for held-out documents
    tokenizer/, description.yaml

Numbers are little-endian. A shard holds documents of one source; shards are in document order.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from data_pipeline.checksums import with_checksum, without_checksum
from data_pipeline.files import CorpusError, HashingFile, atomic_file, write_json
from data_pipeline.shards import MANIFEST, Sha256, SourceEntry, SpecialTokens, id_dtype

TOKENS_VERSION: Literal[1] = 1
SIDES = ("train", "held_out")
PLANES = ("word_start", "sentence_start")
# Reasons for dropping a document that are known only after it, or all documents, have been written.
DROPS = ("bad_bytes", "contaminated", "duplicate", "near_duplicate")
TOKENS_REMEDY = "Copy it again or tokenise again"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenFile(_Frozen):
    """Size and SHA-256 of one file of a token shard."""

    bytes: NonNegativeInt
    sha256: Sha256


class TokenSide(_Frozen):
    """One side of a token shard. documents: including dropped ones; length: number of ids, including the [SEP] of each
    document; unknown: number of [UNK]; files: by suffix."""

    documents: NonNegativeInt
    length: NonNegativeInt
    unknown: NonNegativeInt = 0
    files: dict[Annotated[str, Field(pattern="^[a-z_]+$")], TokenFile]


class TokenShard(_Frozen):
    """source: index in `names` of the manifest; dropped: number of dropped documents by reason."""

    source: NonNegativeInt
    sides: dict[str, TokenSide]
    dropped: dict[str, NonNegativeInt] = {}


class TokenManifest(_Frozen):
    """Manifest of a token shard folder. weights: of the sources in `names`, as in the description; dropped: number of
    dropped documents by reason; replaced: documents with replaced bytes."""

    kind: Literal["tokens"]
    version: Literal[1]
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    special_tokens: SpecialTokens
    seed: NonNegativeInt
    held_out: Annotated[float, Field(ge=0, lt=1)]
    planes: tuple[Annotated[str, Field(pattern="^(word_start|sentence_start)$")], ...]
    names: tuple[str, ...]
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    dropped: dict[str, NonNegativeInt]
    replaced: NonNegativeInt
    sources: tuple[SourceEntry, ...]
    shards: tuple[TokenShard, ...]

    @model_validator(mode="after")
    def _consistent(self) -> TokenManifest:
        special = self.special_tokens
        if max(special.cls, special.sep, special.pad, special.mask, *special.all) >= self.vocab_size:
            raise ValueError(f"special token ids must be below vocab_size {self.vocab_size}")
        if len(self.weights) != len(self.names):
            raise ValueError(f"{len(self.names)} names, but {len(self.weights)} weights")
        for i, shard in enumerate(self.shards):
            if shard.source >= len(self.names) or set(shard.sides) != set(self.sides):
                raise ValueError(f"shard {i} has source {shard.source} and sides {', '.join(shard.sides)}")
            for side in shard.sides.values():
                bits, counted = -(-side.length // 8), {"keys": 8 * side.documents, "drop": side.documents}
                sizes = {"ids": side.length * self.dtype.itemsize, "ends": 8 * side.documents}
                sizes |= dict.fromkeys(self.planes, bits) | {
                    name: counted[name] for name in counted if name in side.files
                }
                if {name: file.bytes for name, file in side.files.items()} != sizes:
                    raise ValueError(
                        f"shard {i}: sizes {sizes} expected, for {side.documents} documents of {side.length} ids"
                    )
        return self

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocab_size)

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.held_out else SIDES[:1]

    @property
    def bytes(self) -> int:
        """Size of all files of the token shards."""
        sides = (side for shard in self.shards for side in shard.sides.values())
        return sum(file.bytes for side in sides for file in side.files.values())


def token_path(folder: str | Path, shard: int, side: str, suffix: str) -> Path:
    return Path(folder) / f"tokens-{shard:05}.{side}.{suffix}"


def is_tokens(folder: str | Path) -> bool:
    """Whether the manifest of a folder describes token shards."""
    try:
        raw = json.loads((Path(folder) / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("kind") == "tokens"


def read_tokens(folder: str | Path, sizes: bool = True) -> TokenManifest:
    """Read `folder/manifest.json` and check its hash and, if `sizes`, the file sizes.

    Raises CorpusError if the manifest is missing or invalid, and with one line per file that is missing or has another
    size.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{path}: not found. Run the command tokenize, and let it finish") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON ({error}). Tokenise again") from None
    if not isinstance(raw, dict) or raw.get("kind") != "tokens":
        raise CorpusError(f"{path}: not a manifest of token shards. pack needs the output of the command tokenize")
    raw = without_checksum(raw, path, "Restore it from a copy or tokenise again")
    try:
        manifest = TokenManifest.model_validate(raw)
    except ValidationError as error:
        places = [(".".join(map(str, e["loc"])) or "manifest", e["msg"]) for e in error.errors(include_url=False)]
        faults = "; ".join(f"{place}: {message}" for place, message in places)
        raise CorpusError(f"{path}: {faults}. Tokenise again") from None
    files = token_files(folder, manifest) if sizes else ()
    if wrong := [fault for part, file in files if (fault := size_fault(part, file))]:
        raise CorpusError("\n".join(wrong))
    return manifest


def token_files(folder: str | Path, manifest: TokenManifest) -> Iterator[tuple[Path, TokenFile]]:
    """Path and entry of each file of the token shards."""
    for i, shard in enumerate(manifest.shards):
        for side, entry in shard.sides.items():
            for suffix, file in entry.files.items():
                yield token_path(folder, i, side, suffix), file


def size_fault(path: Path, file: TokenFile) -> str | None:
    """One sentence if a file is missing or has another size."""
    size = path.stat().st_size if path.is_file() else None
    if size == file.bytes:
        return None
    found = "file missing" if size is None else f"{size:,} found"
    return f"{path}: {file.bytes:,} bytes expected, {found}. {TOKENS_REMEDY}"


def token_hashes(folder: str | Path, shards: Sequence[Mapping[str, TokenSide]]) -> list[dict[str, str]]:
    """Path → SHA-256 of the files of each token shard. shards: for each shard, its sides."""
    return [
        {
            str(token_path(folder, i, side, suffix)): file.sha256
            for side, entry in sides.items()
            for suffix, file in entry.files.items()
        }
        for i, sides in enumerate(shards)
    ]


def write_tokens(folder: str | Path, manifest: TokenManifest) -> None:
    """Write `folder/manifest.json` atomically, with a hash of its content. Its presence marks the token shards as
    complete."""
    write_json(Path(folder) / MANIFEST, with_checksum(manifest.model_dump(mode="json")))


class _Bits:
    """Appends bits to a file, buffering incomplete bytes."""

    def __init__(self, file: HashingFile) -> None:
        self._file = file
        self._rest = np.empty(0, np.bool_)

    def add(self, bits: NDArray[np.bool_], last: bool = False) -> None:
        bits = np.concatenate([self._rest, bits])
        count = len(bits) if last else len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:count], bitorder="little").data)
        self._rest = bits[count:]


class SideWriter:
    """Appends documents to the files of one side of a token shard. The files are renamed into place when `stack` closes
    without an error; then call `fsync_path` on the folder, once for all sides."""

    def __init__(
        self,
        stack: ExitStack,
        folder: str,
        shard: int,
        side: str,
        special: SpecialTokens,
        *,
        planes: tuple[str, ...],
        documents: tuple[str, ...],
    ) -> None:
        suffixes = ("ids", "ends", *planes, *documents)
        paths = {suffix: token_path(folder, shard, side, suffix) for suffix in suffixes}
        self.files = {s: stack.enter_context(atomic_file(path, fsync_folder=False)) for s, path in paths.items()}
        self._planes = {plane: _Bits(self.files[plane]) for plane in planes}
        self._sep, self._unk = special.sep, special.unk
        self._pending = 0  # tokens of the document that continues in the next batch
        self.length = self.documents = self.empty = self.unknown = 0

    def add(
        self,
        ids: NDArray[np.unsignedinteger],
        counts: NDArray[np.int64],
        ended: NDArray[np.bool_],
        planes: dict[str, NDArray[np.bool_]],
        of_documents: dict[str, NDArray[Any]],
    ) -> None:
        """Append n texts. Documents without tokens are dropped.

        ids, planes: [T]; counts: int64 [n], ids per text; ended: bool [n], whether the document ends with the text;
        of_documents: arrays with one row per ended document.
        """
        stops = np.cumsum(counts)
        tokens = np.diff(stops[ended], prepend=0)
        if len(tokens):
            tokens[0] += self._pending
            self._pending = len(ids) - int(stops[ended][-1])
        else:
            self._pending += len(ids)
        full = tokens > 0
        at = stops[ended][full]
        self.files["ids"].write(np.insert(ids, at, self._sep).data)
        self.files["ends"].write((self.length + at + np.arange(len(at))).data)
        for name, plane in planes.items():
            self._planes[name].add(np.insert(plane, at, False))
        for name, values in of_documents.items():
            self.files[name].write(np.ascontiguousarray(values[full]).data)
        self.length += len(ids) + len(at)
        self.documents += len(at)
        self.empty += len(tokens) - len(at)
        if self._unk is not None:
            self.unknown += int((ids == self._unk).sum())

    def finish(self) -> None:
        for bits in self._planes.values():
            bits.add(np.empty(0, np.bool_), last=True)

    def entry(self) -> TokenSide:
        """Manifest entry; valid once the stack is closed."""
        files = {name: TokenFile(bytes=file.bytes, sha256=file.sha256()) for name, file in self.files.items()}
        return TokenSide(documents=self.documents, length=self.length, unknown=self.unknown, files=files)


class SideReader:
    """Reader of one side of a token shard, without dropped documents and those deselected by `keep` (bool [D]).

    `ends`, int64 [D'], and `length` refer to the stream of the remaining documents. `ends` and keys are memory maps;
    ids and planes are read instead, since readers are kept open and mapped pages count as memory of the process.
    """

    def __init__(
        self, folder: str | Path, manifest: TokenManifest, shard: int, side: str, keep: NDArray[np.bool_] | None = None
    ) -> None:
        self._folder, self._shard, self._side, self._dtype = folder, shard, side, manifest.dtype
        self._files: dict[str, int] = {}
        entry = manifest.shards[shard].sides[side]
        ends = self._map("ends", np.dtype(np.int64), entry.documents)
        if "drop" in entry.files:
            stays = self._map("drop", np.dtype(np.uint8), entry.documents) == 0
            keep = stays if keep is None else keep & stays
        self._length, self._documents, self._keep = entry.length, entry.documents, keep
        if keep is None or keep.all():
            self.ends: NDArray[np.int64] = ends
            self._firsts = None
            self.length = entry.length
        else:
            firsts = np.concatenate([[0], ends[:-1] + 1])[keep]
            self._firsts, self._stops = firsts, ends[keep] + 1
            self.ends = np.cumsum(self._stops - firsts) - 1
            self.length = int(self.ends[-1]) + 1 if len(self.ends) else 0

    def _map(self, suffix: str, dtype: np.dtype, size: int) -> NDArray[Any]:
        if size == 0:
            return np.empty(0, dtype)
        # As a plain ndarray: slicing a memmap is slow.
        return np.memmap(self._path(suffix), dtype, mode="r", shape=(size,)).view(np.ndarray)

    def _path(self, suffix: str) -> Path:
        return token_path(self._folder, self._shard, self._side, suffix)

    def _read(self, suffix: str, dtype: np.dtype, start: int, stop: int) -> NDArray[Any]:
        """Elements [start, stop) of a file. Raises CorpusError if the file is too short."""
        if suffix not in self._files:
            self._files[suffix] = os.open(self._path(suffix), os.O_RDONLY)
            weakref.finalize(self, os.close, self._files[suffix])
        values = np.empty(stop - start, dtype)
        left, offset = values.data.cast("B"), start * dtype.itemsize
        while left:
            count = os.preadv(self._files[suffix], [left], offset)
            if count == 0:
                raise CorpusError(
                    f"{self._path(suffix)}: ends after {offset:,} bytes. Tokenise again into a new folder"
                )
            left, offset = left[count:], offset + count
        return values

    @property
    def documents(self) -> int:
        return len(self.ends)

    def start(self, index: int) -> int:
        """Position of the first token of a document in the stream."""
        return int(self.ends[index - 1]) + 1 if index else 0

    def keys(self) -> NDArray[np.uint64]:
        """Hashes of all documents in the file, including dropped ones: uint64 [D]."""
        return self._map("keys", np.dtype(np.uint64), self._documents)

    def kept_keys(self) -> NDArray[np.uint64]:
        """Hashes of the remaining documents: uint64 [D']."""
        keys = self.keys()
        return keys if self._keep is None else keys[self._keep]

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges of the file that make up [start, stop) of the stream."""
        if start >= stop:
            return []
        if self._firsts is None:
            return [(start, stop)]
        first = int(np.searchsorted(self.ends, start))
        last = int(np.searchsorted(self.ends, stop - 1))
        ranges: list[tuple[int, int]] = []
        for i in range(first, last + 1):
            low = int(self.ends[i - 1]) + 1 if i else 0
            offset = int(self._firsts[i]) - low
            a, b = max(start, low) + offset, min(stop, int(self.ends[i]) + 1) + offset
            if ranges and ranges[-1][1] == a:
                ranges[-1] = (ranges[-1][0], b)
            else:
                ranges.append((a, b))
        return ranges

    def ids(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Ids [start, stop) of the stream, as a copy."""
        parts = [self._read("ids", self._dtype, a, b) for a, b in self._ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._dtype), *parts])

    def plane(self, name: str, start: int, stop: int) -> NDArray[np.bool_]:
        """Bits [start, stop) of a plane of the stream."""
        parts = []
        for a, b in self._ranges(start, stop):
            bits = np.unpackbits(self._read(name, np.dtype(np.uint8), a // 8, -(-b // 8)), bitorder="little")
            parts.append(bits[a % 8 : a % 8 + b - a].view(np.bool_))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.bool_), *parts])
