"""Masks: strategy table → inclusion probabilities; one sampler; importance weights; corruption.

B sequences, L positions, K predictions a sequence. n_b is the number of maskable positions of row b (no special
tokens) and k_b = round(rate · n_b), at least 1 where n_b > 0, is how many of them are predicted. A row without a
maskable position gets none; the caller counts such rows.

Sampler (Pareto sampling: Rosén 1997, "On sampling with probability proportional to size"): with inclusion
probabilities π_i, Σ π_i = k, rank the positions by  [u_i/(1 − u_i)] / [π_i/(1 − π_i)]  and keep the k smallest.
u_i is a hash of (seed, epoch, sample id, position), hence a mask is a function of those and of π alone: not of
rank, world size, batch layout, device or call order. (The ranking avoids the usual logarithms: products and
quotients are rounded alike on every device, logarithms are not.)

Nothing here waits for the device: K, the width of the result, follows from L and the rate alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from data_pipeline.shards import Manifest
from maskvr_ds import hashing
from maskvr_ds.batch import MaskedBatch, TokenBatch

# A row's stream is cut into blocks of 2^32 draws, one a purpose: draw number `block + position`.
_CHOICE, _CORRUPTION = 0, 1 << 32
# The low bits of a sampling key hold the position: no two keys of a row are equal, and the position comes for free.
_POSITION_BITS = 12
_POSITION_MASK = (1 << _POSITION_BITS) - 1
_NEVER = ~_POSITION_MASK & torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Corruption:
    """What stands at a position to predict: [MASK], a random ordinary token, or (the rest) the token itself."""

    mask_probability: float = 0.8
    random_probability: float = 0.1


def maximum_predictions(sequence_length: int, rate: float) -> int:
    """K: no row of `sequence_length` tokens has more predictions, [CLS] and one [SEP] being special."""
    return max(1, round_half_up(rate * (sequence_length - 2)))


def round_half_up(x: float) -> int:
    """Round to nearest, halves up: the same rule as `prediction_counts` (Python rounds halves to even)."""
    return math.floor(x + 0.5)


def prediction_counts(n: torch.Tensor, rate: float) -> torch.Tensor:
    """k: int64 [B], numbers of maskable positions → int64 [B], round(rate · n), at least 1 where n ≥ 1."""
    return torch.floor(n.double() * rate + 0.5).long().clamp(min=1).minimum(n)


def uniform(batch: TokenBatch, maskable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """π_i = k/n on the maskable positions (Devlin et al. 2018): `share` itself, broadcast over positions."""
    return share


# strategy(batch, maskable bool [B, L], share float64 [B, 1] = k/n) → inclusion probabilities, float64, broadcastable
# to [B, L], with Σ over the maskable positions = k.
Strategy = Callable[[TokenBatch, torch.Tensor, torch.Tensor], torch.Tensor]
STRATEGIES: dict[str, Strategy] = {"uniform": uniform}


def row_keys(seed: int, batch: TokenBatch) -> torch.Tensor:
    """int64 [B]: the key of each row's stream of random numbers, from (seed, epoch, sample id).

    Distinct for all epochs below 2^23 and sample ids below 2^40.
    """
    return hashing.stream(hashing.fold(seed), (batch.epochs << 40) + batch.sample_ids)


def pareto_sample(
    inclusion: torch.Tensor, bits: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-size sample without replacement with (to a very good approximation) given inclusion probabilities.

    Args:
        inclusion: float64 [B, L] or [B, 1]; in (0, 1] on maskable positions, Σ over them = counts.
        bits: int64 [B, L], independent random bits.
        maskable: bool [B, L].
        counts: int64 [B], how many positions each row gets, at most `width`.
        width: K.

    Returns: positions int64 [B, K], in order of their rank, and used bool [B, K]: slot j is used where j < count.
    """
    length = bits.shape[1]
    if inclusion.shape[1] == 1:
        # Equal probabilities within a row: any increasing function of u ranks alike, so the bits themselves do.
        keys = bits & ~_POSITION_MASK
    else:
        u = hashing.unit_interval(bits)
        odds_ratio = (u / (1 - u)) * ((1 - inclusion) / inclusion)
        # Non-negative float64 sort like their bits. 40 bits of the mantissa stay: far finer than any π.
        keys = odds_ratio.view(torch.int64) & ~_POSITION_MASK
    keys.masked_fill_(~maskable, _NEVER)
    keys += torch.arange(length, device=bits.device)
    lowest = _smallest(keys, width)
    used = torch.arange(width, device=counts.device) < counts[:, None]
    return lowest & _POSITION_MASK, used


def _smallest(keys: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` smallest of each row, ascending: int64 [B, L], all different within a row → int64 [B, width]."""
    if keys.device.type == "cpu":
        # Same result as topk's; NumPy partitions with vector instructions, four times as fast.
        selected = np.partition(keys.numpy(), width - 1, axis=1)[:, :width]
        return torch.from_numpy(np.sort(selected, axis=1))
    return keys.topk(width, dim=1, largest=False).values


class Masker:
    """Draws masks and corrupts inputs on the device that the batch lies on.

    Args:
        vocab_size, mask_id, special_ids: of the tokenizer; special tokens are neither masked nor put in at random.
        sequence_length: L.
        seed: keys the masks, together with epoch and sample id.
        strategy: a name in STRATEGIES.
        rate: share of the maskable positions to predict.
        corruption: what the model sees in their place.
        device: where batches will lie.

    Raises ValueError for an unknown strategy, a rate outside (0, 1), or L above 4,096.
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
        rate: float = 0.15,
        corruption: Corruption | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"masking.strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
        if not 0 < rate < 1:
            raise ValueError(f"masking.rate is {rate}; it must lie between 0 and 1, both excluded")
        if sequence_length > 1 << _POSITION_BITS:
            raise ValueError(
                f"sequences of {sequence_length} tokens; masks are drawn for at most {1 << _POSITION_BITS}"
            )
        self.strategy = STRATEGIES[strategy]
        self.rate = rate
        self.seed = seed
        self.mask_id = mask_id
        corruption = corruption or Corruption()
        # Thresholds on 24 random bits.
        self._mask_below = round(corruption.mask_probability * 2**24)
        self._random_below = round((corruption.mask_probability + corruption.random_probability) * 2**24)
        self.maximum_predictions = maximum_predictions(sequence_length, rate)
        special = torch.zeros(vocab_size, dtype=torch.bool)
        special[list(special_ids)] = True
        self._maskable_ids = (~special).to(device)
        self._ordinary_ids = torch.nonzero(~special).squeeze(1).to(device)

    @classmethod
    def for_corpus(cls, manifest: Manifest, **options: Any) -> Self:
        """A masker for the corpus' vocabulary and length. options: seed, device, strategy, rate, corruption."""
        special = manifest.special_tokens
        return cls(
            vocab_size=manifest.vocab_size,
            mask_id=special.mask,
            special_ids=special.all,
            sequence_length=manifest.sequence_length,
            **options,
        )

    def __call__(self, batch: TokenBatch) -> MaskedBatch:
        """Choose positions, take the labels away, corrupt: see the module's text. All on batch's device."""
        input_ids = batch.input_ids.long()
        # index_select: the same as indexing with a tensor, and three times as fast on a CPU.
        maskable = self._maskable_ids.index_select(0, input_ids.view(-1)).view_as(input_ids)
        n = maskable.sum(1)
        counts = prediction_counts(n, self.rate)
        share = (counts.double() / n.clamp(min=1))[:, None]
        inclusion = self.strategy(batch, maskable, share)
        keys = row_keys(self.seed, batch)[:, None]
        draws = torch.arange(_CHOICE, _CHOICE + input_ids.shape[1], device=input_ids.device)
        positions, used = pareto_sample(
            inclusion, hashing.stream(keys, draws), maskable, counts, self.maximum_predictions
        )
        labels = input_ids.gather(1, positions)
        replaced = self._corrupt(labels, hashing.stream(keys, positions + _CORRUPTION))
        # Horvitz–Thompson: w = (k/n)/π makes Σ w ℓ / k unbiased for the mean of ℓ over all maskable positions.
        weights = (share / inclusion).expand_as(input_ids).gather(1, positions)
        return MaskedBatch(
            input_ids=input_ids.scatter(1, positions, torch.where(used, replaced, labels)),
            positions=positions,
            labels=labels,
            weights=torch.where(used, weights, 0.0).float(),
            attention_mask=batch.attention_mask,
        )

    def _corrupt(self, labels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """What stands in the place of `labels` (int64 [B, K]), by hash bits of the same shape and dtype."""
        # One hash serves twice: the upper 24 bits say what happens, the lower 32 which random token, by
        # multiplication instead of a remainder (Lemire 2019); both are even to better than 2^-12 relative.
        kind = (bits >> 40) & 0xFF_FFFF
        draw = ((bits & 0xFFFF_FFFF) * len(self._ordinary_ids)) >> 32
        random_ids = self._ordinary_ids.index_select(0, draw.view(-1)).view_as(labels)
        kept_or_random = torch.where(kind < self._random_below, random_ids, labels)
        return kept_or_random.masked_fill_(kind < self._mask_below, self.mask_id)


def data_digest(batch: TokenBatch) -> torch.Tensor:
    """Order-free int64 sum (wrapping) over rows of hash(epoch, sample id): scalar tensor. Sums add over ranks."""
    return row_keys(0, batch).sum()


def mask_digest(batch: TokenBatch, masked: MaskedBatch) -> torch.Tensor:
    """Order-free int64 sum (wrapping) over rows of hash(epoch, sample id, set of masked positions): scalar."""
    position_hash = hashing.stream(0, masked.positions)
    chosen = torch.where(masked.weights != 0, position_hash, 0).sum(1)
    return hashing.mix(row_keys(0, batch) ^ hashing.mix(chosen)).sum()
