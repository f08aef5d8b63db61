"""Which positions of a row are predicted, and with which weights: one function a strategy, in one table.

B sequences, L positions, K predictions a sequence, V vocabulary. n_b is the number of maskable positions of row b (no
special tokens) and k_b = round(rate · n_b), at least 1 where n_b > 0, the number of predictions asked for: `uniform`
and `frequency` make exactly that many, the others at most.

Every choice is a function of (seed, epoch, sample id, position) and of the row's tokens: not of rank, world size,
batch layout, device or call order. Nothing waits for the device: K, the width, follows from L and the rate.

`epoch` is the number of times that the row was read before. Where the loader yields a row J times running (placement
`same_batch`), each of them counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from maskvr_ds import hashing
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.masking.conditional_poisson import ConditionalPoisson, odds_of
from maskvr_ds.masking.estimators import ESTIMATORS, Draw, horvitz_thompson
from maskvr_ds.masking.pareto import (
    NEVER,
    POSITION_BITS,
    POSITION_MASK,
    ascending,
    pareto_sample,
    proposal_to_inclusion,
)

# A row's stream is cut into blocks of 2^32 draws, one a purpose: draw number `block + position`. Block 2 is free.
CHOICE, CORRUPTION, _LENGTH = (purpose << 32 for purpose in (0, 1, 3))
# Times that words which still fit are looked for, behind one that did not.
_PASSES = 4


def round_half_up(x: float) -> int:
    """Round to nearest, halves up: the same rule as `prediction_counts` (Python rounds halves to even)."""
    return math.floor(x + 0.5)


def maximum_predictions(sequence_length: int, rate: float) -> int:
    """K: no row of `sequence_length` tokens has more predictions, [CLS] and one [SEP] being special."""
    return max(1, round_half_up(rate * (sequence_length - 2)))


def prediction_counts(n: torch.Tensor, rate: float) -> torch.Tensor:
    """k: int64 [B], numbers of maskable positions → int64 [B], round(rate · n), at least 1 where n ≥ 1."""
    return torch.floor(n.double() * rate + 0.5).long().clamp(min=1).minimum(n)


def segments(n: int, rate: float) -> int:
    """S = ⌈n/k⌉: into how many segments `fully_explored` cuts a row of n maskable positions."""
    return -(-n // max(1, round_half_up(n * rate)))


def row_keys(seed: int, batch: TokenBatch) -> torch.Tensor:
    """int64 [B]: the key of each row's stream of random numbers, from (seed, epoch, sample id).

    Distinct for all epochs below 2^23 and sample ids below 2^40.
    """
    return hashing.stream(hashing.fold(seed), (batch.epochs << 40) + batch.sample_ids)


@dataclass(frozen=True)
class Rows:
    """What a strategy sees.

    batch: the rows. input_ids: int64 [B, L], theirs. maskable: bool [B, L]. n, counts: int64 [B], n and k.
    seed: of the masks. keys: int64 [B, 1], row_keys(seed, batch). width: K.
    """

    batch: TokenBatch
    input_ids: torch.Tensor
    maskable: torch.Tensor
    n: torch.Tensor
    counts: torch.Tensor
    seed: int
    keys: torch.Tensor
    width: int

    @property
    def share(self) -> torch.Tensor:
        """float64 [B, 1]: k/n."""
        return (self.counts.double() / self.n.clamp(min=1))[:, None]

    @property
    def places(self) -> torch.Tensor:
        """int64 [L]: 0 … L − 1."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)

    def look_up(self, table: torch.Tensor) -> torch.Tensor:
        """[V] → [B, L]: the table's entry for every token."""
        # index_select: the same as indexing with a tensor, and three times as fast on a CPU.
        return table.index_select(0, self.input_ids.view(-1)).view_as(self.input_ids)


# proposal(batch, maskable bool [B, L], share float64 [B, 1] = k/n) → π float64, broadcastable to [B, L], in (0, 1] with
# Σ over the maskable positions = k.
Proposal = Callable[[TokenBatch, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Parameters:
    """What strategies need beside the rows, on their device; None where no strategy in use needs it.

    sampler, estimator: names in SAMPLERS and ESTIMATORS, for the strategies that have inclusion probabilities.
    token_scores: float64 [V], positive (frequency). floor: λ (frequency). proposal: Proposer.propose (mapnet).
    word_starts: bool [V], whether a token begins a word (whole_word; span: None means that every token is one).
    span_thresholds: int64 [longest − 1], of `span_thresholds`.
    """

    sampler: str = "pareto"
    estimator: str = "horvitz_thompson"
    token_scores: torch.Tensor | None = None
    floor: float = 1.0
    word_starts: torch.Tensor | None = None
    span_thresholds: torch.Tensor | None = None
    proposal: "Proposal | None" = None

    def to(self, device: torch.device | str) -> "Parameters":
        tables: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tables)


class Choice(NamedTuple):
    """positions int64 [B, K], all different, those of unused slots too; used bool [B, K], the first so many slots of a
    row; weights float64 [B, K], with a meaning where used; sampling_weights as in MaskedBatch, float64 [B, K]."""

    positions: torch.Tensor
    used: torch.Tensor
    weights: torch.Tensor
    sampling_weights: torch.Tensor | None = None


def uniform(rows: Rows, parameters: Parameters) -> Choice:
    """π_i = k/n (Devlin et al. 2018, arXiv 1810.04805). Weights 1: Σ ℓ / k is unbiased for the mean of ℓ."""
    return _by_inclusion(rows, rows.share, parameters)


def frequency(rows: Rows, parameters: Parameters) -> Choice:
    """π = (1 − λ) min(1, c · score(token)) + λ k/n: fixed scores by token, rare tokens having greater ones.

    Weights by default (k/n)/π_i (Horvitz–Thompson): Σ w ℓ / k is unbiased for the mean of ℓ over all maskable
    positions, where ℓ_i depends on i alone; contexts around a prediction are those of this π, not of uniform masks.
    Pareto sampling has π approximately (pareto_sample says how far), conditional Poisson sampling weighs by its own.
    """
    assert parameters.token_scores is not None
    scores = rows.look_up(parameters.token_scores)
    inclusion = proposal_to_inclusion(scores, rows.maskable, rows.counts, rows.width, parameters.floor)
    return _by_inclusion(rows, inclusion, parameters)


def mapnet(rows: Rows, parameters: Parameters) -> Choice:
    """π of the mask proposal network (arXiv 2008.05333; mapnet.py). Weights as in `frequency`."""
    assert parameters.proposal is not None
    return _by_inclusion(rows, parameters.proposal(rows.batch, rows.maskable, rows.share), parameters)


def _by_inclusion(rows: Rows, inclusion: torch.Tensor, parameters: Parameters) -> Choice:
    """inclusion: float64 [B, L] or [B, 1] → a sample, weighted as the estimator says."""
    bits = hashing.stream(rows.keys, rows.places + CHOICE)
    draw = SAMPLERS[parameters.sampler](rows, inclusion, bits)
    weights = ESTIMATORS[parameters.estimator](draw)
    sampling_weights = weights if parameters.estimator == "horvitz_thompson" else horvitz_thompson(draw)
    return Choice(draw.positions, draw.used, weights, sampling_weights)


def _pareto(rows: Rows, inclusion: torch.Tensor, bits: torch.Tensor) -> Draw:
    positions, used = pareto_sample(inclusion, bits, rows.maskable, rows.counts, rows.width)
    return Draw(positions, used, rows.n, rows.counts, inclusion)


def _conditional_poisson(rows: Rows, inclusion: torch.Tensor, bits: torch.Tensor) -> Draw:
    """Its π is near the given one, to O(1/Σ π(1 − π)); weights need the exact π, not the given one."""
    design = ConditionalPoisson(odds_of(inclusion, rows.maskable), rows.counts, rows.width)
    positions, used = design.sample(bits)
    return Draw(positions, used, rows.n, rows.counts, design.inclusion(), design.log_probability(positions, used))


# sampler(rows, π float64 [B, L] or [B, 1], random bits int64 [B, L]) → the draw with its π and, where known, its q(M).
Sampler = Callable[[Rows, torch.Tensor, torch.Tensor], Draw]
SAMPLERS: dict[str, Sampler] = {"pareto": _pareto, "conditional_poisson": _conditional_poisson}


def fully_explored(rows: Rows, _: Parameters) -> Choice:
    """Disjoint masks: "Improving Self-supervised Pre-training via a Fully-Explored Masked Language Model" (2010.06040).

    A keyed permutation of the n maskable positions is cut in S = ⌈n/k⌉ segments of ⌊n/S⌋ or ⌈n/S⌉ ≤ k positions.
    Epoch e predicts segment e mod S under the permutation of round e div S: every maskable position exactly once a
    round. Differences from the paper: segments are even, none is a short rest; and unless the loader yields a row J
    times running (the paper's J = S), its segments lie an epoch apart.

    The permutation is the order in which `uniform` would rank the positions in the round's first epoch. Segment 0 is
    therefore the mask that `uniform` draws there, or its first ⌈n/S⌉ positions where those are fewer than k: on data
    that is read once, strategies that predict equally many positions are one and the same.

    Weights 1. Every position is equally likely to lie in a given segment, of m positions: a mask by itself is a uniform
    one of size m, and Σ ℓ / m is unbiased for the mean of ℓ, contexts included. Over a round Σ ℓ counts every token
    once, so Σ ℓ / n is that mean exactly where ℓ_i depends on i alone.
    """
    s = torch.div(rows.n + rows.counts - 1, rows.counts.clamp(min=1), rounding_mode="floor").clamp(min=1)
    rounds = torch.div(rows.batch.epochs, s, rounding_mode="floor")
    first_epochs = rounds * s
    segment = rows.batch.epochs - first_epochs
    keys = row_keys(rows.seed, replace(rows.batch, epochs=first_epochs))[:, None]
    bits = hashing.stream(keys, rows.places + CHOICE)
    order = ascending((bits & ~POSITION_MASK).masked_fill_(~rows.maskable, NEVER) + rows.places)
    # The ranks r with ⌊r S/n⌋ = segment.
    first = torch.div(segment * rows.n + s - 1, s, rounding_mode="floor")
    size = torch.div((segment + 1) * rows.n + s - 1, s, rounding_mode="floor") - first
    slots = torch.arange(rows.width, device=first.device)
    ranks = (first[:, None] + slots) % order.shape[1]
    positions = order.gather(1, ranks) & POSITION_MASK
    return Choice(positions, slots < size[:, None], torch.ones_like(positions, dtype=torch.float64))


def whole_word(rows: Rows, parameters: Parameters) -> Choice:
    """All tokens of a word or none (BERT's whole-word masking, Google 2019): words in random order until k is reached.

    A word that no longer fits is skipped and the next one tried, as in BERT's code; at most _PASSES times, behind which
    (rarely) a word that fits is left out. So at most k tokens, seldom fewer; none where every word is longer than k.

    Weights 1, as in the literature, hence biased: words of several tokens are skipped more often, so their tokens have
    π_i below k/n, single tokens above, and π_i has no simple form that could be divided out.
    """
    assert parameters.word_starts is not None
    _, word = _words(rows, parameters.word_starts)
    return _in_groups(rows, word, word)


def span(rows: Rows, parameters: Parameters) -> Choice:
    """Runs of whole words (SpanBERT, Joshi et al. 2020, arXiv 1907.10529), as long as a geometric distribution says.

    The row is tiled with spans of G words each, P(G = g) ∝ p (1 − p)^(g−1) for g ≤ longest; spans come in random order
    until k tokens are reached. The last one is cut at a word's end (SpanBERT: at any token), and single words of the
    next fill up what is left by the rule of `whole_word`. Differences from SpanBERT: spans do not overlap and end at
    special tokens; corruption goes token by token; there is no span boundary objective.

    Weights 1, hence biased as whole_word is; tiling makes π_i alike but for the fitting of the last words.
    """
    assert parameters.span_thresholds is not None
    begins, word = _words(rows, parameters.word_starts)
    batch, length = begins.shape
    # Which words begin a span: 0, 0 + G_0, … With next² = next∘next, next⁴, … the words reached double each time.
    bits = (hashing.stream(rows.keys, rows.places + _LENGTH) >> 40) & 0xFF_FFFF
    lengths = 1 + torch.bucketize(bits, parameters.span_thresholds, right=True)
    end = torch.full((batch, 1), length, device=word.device)
    following = torch.cat([(rows.places + lengths).clamp_(max=length), end], dim=1)
    reached = torch.zeros((batch, length + 1), dtype=torch.bool, device=word.device)
    reached[:, 0] = True
    for _ in range(length.bit_length()):
        reached = reached.scatter(1, torch.where(reached, following, length), True)
        following = following.gather(1, following)
    number = (begins.cumsum(1) - 1).clamp_(min=0)
    begins_span = begins & (reached.gather(1, number) | _behind_special(rows.maskable))
    return _in_groups(rows, _latest(begins_span, rows.places), word)


def span_thresholds(p: float, longest: int) -> torch.Tensor:
    """int64 [longest − 1]: G = 1 + the number of those that 24 random bits reach, P(G = g) ∝ p (1 − p)^(g−1)."""
    total = 1 - (1 - p) ** longest
    return torch.tensor([round((1 - (1 - p) ** g) / total * 2**24) for g in range(1, longest)], dtype=torch.int64)


def _words(rows: Rows, starts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """starts: bool [V], or None: all → bool [B, L], which positions begin a word; int64 [B, L], where each one's is."""
    begins = rows.maskable
    if starts is not None:
        begins = begins & (rows.look_up(starts) | _behind_special(begins))
    return begins, _latest(begins, rows.places)


def _behind_special(maskable: torch.Tensor) -> torch.Tensor:
    behind = torch.ones_like(maskable)
    behind[:, 1:] = ~maskable[:, :-1]
    return behind


def _latest(mark: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """bool [B, L] → int64 [B, L]: the last marked position up to each one; 0 before the first."""
    return torch.where(mark, places, 0).cummax(1).values


def _in_groups(rows: Rows, group: torch.Tensor, word: torch.Tensor) -> Choice:
    """Groups of words in random order, the words of each from left to right, skipping those that do not fit.

    group, word: int64 [B, L], where the group and the word of a token begin; words lie within groups.
    """
    bits = hashing.stream(rows.keys, group + CHOICE)
    keys = (bits >> 2 * POSITION_BITS << 2 * POSITION_BITS) + (group << POSITION_BITS)
    order = ascending(keys.masked_fill_(~rows.maskable, NEVER) + rows.places) & POSITION_MASK
    sizes = torch.zeros_like(word).scatter_add_(1, word, rows.maskable.long())
    word_in_order = word.gather(1, order)
    size = sizes.gather(1, word_in_order)
    # Tokens of the word behind this one.
    behind = size - 1 - (order - word_in_order)
    candidate = rows.places < rows.n[:, None]
    room = rows.counts[:, None]
    taken = torch.zeros_like(candidate)
    for _ in range(_PASSES):
        # What does not fit now never will, for room only shrinks.
        candidate = candidate & (size <= room)
        fits = candidate & (candidate.cumsum(1) + behind <= room)
        taken |= fits
        candidate &= ~fits
        room = room - fits.sum(1, keepdim=True)
    # What is taken comes first, the rest behind it; slots from K on share one that is cut off.
    filled, so_far = rows.counts[:, None] - room, taken.cumsum(1)
    slot = torch.where(taken, so_far - 1, filled + rows.places - so_far).clamp_(max=rows.width)
    positions = torch.empty((len(order), rows.width + 1), dtype=torch.int64, device=order.device)
    positions = positions.scatter_(1, slot, order)[:, : rows.width].contiguous()
    used = torch.arange(rows.width, device=order.device) < filled
    return Choice(positions, used, torch.ones_like(positions, dtype=torch.float64))


Strategy = Callable[[Rows, Parameters], Choice]
STRATEGIES: dict[str, Strategy] = {
    "uniform": uniform,
    "whole_word": whole_word,
    "span": span,
    "fully_explored": fully_explored,
    "frequency": frequency,
    "mapnet": mapnet,
}
