"""Packing `full_sequences`: consecutive documents in rows `[CLS] ... [SEP]` of exactly L ids.

The corpus is one stream: the ids of the documents in order, each document terminated by [SEP]. A row holds the next
L - 2 ids of the stream between [CLS] and its final [SEP]. If the next id of the stream is the [SEP] of a document that
has just filled the row, it becomes the final [SEP] (`document_end`); otherwise the document continues in the next row.
Only the last row may be short: it ends with the [SEP] of the last document and is padded with [PAD]. Nothing is
dropped, moved or repeated.

If a document ends one position before the end of the row, its own [SEP] takes that position and the final [SEP] of the
row follows, since padding is not allowed there: the row ends with two [SEP]. The inner one ends the document, as
always; the final one (bit not set) does not.

Shapes: D documents, T ids of a stream, R rows, L positions; width = L - 2 ids of the stream per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_BLOCK = 256


def closing_documents(ends: NDArray[np.int64], start: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the documents whose [SEP] is the final one of a row.

    ends: int64 [D], ascending stream positions of the [SEP] of documents; start: stream position of the first row.
    Returns the indices of these documents, int64 [H], and int64 [H + 1]: `start`, then the position after each of their
    [SEP]. From each of these positions to the next such document, rows start every `width` ids.
    """
    hits: list[int] = []
    starts = [start]
    i = 0
    # Each hit shifts all following rows by one position, so hits are found one by one; about one document in `width`
    # is a hit.
    while i < len(ends):
        found = np.flatnonzero((ends[i : i + _BLOCK] - start) % width == 0)
        if len(found) == 0:
            i += _BLOCK
            continue
        i += int(found[0])
        hits.append(i)
        start = int(ends[i]) + 1
        starts.append(start)
        i += 1
    return np.array(hits, np.int64), np.array(starts, np.int64)


@dataclass
class ShardLayout:
    """Stream positions of shards, computed in one pass over the document ends.

    starts: position of the first row of each shard; rows: number of rows so far; padding: number of [PAD] in the last
    row, set by `finish`.
    """

    width: int
    rows_per_shard: int
    starts: list[int] = field(default_factory=list)
    rows: int = 0
    padding: int = 0
    _start: int = 0
    _last: int = -1

    def add(self, ends: NDArray[np.int64]) -> None:
        """Lay out the next documents. ends: int64 [D], positions of their [SEP] in the stream."""
        if len(ends) == 0:
            return
        hits, starts = closing_documents(ends, self._start, self.width)
        for start, end in zip(starts[:-1].tolist(), ends[hits].tolist(), strict=True):
            self._add_rows(start, (end - start) // self.width)
        self._start, self._last = int(starts[-1]), int(ends[-1])

    def finish(self) -> None:
        """Lay out the remaining tokens: full rows, and possibly a short one."""
        tail = self._last - self._start
        self._add_rows(self._start, -(-tail // self.width))
        self.padding = -tail % self.width if tail > 0 else 0

    def _add_rows(self, start: int, rows: int) -> None:
        if rows <= 0:
            return
        first = -(-self.rows // self.rows_per_shard) * self.rows_per_shard
        for row in range(first, self.rows + rows, self.rows_per_shard):
            self.starts.append(start + (row - self.rows) * self.width)
        self.rows += rows


def pack_rows(
    stream: NDArray[np.unsignedinteger],
    ends: NDArray[np.int64],
    length: int,
    cls: int,
    sep: int,
    pad: int,
    last: bool = True,
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
    """Pack a part of the stream that starts at the start of a row.

    stream: uint16 or uint32 [T]; ends: int64 [D], positions of the [SEP] of documents in `stream`; length: L. last:
    whether the part ends the corpus (T > 0 is required); otherwise it must end at the end of a row.
    Returns input_ids [R, L] with the dtype of `stream`, and document_end, bool [R].
    """
    width = length - 2
    hits, starts = closing_documents(ends, 0, width)
    tail = len(stream) - int(starts[-1])
    if last:
        # The last [SEP] is the final one of its row, whether full or short.
        tail = max(tail - 1, 0)
    else:
        assert tail % width == 0, (tail, width)
    stops = np.append(ends[hits], starts[-1] + tail)
    counts = -(-(stops - starts) // width)
    rows = int(counts.sum())
    input_ids = np.empty((rows, length), stream.dtype)
    input_ids[:, 0] = cls
    input_ids[:, -1] = sep
    document_end = np.zeros(rows, np.bool_)
    document_end[np.cumsum(counts[:-1]) - 1] = True
    row = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        full = (stop - start) // width
        input_ids[row : row + full, 1:-1] = stream[start : start + full * width].reshape(full, width)
        row += full
    if rest := tail % width:
        input_ids[row, 1 : 1 + rest] = stream[len(stream) - 1 - rest : -1]
        input_ids[row, 1 + rest] = sep
        input_ids[row, 2 + rest :] = pad
        row += 1
    if last:
        document_end[-1] = True
    assert row == rows, (row, rows)
    return input_ids, document_end


def pack_pieces(
    pieces: Iterable[tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]],
    total: int,
    dtype: np.dtype,
    length: int,
    cls: int,
    sep: int,
    pad: int,
    last: bool,
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
    """`pack_rows` for a stream of `total` ids in pieces, with one piece in memory at a time.

    pieces: ids [T] of `dtype`, T > 0, and the document ends within them, int64 [D].
    """
    width = length - 2
    max_rows = -(-total // width)
    input_ids, document_end = np.empty((max_rows, length), dtype), np.zeros(max_rows, np.bool_)
    stream, ends = np.empty(0, dtype), np.empty(0, np.int64)
    row, left = 0, total
    for more, more_ends in pieces:
        left -= len(more)
        stream, ends = np.concatenate([stream, more]), np.append(ends, more_ends + len(stream))
        del more  # a piece may be tens of megabytes
        cut = len(stream)
        if left:
            # Keep one id after the last row: it may be a [SEP] that belongs to this row.
            start = int(closing_documents(ends, 0, width)[1][-1])
            cut = start + max(len(stream) - start - 1, 0) // width * width
        inside = int(np.searchsorted(ends, cut))
        found, closed = pack_rows(stream[:cut], ends[:inside], length, cls, sep, pad, last and not left)
        input_ids[row : row + len(found)], document_end[row : row + len(found)] = found, closed
        row += len(found)
        stream, ends = stream[cut:], ends[inside:] - cut
    return input_ids[:row], document_end[:row]
