"""Held-out figures under uniform masks that depend on the row alone, so that all runs are measured with the same masks.

Loss, perplexity and masked accuracy, over all predictions and by what the model saw at the position: [MASK], the token
itself, or a random one (80/10/10). A loss over all three rewards copying what is there.

For a model with a head for sentence pairs, on a corpus of pairs, also loss and accuracy of that head, from the same
forward passes: it sees masked rows, as in training.

Collective: one all-reduce of float64 [14] (Σ ℓ and predictions; Σ ℓ, hits and predictions of each kind, and of the
sentence pairs) over the world group per evaluation.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from data_pipeline.shards import Corpus
from maskvr_ds.config.masking import HELD_OUT_RATE
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.data.vocabulary import unigram_entropy
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.compiled import uncompiled
from maskvr_ds.models.losses import losses_and_hits, pair_losses
from maskvr_ds.runtime import distributed
from maskvr_ds.training.references import HELD_OUT_SEED, held_out_rows

# What the model saw at a predicted position: [MASK], the token itself, another token.
KINDS = ("mask", "kept", "random")


def held_out_masker(corpus: Corpus, device: torch.device) -> Masker:
    """Uniform masks at 15%, 80/10/10, independent of what the run trains with: part of the measurement, with another
    rate figures would not be comparable."""
    return Masker.for_corpus(corpus.manifest, seed=HELD_OUT_SEED, rate=HELD_OUT_RATE, device=device)


class HeldOut:
    """The first `rows` rows of the held-out corpus in a keyed order, divided among the ranks.

    Args:
        corpus: held-out rows, some of which have a token to predict (`references.open_corpora`).
        rows: maximum number to use.
        micro_size: sequences per forward pass.
        rank, world_size, device: as for the loader.

    rows: the number of rows used. described: that number and, if it is smaller, out of how many.
    """

    def __init__(
        self, corpus: Corpus, *, rows: int, micro_size: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.rows = min(rows, corpus.rows)
        self.described = f"{self.rows:,}{f' of {corpus.rows:,}' if self.rows < corpus.rows else ''} rows"
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

    def _batches(self, pairs: bool = False) -> Iterator[MaskedBatch]:
        for start in range(0, self._passes * self._micro_size, self._micro_size):
            rows = self._mine[start : start + self._micro_size]
            if len(rows):
                yield self.masker(self._read(rows, pairs))
            else:
                masked = self.masker(self._read(self._filler, pairs))
                labels = masked.pair_labels
                yield replace(
                    masked,
                    weights=torch.zeros_like(masked.weights),
                    pair_labels=None if labels is None else torch.full_like(labels, -1),
                )

    def _read(self, rows: np.ndarray, pairs: bool) -> TokenBatch:
        return to_device(read_rows(self._corpus, rows, np.zeros_like(rows), pairs=pairs), self._device)

    @cached_property
    def unigram_entropy(self) -> float:
        """Of the complete held-out corpus, in nats: the loss to beat (`vocabulary.unigram_entropy`)."""
        return unigram_entropy(self._corpus)

    @torch.no_grad()
    def figures(self, module: nn.Module) -> dict[str, float]:
        """Keys of metrics.jsonl, except on ranks other than 0 `held_out_unigram_entropy`: `held_out_loss` in nats per
        masked token, `held_out_perplexity`, `held_out_accuracy`, and loss and accuracy of each of KINDS (NaN if no
        prediction is of that kind); with sentence pairs `held_out_pair_loss`, `held_out_pair_accuracy`. The same on all
        ranks. Collective: call on all ranks."""
        training = module.training
        module.eval()
        pairs = getattr(module, "has_pair_head", False) and "pair_label" in self._corpus.manifest.columns
        of_pairs = torch.zeros(3, dtype=torch.float64, device=self._device)
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        by_kind = torch.zeros((len(KINDS), 3), dtype=torch.float64, device=self._device)
        for masked in self._batches(pairs):
            with uncompiled(module):
                losses, hits, pair_logits = losses_and_hits(module, masked)
            if pair_logits is not None:
                of_pairs += _of_pairs(pair_logits, masked)
            total[0] += (losses * masked.weights).sum()
            total[1] += (masked.weights != 0).sum()
            for number, chosen in enumerate(self._of_kinds(masked)):
                loss = torch.where(chosen, losses, 0.0).double().sum()
                by_kind[number] += torch.stack([loss, (hits & chosen).sum().double(), chosen.sum().double()])
        module.train(training)
        sums = distributed.all_reduce_sum(torch.cat([total, by_kind.flatten(), of_pairs])).tolist()
        loss_sum, predictions, *rest = sums[:-3]
        figures = _of_kind("", loss_sum, sum(rest[1::3]), predictions)
        figures["held_out_perplexity"] = _exp(figures["held_out_loss"])
        for number, kind in enumerate(KINDS):
            figures |= _of_kind(f"_{kind}", *rest[3 * number : 3 * number + 3])
        if pairs:
            figures["held_out_pair_loss"], figures["held_out_pair_accuracy"] = sums[-3] / sums[-1], sums[-2] / sums[-1]
        if distributed.rank() == 0:
            figures["held_out_unigram_entropy"] = self.unigram_entropy
        return figures

    def _of_kinds(self, masked: MaskedBatch) -> Iterator[torch.Tensor]:
        """For each of KINDS, bool [B, K]: which predictions are of that kind. A random token may be the right one: what
        counts is what the model saw."""
        seen, used = masked.input_ids.gather(1, masked.positions), masked.weights != 0
        is_mask, is_kept = seen == self.masker.mask_id, seen == masked.labels
        yield used & is_mask
        yield used & is_kept
        yield used & ~is_mask & ~is_kept


def _of_pairs(logits: torch.Tensor, masked: MaskedBatch) -> torch.Tensor:
    """Σ of the losses of the sentence pairs in nats, number of right ones and of all: float64 [3]."""
    assert masked.pair_labels is not None
    loss, counted = pair_losses(logits, masked).double().sum(), masked.pair_labels >= 0
    return torch.stack([loss, (logits.argmax(-1) == masked.pair_labels).sum().double(), counted.sum().double()])


def _of_kind(suffix: str, loss: float, hits: float, predictions: float) -> dict[str, float]:
    if not predictions:
        return {f"held_out_loss{suffix}": math.nan, f"held_out_accuracy{suffix}": math.nan}
    return {f"held_out_loss{suffix}": loss / predictions, f"held_out_accuracy{suffix}": hits / predictions}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
