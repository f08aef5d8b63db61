"""Corpora + (seed, samples consumed) → this rank's rows of every global batch. L positions.

Sample s of a run (s = 0, 1, 2, …) is row π_e(s mod N) of the corpus of N rows, e = s div N its epoch and π_e a
permutation keyed by (seed, e). Step t consumes samples tB … (t+1)B − 1; rank and world size decide only who
reads which of them. The state to resume is one integer: samples consumed.

Of a mixture of corpora an epoch has N = Σ M_c places, M_c of each corpus (mixture.py): π_e permutes the places, so that
the corpora come in the proportions of their weights everywhere, and a place leads to a row of its corpus.

With J copies every row comes J times running: s div J takes the place of s, and copy j = s mod J of the row's epoch e
bears the epoch number eJ + j, so that it has a mask, and a share in digests, of its own. J may change on the way, at
the beginning of a step: see `RepeatSchedule`.
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

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.mixture import Share, shares
from maskvr_ds.data.permutation import KeyedPermutation

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RepeatSchedule:
    """Samples from `sample` on, over which every row comes `copies` times running.

    sample: the first one. place: how many places of epochs the samples before have taken. base: what epoch numbers
    begin with, beyond all of those before: copy j of epoch e is number base + e · copies + j.
    """

    copies: int = 1
    sample: int = 0
    place: int = 0
    base: int = 0

    def change_copies(self, sample: int, copies: int, shares: Sequence[Share]) -> "RepeatSchedule":
        """The repeats that follows this one at `sample`.

        Its base is a multiple of its copies, so that where those are all segments of a row they are of one round.
        """
        place = self.place + (sample - self.sample) // self.copies
        begun = place // sum(share.places for share in shares) + 1
        passes = max(-(-begun * share.places // share.rows) for share in shares)
        beyond = self.base + passes * self.copies
        return RepeatSchedule(copies, sample, place, -(-beyond // copies) * copies)


_ONE_COPY = RepeatSchedule()

# A run needs that of the present epoch and of the next, of a mixture also those of its corpora; they are small.
_permutation = lru_cache(maxsize=256)(KeyedPermutation)


def sample_rows(
    samples: NDArray[np.int64], rows: int | Sequence[Share], seed: int, repeats: RepeatSchedule = _ONE_COPY
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples of a run, int64 [n] ascending → (rows int64 [n], epochs int64 [n]) of a corpus of `rows` rows, or of a
    mixture's shares.

    epochs: of a mixture, passes over the row's own corpus. repeats: that of the samples; epochs then count the times
    that the row was read before, J an epoch.
    """
    shares = (Share(rows, rows),) if isinstance(rows, int) else rows
    total = sum(share.places for share in shares)
    samples, copy = np.divmod(samples - repeats.sample, repeats.copies)
    epochs, index = np.divmod(samples + repeats.place, total)
    places = np.empty_like(samples)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        places[here] = _permutation(total, hashing.fold(seed, epoch))(index[here])
    out, passes = np.empty_like(samples), np.empty_like(samples)
    first_place = first_row = 0
    for number, share in enumerate(shares):
        here = (places >= first_place) & (places < first_place + share.places)
        turns, row = np.divmod(epochs[here] * share.places + places[here] - first_place, share.rows)
        if share.places % share.rows:
            for turn in np.unique(turns).tolist():
                now = turns == turn
                row[now] = _permutation(share.rows, hashing.fold(seed, turn, number))(row[now])
        out[here], passes[here] = first_row + row, turns
        first_place, first_row = first_place + share.places, first_row + share.rows
    return out, repeats.base + passes * repeats.copies + copy


def read_rows(corpus: Corpus, rows: NDArray[np.int64], epochs: NDArray[np.int64], *, pin: bool = False) -> TokenBatch:
    """The given rows, ascending by row number (reads then run through the shards once), in host memory.

    rows, epochs: int64 [B]. Returns a TokenBatch of B rows; page-locked if `pin`.
    """
    order = np.argsort(rows, kind="stable")
    rows, epochs = rows[order], epochs[order]
    dtype = {"uint16": torch.uint16, "uint32": torch.uint32}[corpus.dtype.name]
    input_ids = torch.empty((len(rows), corpus.sequence_length), dtype=dtype, pin_memory=pin)
    ids = input_ids.numpy()
    corpus.take(rows, out=ids)
    pad = corpus.manifest.special_tokens.pad
    attention_mask = None
    # Padding stands at the end of a row; full rows, the common case, need no mask and the faster attention.
    if (ids[:, -1] == pad).any():
        attention_mask = torch.from_numpy(ids != pad)
    batch = TokenBatch(input_ids, torch.from_numpy(rows), torch.from_numpy(epochs), attention_mask)
    # Copies from pageable memory make the host wait, however small; input_ids already lies in page-locked memory.
    return batch.map(torch.Tensor.pin_memory) if pin else batch


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The batch on `device`; from page-locked memory the copy runs beside the computation."""
    return batch.map(lambda column: column.to(device, non_blocking=True))


class Loader:
    """This rank's share of every global batch, read ahead by a thread.

    Args:
        corpus: what to read, or a Mixture.
        seed: keys the order, together with the epoch.
        global_size: sequences a step over all ranks; a multiple of `world_size` and of `copies` (ValueError otherwise).
        copies: J, how often each row comes in a global batch.
        rank, world_size: who reads.
        device: where batches are handed over.
        prefetch: steps to read ahead.
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
    ) -> None:
        if global_size % world_size:
            raise ValueError(f"a global batch of {global_size} sequences does not divide among {world_size} ranks")
        if global_size % copies:
            raise ValueError(
                f"a global batch of {global_size} sequences does not divide by {copies} copies of each row"
            )
        self.corpus, self.shares = corpus, shares(corpus)
        self.seed = seed
        self.repeats = RepeatSchedule(copies)
        self.global_size = global_size
        self.rank, self.share = rank, global_size // world_size
        self.device = torch.device(device)
        self.prefetch = prefetch

    def _read(self, samples_consumed: int, repeats: RepeatSchedule) -> Iterator[TokenBatch]:
        # Rows are found for several small steps at once: NumPy costs microseconds a call whatever the size.
        steps = max(1, _ROWS_AT_ONCE // self.share)
        share = self.rank * self.share + np.arange(self.share)
        for first in itertools.count(samples_consumed, steps * self.global_size):
            samples = first + np.arange(steps)[:, None] * self.global_size + share
            rows, epochs = sample_rows(samples.ravel(), self.shares, self.seed, repeats)
            for step in np.split(np.arange(len(rows)), steps):
                yield read_rows(self.corpus, rows[step], epochs[step], pin=self.device.type == "cuda")

    def _on_own_device(self) -> None:
        # A thread begins on the first GPU, and page-locking memory there would cost every rank a context on it.
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def batches(self, samples_consumed: int = 0) -> Generator[TokenBatch, None, None]:
        """Endless: the share [global_size / world_size, L] of each step after `samples_consumed` samples."""
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
                # What was read ahead is of the repeats before.
                for future in ahead:
                    future.result()

    def change_copies(self, samples_consumed: int, copies: int) -> None:
        """Have every row come `copies` times running in the batches after `samples_consumed` samples."""
        self.repeats = self.repeats.change_copies(samples_consumed, copies, self.shares)
