"""Rows of one document, and rows of sentence pairs `[CLS] A [SEP] B [SEP]`.

`documents`: a row holds one document, or, of a document longer than L - 2 tokens, one part after the other. Rows go
to the shortest of the length bins that holds them; the parts of a long document stay together in the longest.

`nsp` and `sop`: sentences of a document are taken as long as they fit in L - 3 tokens, and split in two at a sentence's
beginning that is drawn. Next-sentence prediction (Devlin et al. 2018, section 3.1): with the probability asked, B is
instead taken from a random other document, from a random sentence on, and cut where the row is full; what B was goes
into the next row. Sentence-order prediction (Lan et al. 2019, section 3.1): with that probability A and B are swapped.
Differences from the papers' code: sentences longer than half of a row are cut in pieces, which count as sentences, so
that nothing of A is ever cut off; the label is drawn for every row alike, so a document's last sentence, where it is
left over alone, makes no row (`unused`); rows are not shortened at random.

All draws are functions of (seed, number of the document in the corpus, number of the row in the document).

Shapes: R rows, L positions, T ids of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import SpecialTokens
from data_pipeline.tokens import SideReader

_MASK = (1 << 64) - 1
_BLOCK = 1 << 18


def draw(*key: int) -> int:
    """A 64-bit hash of integers (splitmix64's steps)."""
    state = 0
    for value in key:
        state = (state ^ value) * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@dataclass
class Rows:
    """Rows of one length bin: input_ids [R, L], document_end bool [R], and columns as in a shard."""

    bin: int
    input_ids: NDArray[np.unsignedinteger]
    document_end: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    unused: int = 0


def document_rows(
    reader: SideReader, bins: Sequence[int], special: SpecialTokens, dtype: np.dtype, planes: Sequence[str]
) -> Iterator[Rows]:
    """Rows of a part's documents, a block at a time and in a block bin by bin. bins: lengths, ascending; the last is
    L."""
    width = bins[-1] - 2
    first = 0
    while first < reader.documents:
        begin = int(reader.ends[first - 1]) + 1 if first else 0
        last = max(int(np.searchsorted(reader.ends, begin + _BLOCK)), first + 1)
        ends = reader.ends[first:last] - begin
        ids = reader.ids(begin, begin + int(ends[-1]) + 1)
        bits = {plane: reader.plane(plane, begin, begin + len(ids)) for plane in planes}
        starts = np.concatenate([[0], ends[:-1] + 1])
        rows = -(-(ends - starts) // width)
        of_row = np.repeat(np.arange(len(rows)), rows)
        part = np.arange(len(of_row)) - np.repeat(np.cumsum(rows) - rows, rows)
        row_starts = starts[of_row] + part * width
        sizes = np.minimum(ends[of_row] - row_starts, width)
        # A long document's parts stay together, so that they can be read in order.
        chosen = np.where(rows[of_row] > 1, len(bins) - 1, np.searchsorted(np.array(bins), sizes + 2))
        for index, length in enumerate(bins):
            mine = chosen == index
            if not mine.any():
                continue
            count, size = int(mine.sum()), sizes[mine]
            row = np.repeat(np.arange(count), size)
            column = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
            source = np.repeat(row_starts[mine], size) + column
            input_ids = np.full((count, length), special.pad, dtype)
            input_ids[:, 0] = special.cls
            input_ids[row, column + 1] = ids[source]
            input_ids[np.arange(count), size + 1] = special.sep
            columns = {}
            for plane, values in bits.items():
                columns[plane] = np.zeros((count, length), np.bool_)
                columns[plane][row, column + 1] = values[source]
            yield Rows(index, input_ids, (part == rows[of_row] - 1)[mine], columns)
        first = last


@dataclass(frozen=True)
class PairOptions:
    """objective: "nsp" or "sop"; probability: of a random second segment, or of swapped ones; length: L."""

    objective: str
    probability: float
    length: int
    seed: int


def sentence_bounds(starts: NDArray[np.bool_], longest: int) -> list[int]:
    """Where sentences begin, and the end: [0, …, len(starts)]; those longer than `longest` are cut in pieces of it."""
    begins = np.flatnonzero(starts).tolist()
    begins = begins if begins[:1] == [0] else [0, *begins]
    bounds: list[int] = []
    for begin, end in zip(begins, [*begins[1:], len(starts)], strict=True):
        bounds += range(begin, end, longest)
    return [*bounds, len(starts)]


def document_pairs(bounds: Sequence[int], number: int, options: PairOptions) -> tuple[list[tuple[int, ...]], int]:
    """The pairs of one document, and its tokens that are in none.

    bounds: of its sentences; number: of the document in the corpus. A pair is (start, middle, stop, label): tokens
    [start, middle) and [middle, stop); with label and nsp, [start, middle) and something else.
    """
    room = options.length - 3
    pairs: list[tuple[int, ...]] = []
    i = 0
    while i < len(bounds) - 1:
        j = i
        while j < len(bounds) - 1 and bounds[j + 1] - bounds[i] <= room:
            j += 1
        if j - i < 2:  # pieces are at most half of a row: only the last one can be alone
            break
        middle = i + 1 + draw(options.seed, number, len(pairs), 0) % (j - i - 1)
        label = draw(options.seed, number, len(pairs), 1) < options.probability * 2.0**64
        pairs.append((bounds[i], bounds[middle], bounds[j], int(label)))
        i = middle if label and options.objective == "nsp" else j
    return pairs, bounds[-1] - bounds[i]


@dataclass
class Document:
    """ids: [T], without its [SEP]; planes: bool [T] each, among them sentence_start."""

    ids: NDArray[np.unsignedinteger]
    planes: dict[str, NDArray[np.bool_]]

    def cut(self, start: int, stop: int) -> Document:
        return Document(self.ids[start:stop], {name: bits[start:stop] for name, bits in self.planes.items()})


def read_document(reader: SideReader, index: int, planes: Sequence[str]) -> Document:
    """A document of a part. planes: those to read beside sentence_start."""
    begin = int(reader.ends[index - 1]) + 1 if index else 0
    end = int(reader.ends[index])
    names = {"sentence_start", *planes}
    return Document(reader.ids(begin, end), {name: reader.plane(name, begin, end) for name in names})


def pair_rows(
    part: SideReader,
    first: int,
    total: int,
    other: Callable[[int], Document],
    options: PairOptions,
    special: SpecialTokens,
    dtype: np.dtype,
    planes: Sequence[str],
    *,
    block: int = 1024,
) -> Iterator[Rows]:
    """Rows of pairs of a part's documents.

    first: number of its first document in the corpus of `total`; other: reads the document of a number.
    """
    longest = (options.length - 3) // 2
    found: list[tuple[Document, Document, bool]] = []
    unused = 0
    for index in range(part.documents):
        document = read_document(part, index, planes)
        number = first + index
        bounds = sentence_bounds(document.planes["sentence_start"], longest)
        pairs, left = document_pairs(bounds, number, options)
        unused += left
        for row, (start, middle, stop, label) in enumerate(pairs):
            one, two = document.cut(start, middle), document.cut(middle, stop)
            if label and options.objective == "sop":
                one, two = two, one
            elif label:
                stranger = draw(options.seed, number, row, 2) % (total - 1)
                found_other = other(stranger + (stranger >= number))
                begins = sentence_bounds(found_other.planes["sentence_start"], longest)[:-1]
                begin = begins[draw(options.seed, number, row, 3) % len(begins)]
                two = found_other.cut(begin, begin + options.length - 3 - len(one.ids))
            found.append((one, two, bool(label)))
        if len(found) >= block:
            yield _fill(found, options.length, special, dtype, planes, unused)
            found, unused = [], 0
    if found or unused:
        yield _fill(found, options.length, special, dtype, planes, unused)


def _fill(
    found: list[tuple[Document, Document, bool]],
    length: int,
    special: SpecialTokens,
    dtype: np.dtype,
    planes: Sequence[str],
    unused: int,
) -> Rows:
    input_ids = np.full((len(found), length), special.pad, dtype)
    input_ids[:, 0] = special.cls
    columns: dict[str, NDArray[Any]] = {plane: np.zeros((len(found), length), np.bool_) for plane in planes}
    columns["segment_start"] = np.zeros(len(found), np.uint16)
    columns["pair_label"] = np.array([label for _, _, label in found], np.bool_)
    for row, (one, two, _) in enumerate(found):
        start = len(one.ids) + 2
        for begin, segment in ((1, one), (start, two)):
            end = begin + len(segment.ids)
            input_ids[row, begin:end] = segment.ids
            input_ids[row, end] = special.sep
            for plane in planes:
                columns[plane][row, begin:end] = segment.planes[plane]
        columns["segment_start"][row] = start
    return Rows(0, input_ids, np.zeros(len(found), np.bool_), columns, unused)
