"""Data loader: corpora and (seed, samples consumed) → this rank's rows of every global batch. L positions.

Sample s of a run (s = 0, 1, 2, …) is row π_e(s mod N) of the corpus of N rows, with epoch e = s div N and π_e a
permutation keyed by (seed, e). Step t consumes samples tB … (t+1)B − 1; rank and world size only determine which rank
reads which of them. The state needed to resume is one integer: samples consumed.

For a mixture of corpora, an epoch has N = Σ M_c slots, M_c per corpus (mixture.py): π_e permutes the slots, so that the
corpora are interleaved in proportion to their weights throughout, and each slot maps to a row of its corpus.

With J copies, every row is repeated J times in succession: s div J replaces s, and copy j = s mod J of the row's epoch
e has the epoch number eJ + j, and hence its own mask and digests. J may change between steps: see `RepeatSchedule`.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.shards import Corpus, CorpusError, beyond_vocabulary
from maskvr_ds import hashing
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.mixture import Share, shares
from maskvr_ds.data.permutation import KeyedPermutation

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RepeatSchedule:
    """Repetition of rows from sample `sample` on: every row is repeated `copies` times in succession.

    sample: the first sample. place: number of epoch slots consumed by the samples before. base: offset of the epoch
    numbers, above all earlier ones: copy j of epoch e has the number base + e · copies + j. Checkpoints of strategy
    `auto` store these fields by name.
    """

    copies: int = 1
    sample: int = 0
    place: int = 0
    base: int = 0

    def change_copies(self, sample: int, copies: int, shares: Sequence[Share]) -> "RepeatSchedule":
        """The schedule that replaces this one at `sample`.

        Its base is a multiple of `copies`: if the copies are all segments of a row, they belong to one round.
        """
        place = self.place + (sample - self.sample) // self.copies
        started_epochs = place // sum(share.slots for share in shares) + 1
        passes = max(-(-started_epochs * share.slots // share.rows) for share in shares)
        unused = self.base + passes * self.copies
        return RepeatSchedule(copies, sample, place, -(-unused // copies) * copies)


_ONE_COPY = RepeatSchedule()

# A run needs those of the current and the next epoch, and for a mixture also those of its corpora; they are small.
_permutation = lru_cache(maxsize=256)(KeyedPermutation)


def sample_rows(
    samples: NDArray[np.int64], rows: int | Sequence[Share], seed: int, repeats: RepeatSchedule = _ONE_COPY
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Map samples of a run to rows and their epochs.

    Args:
        samples: int64 [n], ascending.
        rows: N of a corpus, or the shares of a mixture.
        seed: of the order.
        repeats: the schedule that applies to the samples.

    Returns: rows int64 [n] and epochs int64 [n]: earlier reads of the row, i.e. passes over its own corpus, times J,
    plus the copy.
    """
    shares = (Share(rows, rows),) if isinstance(rows, int) else rows
    total = sum(share.slots for share in shares)
    samples, copy = np.divmod(samples - repeats.sample, repeats.copies)
    epochs, index = np.divmod(samples + repeats.place, total)
    slots = np.empty_like(samples)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        slots[here] = _permutation(total, hashing.fold(seed, epoch))(index[here])
    out, passes = np.empty_like(samples), np.empty_like(samples)
    first_slot = first_row = 0
    for number, share in enumerate(shares):
        here = (slots >= first_slot) & (slots < first_slot + share.slots)
        share_passes, row = np.divmod(epochs[here] * share.slots + slots[here] - first_slot, share.rows)
        if share.slots % share.rows:
            for pass_ in np.unique(share_passes).tolist():
                now = share_passes == pass_
                row[now] = _permutation(share.rows, hashing.fold(seed, pass_, number))(row[now])
        out[here], passes[here] = first_row + row, share_passes
        first_slot, first_row = first_slot + share.slots, first_row + share.rows
    return out, repeats.base + passes * repeats.copies + copy


def read_rows(
    corpus: Corpus, rows: NDArray[np.int64], epochs: NDArray[np.int64], *, pin: bool = False, pairs: bool = False
) -> TokenBatch:
    """Read rows into a TokenBatch in host memory (pinned if `pin`), sorted by row number to read shards sequentially.

    rows, epochs: int64 [B]. pairs: also read where second segments start, and the labels of the pairs. Raises
    ValueError if the corpus has none, CorpusError if an id is not below the vocabulary size.
    """
    order = np.argsort(rows, kind="stable")
    rows, epochs = rows[order], epochs[order]
    dtype = {"uint16": torch.uint16, "uint32": torch.uint32}[corpus.dtype.name]
    input_ids = torch.empty((len(rows), corpus.sequence_length), dtype=dtype, pin_memory=pin)
    ids = input_ids.numpy()
    corpus.take(rows, out=ids)
    # Not every setting of data.verify has read the shard before, and an embedding names no file.
    if ids.max(initial=0) >= corpus.manifest.vocab_size:
        first = int((ids >= corpus.manifest.vocab_size).any(axis=1).argmax())
        path, row = corpus.locate(int(rows[first]))
        raise CorpusError(beyond_vocabulary(path, row, ids[first : first + 1], corpus.manifest.vocab_size))
    pad = corpus.manifest.special_tokens.pad
    attention_mask = None
    # Padding is at the end of a row; full rows, the common case, need no mask and use the faster attention.
    if (ids[:, -1] == pad).any():
        attention_mask = torch.from_numpy(ids != pad)
    digests = torch.from_numpy(row_digests(ids, rows, epochs, pad))
    columns = (corpus.take_column(name, rows).astype(np.int64) for name in ("segment_start", "pair_label"))
    starts, labels = map(torch.from_numpy, columns) if pairs else (None, None)
    batch = TokenBatch(
        input_ids, torch.from_numpy(rows), torch.from_numpy(epochs), attention_mask, digests, starts, labels
    )
    # Copies from pageable memory make the host wait, however small; input_ids is already pinned.
    return batch.map(torch.Tensor.pin_memory) if pin else batch


def row_digests(
    ids: NDArray[np.unsignedinteger], rows: NDArray[np.int64], epochs: NDArray[np.int64], pad: int
) -> NDArray[np.int64]:
    """Hash of each row's number, epoch and token ids [B, L], and of the id of [PAD], which determines the attention
    mask: int64 [B]. Made here because the host has time to spare and the device would launch more kernels."""
    keys = hashing.stream(hashing.fold(0), (epochs << 40) + rows)
    return hashing.mix(keys ^ hashing.row_hashes(ids, pad))


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Copy the batch to `device`, asynchronously if it is in pinned memory."""
    return batch.map(lambda column: column.to(device, non_blocking=True))


class Loader:
    """This rank's share of every global batch, prefetched by a thread.

    Args:
        corpus: a Corpus or a Mixture.
        seed: keys the order, together with the epoch.
        global_size: sequences per step over all ranks.
        copies: J, copies of each row in a global batch.
        rank, world_size: of this process.
        device: device of the returned batches.
        prefetch: number of steps to read ahead.
        pairs: also read the columns of sentence pairs, see `read_rows`.

    Raises ValueError if global_size is not a multiple of `world_size` and of `copies`.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        global_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        copies: int = 1,
        pairs: bool = False,
    ) -> None:
        if global_size % world_size:
            raise ValueError(f"a global batch of {global_size} sequences is not divisible by {world_size} ranks")
        if global_size % copies:
            raise ValueError(
                f"a global batch of {global_size} sequences is not divisible by {copies} copies of each row"
            )
        self.corpus, self.shares = corpus, shares(corpus)
        self.seed = seed
        self.repeats = RepeatSchedule(copies)
        self.global_size = global_size
        self.rank, self.share = rank, global_size // world_size
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.pairs = pairs

    def _read(self, samples_consumed: int, repeats: RepeatSchedule) -> Iterator[TokenBatch]:
        # Compute the rows of several small steps at once: each NumPy call costs microseconds whatever the size.
        steps = max(1, _ROWS_AT_ONCE // self.share)
        share = self.rank * self.share + np.arange(self.share)
        for first in itertools.count(samples_consumed, steps * self.global_size):
            samples = first + np.arange(steps)[:, None] * self.global_size + share
            rows, epochs = sample_rows(samples.ravel(), self.shares, self.seed, repeats)
            for step in np.split(np.arange(len(rows)), steps):
                pin = self.device.type == "cuda"
                yield read_rows(self.corpus, rows[step], epochs[step], pin=pin, pairs=self.pairs)

    def _on_own_device(self) -> None:
        # A new thread starts on the first GPU, and pinning memory there would create a context on it for every rank.
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def batches(self, samples_consumed: int = 0) -> Generator[TokenBatch, None, None]:
        """Infinite iterator over this rank's share [global_size / world_size, L] of each step after `samples_consumed`
        samples."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=self._on_own_device) as pool:
            while True:
                repeats = self.repeats
                reader = self._read(samples_consumed, repeats)
                ahead = deque(pool.submit(next, reader) for _ in range(max(1, self.prefetch)))
                while repeats is self.repeats:
                    batch = ahead.popleft().result()
                    ahead.append(pool.submit(next, reader))
                    samples_consumed += self.global_size
                    yield to_device(batch, self.device)
                # Discard prefetched batches of the previous schedule.
                for future in ahead:
                    future.result()

    def epochs(self, samples_consumed: int) -> float:
        """Passes over the corpus after `samples_consumed` samples, copies of a row counted once."""
        repeats = self.repeats
        place = repeats.place + (samples_consumed - repeats.sample) / repeats.copies
        return place / sum(share.slots for share in self.shares)

    def change_copies(self, samples_consumed: int, copies: int) -> None:
        """Repeat every row `copies` times in the batches after `samples_consumed` samples."""
        self.repeats = self.repeats.change_copies(samples_consumed, copies, self.shares)
