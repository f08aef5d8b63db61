"""Batches of tokens and of masked tokens, with the shape and dtype of every tensor.

B sequences, L positions, K predictions per sequence at most (`maximum_predictions`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch


class _Rows:
    """Dataclass of tensors with a common first axis B; None for tensors that are not needed."""

    def _columns(self) -> dict[str, torch.Tensor | None]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply `function` to every tensor."""
        return type(self)(**{n: c if c is None else function(c) for n, c in self._columns().items()})

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive chunks of `size` rows (the last may be shorter), as views."""
        columns = self._columns()
        rows = next(len(c) for c in columns.values() if c is not None)
        for start in range(0, rows, size):
            yield type(self)(**{n: c if c is None else c[start : start + size] for n, c in columns.items()})


@dataclass(frozen=True)
class TokenBatch(_Rows):
    """Unmasked rows of the corpus.

    input_ids: uint16 or uint32 [B, L], as stored.
    sample_ids: int64 [B], row numbers in the corpus.
    epochs: int64 [B], number of earlier reads of the row.
    attention_mask: bool [B, L], False on padding; None if no row of the batch is padded.
    row_digests: int64 [B], loader.row_digests: a hash of all of the above, made on the host as the rows were read; None
        for batches that need no digest.
    segment_starts: int64 [B], position of the first token of the second segment. pair_labels: int64 [B], 1 if the
        second segment is a random one (nsp) or the two are swapped (sop), else 0; negative: not counted. Both None
        unless pairs are trained.
    """

    input_ids: torch.Tensor
    sample_ids: torch.Tensor
    epochs: torch.Tensor
    attention_mask: torch.Tensor | None = None
    row_digests: torch.Tensor | None = None
    segment_starts: torch.Tensor | None = None
    pair_labels: torch.Tensor | None = None


@dataclass(frozen=True)
class MaskedBatch(_Rows):
    """Rows with predictions selected and inputs corrupted.

    input_ids: int64 [B, L], after corruption.
    positions: int64 [B, K], positions to predict; unused slots hold an arbitrary valid position.
    labels: int64 [B, K], original ids at `positions`.
    weights: float32 [B, K], importance weights; 0 in unused slots, never 0 in used ones.
    attention_mask: as in TokenBatch.
    sampling_weights: float32 [B, K], (k/n)/π_i, 0 in unused slots: weighted by them, a sum over the predictions is
        unbiased for k/n times the sum over all maskable positions. May differ from `weights`, which depend on the
        estimator. None if the strategy has no π of its own.
    segment_starts, pair_labels: as in TokenBatch.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    attention_mask: torch.Tensor | None = None
    sampling_weights: torch.Tensor | None = None
    segment_starts: torch.Tensor | None = None
    pair_labels: torch.Tensor | None = None
