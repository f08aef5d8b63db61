"""Packings of one document per row, and of sentence pairs `[CLS] A [SEP] B [SEP]`, or `<s> A </s></s> B </s>` for
tokenizers whose own template has two separators (RoBERTa).

`documents`: one document per row; documents longer than L - 2 tokens are split over several rows. Each row goes to the
shortest length bin that holds it; the parts of a long document stay together in the longest bin.

`nsp` and `sop`: as many consecutive sentences of a document as fit in L - 3 tokens (L - 4 with two separators between
the segments) are split in two at a random sentence start. Next-sentence prediction (Devlin et al. 2018, section 3.1):
with the given probability, B is replaced by text of a random other document, from a random sentence start, truncated to
fill the row; the original B goes to the next row. The other document is drawn from a neighbourhood of NEIGHBOURS to
twice as many documents, since random access to a corpus of terabytes would cost a seek per row; a copy of the same text
(weights above 1, duplicates) is drawn anew. Sentence-order prediction (Lan et al. 2019, section 3.1): with the given
probability, A and B are swapped.
Differences from the code of the papers: sentences longer than half a row are split into pieces that count as sentences,
so that A is never truncated; the label is drawn independently for every row, so a single remaining sentence at the end
of a document makes no row (`unused`); rows are not randomly shortened.

All random draws are functions of (seed, index of the document in the corpus, index of the row in the document).

Shapes: R rows, L positions, T ids of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError
from data_pipeline.shards import SpecialTokens
from data_pipeline.tokenization.token_shards import SideReader

# Documents per neighbourhood, consecutive in the corpus and independent of its units of work.
NEIGHBOURS = 1 << 16
# Draws of another document until one is no copy of the same text.
_DRAWS = 100
_MASK = (1 << 64) - 1
_BLOCK = 1 << 18


def hash_key(*key: int) -> int:
    """64-bit hash of integers, by steps of splitmix64: the random numbers of this module."""
    state = 0
    for value in key:
        state = (state ^ value) * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@dataclass
class Rows:
    """Rows of length bin `bin`: input_ids [R, L], document_end bool [R], and columns as in a shard; unused: number of
    tokens that are in no row."""

    bin: int
    input_ids: NDArray[np.unsignedinteger]
    document_end: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    unused: int = 0


@dataclass
class _Segment:
    """ids [T], planes bool [T] each."""

    ids: NDArray[np.unsignedinteger]
    planes: dict[str, NDArray[np.bool_]]


@dataclass
class _Block:
    """Consecutive documents: ids [T], each terminated by [SEP]; ends int64 [D], positions of these; planes bool [T]
    each."""

    ids: NDArray[np.unsignedinteger]
    ends: NDArray[np.int64]
    planes: dict[str, NDArray[np.bool_]]

    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], self.ends[:-1] + 1])

    def cut(self, start: int, stop: int, planes: Sequence[str]) -> _Segment:
        return _Segment(self.ids[start:stop], {plane: self.planes[plane][start:stop] for plane in planes})


def _blocks(reader: SideReader, planes: Iterable[str]) -> Iterator[_Block]:
    """All documents of a part in order, in blocks."""
    first = 0
    while first < reader.documents:
        start = reader.start(first)
        last = max(int(np.searchsorted(reader.ends, start + _BLOCK)), first + 1)
        ends = reader.ends[first:last] - start
        stop = start + int(ends[-1]) + 1
        yield _Block(reader.ids(start, stop), ends, {plane: reader.plane(plane, start, stop) for plane in planes})
        first = last


def document_rows(
    reader: SideReader, bins: Sequence[int], special: SpecialTokens, dtype: np.dtype, planes: Sequence[str]
) -> Iterator[Rows]:
    """Rows of the documents of a part, block by block, and within a block bin by bin. bins: ascending lengths, the last
    of which is L."""
    width = bins[-1] - 2
    for block in _blocks(reader, planes):
        ids, ends, bits = block.ids, block.ends, block.planes
        starts = block.starts()
        rows = -(-(ends - starts) // width)
        of_row, part = _spread(rows)
        row_starts = starts[of_row] + part * width
        sizes = np.minimum(ends[of_row] - row_starts, width)
        # Keep the parts of a long document in one bin, so that they can be read in order.
        chosen = np.where(rows[of_row] > 1, len(bins) - 1, np.searchsorted(np.array(bins), sizes + 2))
        for index, length in enumerate(bins):
            mine = chosen == index
            if not mine.any():
                continue
            count, size = int(mine.sum()), sizes[mine]
            row, column = _spread(size)
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


@dataclass(frozen=True)
class PairOptions:
    """objective: "nsp" or "sop"; probability: of a random second segment (nsp) or swapped segments (sop); length: L;
    separators: number of [SEP] between the segments."""

    objective: str
    probability: float
    length: int
    seed: int
    separators: int = 1

    @property
    def room(self) -> int:
        """Tokens of both segments in a full row."""
        return self.length - 2 - self.separators


def sentence_cuts(
    sentence_start: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64], longest: int
) -> NDArray[np.int64]:
    """Sentence starts, int64 [S], with sentences longer than `longest` split into pieces of this length.

    sentence_start: bool [T]; starts, ends: int64 [D]; documents are [starts[d], ends[d]), in order and not empty.
    """
    marked = sentence_start.copy()
    marked[starts] = True
    cuts = np.flatnonzero(marked)
    stops = np.minimum(np.append(cuts[1:], ends[-1]), ends[np.searchsorted(ends, cuts)])
    pieces = -((cuts - stops) // longest)
    if pieces.max() == 1:
        return cuts
    sentence, piece = _spread(pieces)
    return cuts[sentence] + piece * longest


def _spread(sizes: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group index, and index within the group, of every member of groups of the given sizes."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def document_pairs(bounds: Sequence[int], number: int, options: PairOptions) -> tuple[list[tuple[int, ...]], int]:
    """The pairs of one document, and the number of its unused tokens.

    bounds: of its sentences; number: index of the document in the corpus. A pair is (start, middle, stop, label), with
    segments [start, middle) and [middle, stop); for nsp with label 1, the second segment is to be replaced.
    """
    room = options.room
    pairs: list[tuple[int, ...]] = []
    i = 0
    while i < len(bounds) - 1:
        j = i
        while j < len(bounds) - 1 and bounds[j + 1] - bounds[i] <= room:
            j += 1
        if j - i < 2:  # two sentences always fit, so this is the last one
            break
        middle = i + 1 + hash_key(options.seed, number, len(pairs), 0) % (j - i - 1)
        label = hash_key(options.seed, number, len(pairs), 1) < options.probability * 2.0**64
        pairs.append((bounds[i], bounds[middle], bounds[j], int(label)))
        i = middle if label and options.objective == "nsp" else j
    return pairs, bounds[-1] - bounds[i]


def random_document(number: int, row: int, total: int, seed: int, draw: int = 0) -> int:
    """Index of the document from which a row of document `number` takes its random second segment. draw: 0, or more
    where the documents of earlier draws were copies of the same text."""
    first = NEIGHBOURS * max(min(number // NEIGHBOURS, total // NEIGHBOURS - 1), 0)
    stop = first + NEIGHBOURS if first + 2 * NEIGHBOURS <= total else total
    # The key of the first draw is that of earlier versions, whose corpora without copies stay as they are.
    drawn = first + hash_key(seed, number, row, 2, *((draw,) if draw else ())) % (stop - first - 1)
    return drawn + (drawn >= number)


def _is_copy(one: SideReader, i: int, other: SideReader, j: int) -> bool:
    """Whether document i of one reader has the tokens of document j of the other."""
    (a, b), (c, d) = (one.start(i), int(one.ends[i])), (other.start(j), int(other.ends[j]))
    return b - a == d - c and bool((one.ids(a, b) == other.ids(c, d)).all())


def pair_rows(
    part: SideReader,
    first: int,
    total: int,
    other: Callable[[int], tuple[SideReader, int]],
    options: PairOptions,
    special: SpecialTokens,
    dtype: np.dtype,
    planes: Sequence[str],
) -> Iterator[Rows]:
    """Pair rows of the documents of a part.

    first: index of its first document in the corpus of `total` documents; other: maps the index of a document to the
    reader of its part and the index therein. Raises CorpusError for nsp where documents have only copies around them.
    """
    longest = options.room // 2

    def another(number: int, row: int) -> tuple[SideReader, int]:
        for draw in range(_DRAWS):
            reader, index = other(random_document(number, row, total, options.seed, draw))
            if not _is_copy(part, number - first, reader, index):
                return reader, index
        raise CorpusError(
            f"packing nsp: {_DRAWS} documents drawn for document {number:,} were all copies of it. Add text, lower the "
            "weight of its source, or remove duplicates"
        )

    def random_segment(number: int, row: int, longest_segment: int) -> _Segment:
        reader, index = another(number, row)
        start, end = reader.start(index), int(reader.ends[index])
        marked = reader.plane("sentence_start", start, end)
        cuts = sentence_cuts(marked, np.array([0]), np.array([end - start]), longest)
        start += int(cuts[hash_key(options.seed, number, row, 3) % len(cuts)])
        stop = min(start + longest_segment, end)
        return _Segment(reader.ids(start, stop), {plane: reader.plane(plane, start, stop) for plane in planes})

    number = first
    for block in _blocks(part, {"sentence_start", *planes}):
        cuts = sentence_cuts(block.planes["sentence_start"], block.starts(), block.ends, longest)
        firsts = np.searchsorted(cuts, np.append(block.starts(), block.ends[-1])).tolist()
        found: list[tuple[_Segment, _Segment, bool]] = []
        unused = 0
        for i, end in enumerate(block.ends.tolist()):
            pairs, left = document_pairs([*cuts[firsts[i] : firsts[i + 1]].tolist(), end], number, options)
            unused += left
            for row, (start, middle, stop, label) in enumerate(pairs):
                one, two = block.cut(start, middle, planes), block.cut(middle, stop, planes)
                if label and options.objective == "sop":
                    one, two = two, one
                elif label:
                    two = random_segment(number, row, options.room - len(one.ids))
                found.append((one, two, bool(label)))
            number += 1
        yield _fill(found, options, special, dtype, planes, unused)


def _fill(
    found: list[tuple[_Segment, _Segment, bool]],
    options: PairOptions,
    special: SpecialTokens,
    dtype: np.dtype,
    planes: Sequence[str],
    unused: int,
) -> Rows:
    input_ids = np.full((len(found), options.length), special.pad, dtype)
    input_ids[:, 0] = special.cls
    columns: dict[str, NDArray[Any]] = {plane: np.zeros((len(found), options.length), np.bool_) for plane in planes}
    columns["segment_start"] = np.zeros(len(found), np.uint16)
    columns["pair_label"] = np.array([label for _, _, label in found], np.bool_)
    for row, (one, two, _) in enumerate(found):
        start = 1 + len(one.ids) + options.separators
        input_ids[row, 1 + len(one.ids) : start] = special.sep
        for first, segment in ((1, one), (start, two)):
            end = first + len(segment.ids)
            input_ids[row, first:end] = segment.ids
            input_ids[row, end] = special.sep
            for plane in planes:
                columns[plane][row, first:end] = segment.planes[plane]
        columns["segment_start"][row] = start
    return Rows(0, input_ids, np.zeros(len(found), np.bool_), columns, unused)
