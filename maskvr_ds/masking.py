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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from maskvr_ds import hashing
from maskvr_ds.batch import MaskedBatch, TokenBatch

# Which of a token's random numbers: one stream each, so that corruption never depends on the choice of positions.
_CHOICE, _CORRUPTION, _REPLACEMENT = 0, 1, 2
_NEVER = torch.iinfo(torch.int64).max


class Vocabulary(Protocol):
    """What masking must know of the tokenizer (`data_pipeline.shards.Manifest` gives it)."""

    @property
    def size(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def special_ids(self) -> list[int]: ...


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


def prediction_counts(maskable: torch.Tensor, rate: float) -> torch.Tensor:
    """k: bool [B, L] → int64 [B], round(rate · n), at least 1 where n ≥ 1, 0 where n = 0."""
    n = maskable.sum(1)
    return torch.floor(n.double() * rate + 0.5).long().clamp(min=1).minimum(n)


def uniform(batch: TokenBatch, maskable: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """π_i = k/n on the maskable positions (Devlin et al. 2018): float64 [B, 1], broadcast over positions."""
    return (counts.double() / maskable.sum(1).clamp(min=1))[:, None]


# strategy(batch, maskable bool [B, L], counts int64 [B]) → inclusion probabilities, float64 broadcastable to [B, L].
Strategy = Callable[[TokenBatch, torch.Tensor, torch.Tensor], torch.Tensor]
STRATEGIES: dict[str, Strategy] = {"uniform": uniform}


def row_keys(seed: int, batch: TokenBatch, purpose: int) -> torch.Tensor:
    """int64 [B]: the key of each row's stream of random numbers, from (seed, purpose, epoch, sample id)."""
    return hashing.stream(hashing.stream(hashing.fold(seed, purpose), batch.epochs), batch.sample_ids)


def pareto_sample(
    inclusion: torch.Tensor, uniforms: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-size sample without replacement with (to a very good approximation) given inclusion probabilities.

    Args:
        inclusion: float64, broadcastable to [B, L]; in (0, 1] on maskable positions, Σ over them = counts.
        uniforms: float64 [B, L] in (0, 1).
        maskable: bool [B, L].
        counts: int64 [B], how many positions each row gets, at most `width`.
        width: K.

    Returns: positions int64 [B, K], in order of their rank, and used bool [B, K]: slot j is used where j < count.
    """
    key = (uniforms / (1 - uniforms)) * ((1 - inclusion) / inclusion)
    # Non-negative float64 sort like their bits, and integers are the faster to select.
    bits = torch.where(maskable, key.view(torch.int64), _NEVER)
    positions = bits.topk(width, dim=1, largest=False).indices
    used = torch.arange(width, device=counts.device) < counts[:, None]
    return positions, used


class Masker:
    """Draws masks and corrupts inputs on the device that the batch lies on.

    Raises ValueError for an unknown strategy or a rate outside (0, 1).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sequence_length: int,
        *,
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
        self.strategy = STRATEGIES[strategy]
        self.rate = rate
        self.seed = seed
        self.mask_id = vocabulary.mask_id
        self.corruption = corruption or Corruption()
        self.maximum_predictions = maximum_predictions(sequence_length, rate)
        special = torch.zeros(vocabulary.size, dtype=torch.bool)
        special[vocabulary.special_ids] = True
        self._maskable_ids = (~special).to(device)
        self._ordinary_ids = torch.nonzero(~special).squeeze(1).to(device)

    def __call__(self, batch: TokenBatch) -> MaskedBatch:
        """Choose positions, take the labels away, corrupt: see the module's text. All on batch's device."""
        input_ids = batch.input_ids.long()
        maskable = self._maskable_ids[input_ids]
        counts = prediction_counts(maskable, self.rate)
        inclusion = self.strategy(batch, maskable, counts)
        length = torch.arange(input_ids.shape[1], device=input_ids.device)
        uniforms = hashing.unit_interval(hashing.stream(row_keys(self.seed, batch, _CHOICE)[:, None], length))
        positions, used = pareto_sample(inclusion, uniforms, maskable, counts, self.maximum_predictions)
        labels = input_ids.gather(1, positions)
        # Horvitz–Thompson: w = (k/n)/π makes Σ w ℓ / k unbiased for the mean of ℓ over all maskable positions.
        share = (counts.double() / maskable.sum(1).clamp(min=1))[:, None]
        weights = (share / inclusion).expand(-1, input_ids.shape[1]).gather(1, positions)
        return MaskedBatch(
            input_ids=self._corrupt(batch, input_ids, positions, labels, used),
            positions=positions,
            labels=labels,
            weights=torch.where(used, weights, 0.0).float(),
            attention_mask=batch.attention_mask,
        )

    def _corrupt(
        self,
        batch: TokenBatch,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor,
        used: torch.Tensor,
    ) -> torch.Tensor:
        """input_ids int64 [B, L] with the used `positions` replaced as `Corruption` says; a new tensor."""
        kind = hashing.unit_interval(hashing.stream(row_keys(self.seed, batch, _CORRUPTION)[:, None], positions))
        draw = hashing.stream(row_keys(self.seed, batch, _REPLACEMENT)[:, None], positions)
        # 53 random bits modulo a vocabulary: the bias is below 2^-37.
        random_ids = self._ordinary_ids[((draw >> 11) & 0x1F_FFFF_FFFF_FFFF) % len(self._ordinary_ids)]
        to_mask = kind < self.corruption.mask_probability
        to_random = kind < self.corruption.mask_probability + self.corruption.random_probability
        replaced = torch.where(to_mask, self.mask_id, torch.where(to_random, random_ids, labels))
        return input_ids.scatter(1, positions, torch.where(used, replaced, labels))


def data_digest(batch: TokenBatch) -> torch.Tensor:
    """Order-free int64 sum (wrapping) over rows of hash(epoch, sample id): scalar tensor. Sums add over ranks."""
    return row_keys(0, batch, 0).sum()


def mask_digest(batch: TokenBatch, masked: MaskedBatch) -> torch.Tensor:
    """Order-free int64 sum (wrapping) over rows of hash(epoch, sample id, set of masked positions): scalar."""
    position_hash = hashing.mix((masked.positions + 1) * hashing.GOLDEN)
    chosen = torch.where(masked.weights != 0, position_hash, 0).sum(1)
    return hashing.mix(row_keys(0, batch, 1) ^ hashing.mix(chosen)).sum()
