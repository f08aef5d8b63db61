"""Masker: applies a masking strategy (strategies.py), corrupts the inputs, and computes digests of data and masks.

B sequences, L positions, K predictions per sequence, V vocabulary. A row without a maskable position gets no
prediction; the caller counts such rows. A mask is a function of (seed, epoch, sample id, position) and of π alone
(strategies.py), independent of rank, world size, batch layout, device and call order.

No host-device synchronisation: K, the width of the result, follows from L and the rate's stage alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch

from data_pipeline.shards import Corpus, Manifest
from maskvr_ds import hashing
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.masking.checks import check_ids
from maskvr_ds.masking.parameters import corpus_parameters
from maskvr_ds.masking.pareto import LONGEST, pareto_sample
from maskvr_ds.masking.rates import maximum_predictions, stage_at, stages
from maskvr_ds.masking.strategies import (
    CORRUPTION,
    STRATEGIES,
    Parameters,
    Rows,
    prediction_counts,
    row_keys,
)

__all__ = [
    "STRATEGIES",
    "Corruption",
    "Masker",
    "data_digest",
    "mask_digest",
    "maximum_predictions",
    "pareto_sample",
    "prediction_counts",
    "row_keys",
]


# What a strategy cannot do without: fields of Parameters.
_NEEDED = {
    "whole_word": "word_starts",
    "span": "span_thresholds",
    "frequency": "token_scores",
    "mapnet": "proposal",
}


@dataclass(frozen=True)
class Corruption:
    """Replacement probabilities at predicted positions: [MASK], a random ordinary token, otherwise the token itself.

    Raises ValueError if one is outside [0, 1], or their sum above 1.
    """

    mask_probability: float = 0.8
    random_probability: float = 0.1

    def __post_init__(self) -> None:
        mask, random = self.mask_probability, self.random_probability
        if not (0 <= mask <= 1 and 0 <= random <= 1 and mask + random <= 1 + 1e-9):
            raise ValueError(
                f"mask_probability {mask}, random_probability {random}: must be in [0, 1], with a sum of at most 1"
            )


class Masker:
    """Draws masks and corrupts inputs, on the batch's device.

    Args:
        vocab_size, mask_id, special_ids: from the tokenizer; special tokens are neither masked nor random replacements.
        sequence_length: L.
        seed: keys the masks, together with epoch and sample id.
        strategy: a name in STRATEGIES. parameters: its parameters, on any device.
        rate: share of the maskable positions to predict; `set_rate` changes it within [rate, final_rate], and the
            width K by stages (rates.py). Before, K is that of the highest rate.
        final_rate: None if the rate is constant.
        corruption: how predicted positions are replaced; default 80% [MASK], 10% random.
        device: device of the batches.

    Raises ValueError for an unknown strategy, parameters that it needs and lacks, a rate outside (0, 1), L below 1 or
    above 8,192, and ids outside the vocabulary.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        mask_id: int,
        special_ids: Sequence[int],
        sequence_length: int,
        seed: int,
        strategy: str = "uniform",
        parameters: Parameters | None = None,
        rate: float = 0.15,
        final_rate: float | None = None,
        corruption: Corruption | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"masking.strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
        for name, value in (("rate", rate), ("final_rate", rate if final_rate is None else final_rate)):
            if not 0 < value < 1:
                raise ValueError(f"masking.{name} is {value}; it must lie between 0 and 1, both excluded")
        if sequence_length > LONGEST:
            raise ValueError(f"sequence length {sequence_length} exceeds {LONGEST}, the maximum for drawing masks")
        if sequence_length < 1:
            raise ValueError(f"sequence length {sequence_length}: must be at least 1")
        check_ids([mask_id, *special_ids], vocab_size)
        if (needed := _NEEDED.get(strategy)) and getattr(parameters or Parameters(), needed) is None:
            raise ValueError(f"strategy {strategy}: needs parameters with {needed}; Masker.for_corpus makes them")
        self.strategy = STRATEGIES[strategy]
        self.parameters = (parameters or Parameters()).to(device)
        self.rate, self.final_rate = rate, final_rate
        self.stages = stages(sequence_length, rate, final_rate)
        self.seed = seed
        self.vocab_size = vocab_size
        self.mask_id = mask_id
        corruption = corruption or Corruption()
        # Thresholds on 24 random bits.
        self._mask_below = round(corruption.mask_probability * 2**24)
        self._random_below = round((corruption.mask_probability + corruption.random_probability) * 2**24)
        self.sequence_length = sequence_length
        self.stage = self.stages[0]
        special = torch.zeros(vocab_size, dtype=torch.bool)
        special[list(special_ids)] = True
        self._maskable_ids = (~special).to(device)
        self._ordinary_ids = torch.nonzero(~special).squeeze(1).to(device)

    @classmethod
    def for_corpus(cls, corpus: Corpus | Manifest, **options: Any) -> Self:
        """Create a masker for the corpus's vocabulary and sequence length.

        options: those of __init__. Without `parameters`, the strategy's are made from the corpus with default settings:
        word starts from its tokenizer (whole_word, span), scores from its tokens (frequency). A manifest alone has
        neither: ValueError, as if the strategy needs the proposal of a run (mapnet).
        """
        manifest = corpus.manifest if isinstance(corpus, Corpus) else corpus
        if options.get("parameters") is None:
            options["parameters"] = _default_parameters(corpus, options.get("strategy", "uniform"))
        special = manifest.special_tokens
        return cls(
            vocab_size=manifest.vocab_size,
            mask_id=special.mask,
            special_ids=special.all,
            sequence_length=manifest.sequence_length,
            **options,
        )

    def set_rate(self, rate: float) -> None:
        """Set the rate of the following batches, within the schedule's, and the width K of the results to that of its
        stage."""
        self.stage = stage_at(self.stages, self.sequence_length, rate)
        self.rate = rate

    def fix_rate(self, rate: float) -> None:
        """Set the rate of all following batches, and the width K of the results to what it needs."""
        self.stages = stages(self.sequence_length, rate, None)
        self.set_rate(rate)

    @property
    def maximum_predictions(self) -> int:
        """K, the width of the results."""
        return self.stage.slots

    def maskable(self, batch: TokenBatch) -> torch.Tensor:
        """bool [B, L]: whether a position holds an ordinary (not a special) token."""
        # index_select gives the same result as indexing with a tensor and is three times as fast on a CPU.
        ids = batch.input_ids.long()
        return self._maskable_ids.index_select(0, ids.view(-1)).view_as(ids)

    def __call__(self, batch: TokenBatch) -> MaskedBatch:
        """Select positions, gather labels and corrupt the inputs, all on the batch's device.

        Raises ValueError if the rows have more than L positions, or fewer than K.
        """
        length = batch.input_ids.shape[1]
        if not self.maximum_predictions <= length <= self.sequence_length:
            raise ValueError(
                f"rows of {length} positions: the masker is for rows of {self.sequence_length}, padded or down to "
                f"{self.maximum_predictions}; pad them, or construct it with sequence_length {length}"
            )
        input_ids = batch.input_ids.long()
        maskable = self.maskable(batch)
        n = maskable.sum(1)
        # Of rows without [CLS] or [SEP], such as chunks of a joined text, at most what rows with both have room for.
        most = maximum_predictions(self.sequence_length, self.rate)
        rows = Rows(
            batch=batch,
            input_ids=input_ids,
            maskable=maskable,
            n=n,
            counts=prediction_counts(n, self.rate).clamp(max=most),
            seed=self.seed,
            keys=row_keys(self.seed, batch)[:, None],
            width=self.maximum_predictions,
        )
        selection = self.strategy(rows, self.parameters)
        positions, used = selection.positions, selection.used
        labels = input_ids.gather(1, positions)
        replaced = self._corrupt(labels, hashing.stream(rows.keys, positions + CORRUPTION))
        sampling = selection.sampling_weights
        return MaskedBatch(
            input_ids=input_ids.scatter(1, positions, torch.where(used, replaced, labels)),
            positions=positions,
            labels=labels,
            weights=torch.where(used, selection.weights, 0.0).float(),
            attention_mask=batch.attention_mask,
            sampling_weights=None if sampling is None else sampling.float(),
            segment_starts=batch.segment_starts,
            pair_labels=batch.pair_labels,
        )

    def _corrupt(self, labels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Replacements of `labels` int64 [B, K], chosen by hash bits of the same shape and dtype."""
        # One hash serves twice: the upper 24 bits select the kind of replacement, the lower 32 the random token, by
        # multiplication instead of a remainder (Lemire 2019); both are uniform to better than 2^-12 relative.
        kind = (bits >> 40) & 0xFF_FFFF
        draw = ((bits & 0xFFFF_FFFF) * len(self._ordinary_ids)) >> 32
        random_ids = self._ordinary_ids.index_select(0, draw.view(-1)).view_as(labels)
        kept_or_random = torch.where(kind < self._random_below, random_ids, labels)
        return kept_or_random.masked_fill_(kind < self._mask_below, self.mask_id)


def _default_parameters(corpus: Corpus | Manifest, strategy: str) -> Parameters | None:
    """Parameters with default settings; None if the strategy has none, or is unknown. Raises ValueError: see
    `Masker.for_corpus`."""
    if strategy == "mapnet":
        raise ValueError("strategy mapnet: needs the proposal network of a run; give parameters with a proposal")
    if strategy not in ("whole_word", "span", "frequency"):
        return None
    if not isinstance(corpus, Corpus):
        raise ValueError(f"strategy {strategy}: needs the tokenizer or the tokens; give the Corpus, or parameters")
    return corpus_parameters(MaskingConfig.model_validate({"strategy": strategy}), corpus)


def data_digest(batch: TokenBatch) -> torch.Tensor:
    """Order-free wrapping sum over rows of hash(epoch, sample id, token ids, id of [PAD]): int64 []. Digests of ranks
    add up.

    The ids are those that the host read from the corpus.
    """
    assert batch.row_digests is not None, "the loader hashes rows as it reads them"
    return batch.row_digests.sum()


def mask_digest(batch: TokenBatch, masked: MaskedBatch) -> torch.Tensor:
    """Order-free wrapping sum over rows of hash(all that `data_digest` covers, input ids after corruption, set of
    (masked position, weight)): int64 [].

    Weights to 17 significant bits: the last bits of an estimator's logarithms are rounded by layout.
    """
    assert batch.row_digests is not None, "the loader hashes rows as it reads them"
    used = masked.weights != 0
    weights = (masked.weights.view(torch.int32) + (1 << 6)) >> 7
    slots = (masked.positions << 32) + weights
    chosen = torch.where(used, hashing.stream(0, slots), 0).sum(1)
    inputs = (masked.input_ids * _factors(masked.input_ids.shape[1], masked.input_ids.device)).sum(1)
    return hashing.mix(batch.row_digests ^ (chosen + inputs)).sum()


@lru_cache(maxsize=8)
def _factors(length: int, device: torch.device) -> torch.Tensor:
    """`hashing.factors`, on the device."""
    return torch.tensor(hashing.factors(length), device=device)
