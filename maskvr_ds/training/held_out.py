"""Held-out loss under uniform masks that depend on the row alone, so that all runs are measured with the same masks.

Collective: one all-reduce of float64 [2] (Σ ℓ, predictions) over the world group per evaluation.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from data_pipeline.shards import Corpus
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.losses import weighted_loss
from maskvr_ds.runtime import distributed
from maskvr_ds.training.references import HELD_OUT_SEED, held_out_rows

# Part of the measurement: with another rate, figures would not be comparable.
_RATE = 0.15


def held_out_masker(corpus: Corpus, device: torch.device) -> Masker:
    """Uniform masks at 15%, 80/10/10, independent of what the run trains with."""
    return Masker.for_corpus(corpus.manifest, seed=HELD_OUT_SEED, rate=_RATE, device=device)


class HeldOut:
    """The first `rows` rows of the held-out corpus in a keyed order, divided among the ranks.

    Args:
        corpus: held-out rows, some of which have a token to predict (`references.open_corpora`).
        rows: maximum number to use.
        micro_size: sequences per forward pass.
        rank, world_size, device: as for the loader.
    """

    def __init__(
        self, corpus: Corpus, *, rows: int, micro_size: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        chosen = held_out_rows(corpus, rows)
        self._mine = chosen[rank::world_size]
        # Under ZeRO 3 a forward pass is a collective: every rank runs as many as the rank with the most rows. A rank
        # without further rows repeats one with weight 0.
        self._passes = -(-len(chosen[::world_size]) // micro_size)
        self._filler = chosen[:1]
        self._corpus = corpus
        self._micro_size = micro_size
        self._device = device
        self.masker = held_out_masker(corpus, device)

    def _batches(self) -> Iterator[MaskedBatch]:
        for start in range(0, self._passes * self._micro_size, self._micro_size):
            rows = self._mine[start : start + self._micro_size]
            if len(rows):
                yield self.masker(self._read(rows))
            else:
                masked = self.masker(self._read(self._filler))
                yield replace(masked, weights=torch.zeros_like(masked.weights))

    def _read(self, rows: np.ndarray) -> TokenBatch:
        return to_device(read_rows(self._corpus, rows, np.zeros_like(rows)), self._device)

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        """Mean cross-entropy of the masked tokens in nats, identical on all ranks. Collective: call on all ranks."""
        training = module.training
        module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for masked in self._batches():
            total[0] += weighted_loss(module, masked)
            total[1] += (masked.weights != 0).sum()
        module.train(training)
        loss, predictions = distributed.all_reduce_sum(total).tolist()
        return loss / predictions
