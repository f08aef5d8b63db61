"""Masking strategies: one function per strategy, collected in the table STRATEGIES.

A strategy selects the positions of each row to predict and their weights. B sequences, L positions, K predictions per
sequence, V vocabulary. n_b is the number of maskable positions of row b (special tokens excluded), and
k_b = round(rate · n_b), at least 1 if n_b > 0 and at most round(rate · (L − 2)), is the number of predictions
requested: `uniform`, `frequency` and `mapnet` make exactly k_b predictions, the others at most k_b.

A selection is a function of (seed, epoch, sample id, position) and of the row's tokens, independent of rank, world
size, batch layout, device and call order. No host-device synchronisation: the width K follows from L and the rate.

`epoch` counts the earlier reads of the row. If the loader yields J copies of a row (placement `same_batch`), each copy
counts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from maskvr_ds import hashing
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.masking.conditional_poisson import ConditionalPoisson, odds_of
from maskvr_ds.masking.estimators import ESTIMATORS, Draw, horvitz_thompson
from maskvr_ds.masking.pareto import (
    ascending,
    never,
    pareto_sample,
    position_bits,
    proposal_to_inclusion,
)

# A row's random stream is divided into blocks of 2^32 draws, one per purpose: draw number `block + position`. Block 2
# is unused.
SELECTION, CORRUPTION, _LENGTH = (purpose << 32 for purpose in (0, 1, 3))
# Numbers in the tables of conditional Poisson sampling at a time: 256 MiB, and as much again for π.
_TABLE_NUMBERS = 1 << 25
# Passes over the words that still fit after one that did not.
_PASSES = 4


def prediction_counts(n: torch.Tensor, rate: float) -> torch.Tensor:
    """k = round(rate · n), at least 1 if n ≥ 1: int64 [B], numbers of maskable positions → int64 [B]."""
    return torch.floor(n.double() * rate + 0.5).long().clamp(min=1).minimum(n)


def row_keys(seed: int, batch: TokenBatch) -> torch.Tensor:
    """int64 [B]: the key of each row's random stream, from (seed, epoch, sample id).

    Distinct for all epochs below 2^23 and sample ids below 2^40.
    """
    return hashing.stream(hashing.fold(seed), (batch.epochs << 40) + batch.sample_ids)


@dataclass(frozen=True)
class Rows:
    """Input of a strategy.

    batch: the rows. input_ids: int64 [B, L]. maskable: bool [B, L]. n, counts: int64 [B], n and k. seed: of the masks.
    keys: int64 [B, 1], row_keys(seed, batch). width: K.
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
        # index_select gives the same result as indexing with a tensor and is three times as fast on a CPU.
        return table.index_select(0, self.input_ids.view(-1)).view_as(self.input_ids)


# proposal(batch, maskable bool [B, L], share float64 [B, 1] = k/n) → π float64, broadcastable to [B, L], in (0, 1],
# summing to k over the maskable positions.
Proposal = Callable[[TokenBatch, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Parameters:
    """Parameters of the strategies other than the rows, on the rows' device; None if the strategy does not use one.

    sampler, estimator: names in SAMPLERS and ESTIMATORS, for the strategies that have inclusion probabilities.
    token_scores: float64 [V], positive (frequency). floor: λ (frequency). proposal: Proposer.propose (mapnet).
    word_starts: bool [V], whether a token starts a word (whole_word; span: None makes every token a word). word_ends:
    bool [V], whether the token after this one starts a word whatever it is; None if no token does that.
    span_thresholds: int64 [longest − 1], returned by `span_thresholds`.
    """

    sampler: str = "pareto"
    estimator: str = "horvitz_thompson"
    token_scores: torch.Tensor | None = None
    floor: float = 1.0
    word_starts: torch.Tensor | None = None
    word_ends: torch.Tensor | None = None
    span_thresholds: torch.Tensor | None = None
    proposal: "Proposal | None" = None

    def to(self, device: torch.device | str) -> "Parameters":
        tables: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tables)


class Selection(NamedTuple):
    """Selected positions of B rows and their weights.

    positions: int64 [B, K], distinct within a row, unused slots included. used: bool [B, K], True in the leading slots
    of a row. weights: float64 [B, K], arbitrary in unused slots. sampling_weights: float64 [B, K], see MaskedBatch.
    """

    positions: torch.Tensor
    used: torch.Tensor
    weights: torch.Tensor
    sampling_weights: torch.Tensor | None = None


def uniform(rows: Rows, parameters: Parameters) -> Selection:
    """π_i = k/n (Devlin et al. 2018, arXiv 1810.04805). Weights 1: Σ ℓ / k is unbiased for the mean of ℓ."""
    return _by_inclusion(rows, rows.share, parameters)


def frequency(rows: Rows, parameters: Parameters) -> Selection:
    """π = (1 − λ) min(1, c · score(token)) + λ k/n, with a fixed score per token that is higher for rare tokens.

    Default weights (k/n)/π_i (Horvitz–Thompson): Σ w ℓ / k is unbiased for the mean of ℓ over all maskable positions
    if ℓ_i depends on i alone; the contexts around a prediction are those of this π, not of uniform masks. Pareto
    sampling realises π approximately (see pareto_sample for the error); conditional Poisson sampling weights by its
    own exact π.
    """
    assert parameters.token_scores is not None
    scores = rows.look_up(parameters.token_scores)
    inclusion = proposal_to_inclusion(scores, rows.maskable, rows.counts, rows.width, parameters.floor)
    return _by_inclusion(rows, inclusion, parameters)


def mapnet(rows: Rows, parameters: Parameters) -> Selection:
    """π of the mask proposal network (arXiv 2008.05333; mapnet.py). Weights as in `frequency`."""
    assert parameters.proposal is not None
    return _by_inclusion(rows, parameters.proposal(rows.batch, rows.maskable, rows.share), parameters)


def _by_inclusion(rows: Rows, inclusion: torch.Tensor, parameters: Parameters) -> Selection:
    """Draw a sample by inclusion probabilities float64 [B, L] or [B, 1], weighted by the estimator."""
    bits = hashing.stream(rows.keys, rows.places + SELECTION)
    draw = SAMPLERS[parameters.sampler](rows, inclusion, bits)
    weights = ESTIMATORS[parameters.estimator](draw)
    sampling_weights = weights if parameters.estimator == "horvitz_thompson" else horvitz_thompson(draw)
    return Selection(draw.positions, draw.used, weights, sampling_weights)


def _pareto(rows: Rows, inclusion: torch.Tensor, bits: torch.Tensor) -> Draw:
    positions, used = pareto_sample(inclusion, bits, rows.maskable, rows.counts, rows.width)
    return Draw(positions, used, rows.n, rows.counts, inclusion)


def _conditional_poisson(rows: Rows, inclusion: torch.Tensor, bits: torch.Tensor) -> Draw:
    """The design's π approximates the given one to O(1/Σ π(1 − π)); weights need the design's exact π.

    For a few rows at a time: their tables have L · K numbers each, so that those of a step's long rows would not fit.
    """
    odds, length = odds_of(inclusion, rows.maskable), bits.shape[1]
    at_once = max(1, _TABLE_NUMBERS // ((length + 1) * (rows.width + 2)))
    parts = []
    for first in range(0, len(bits), at_once):
        here = slice(first, first + at_once)
        design = ConditionalPoisson(odds[here], rows.counts[here], rows.width)
        positions, used = design.sample(bits[here])
        parts.append((positions, used, design.inclusion(), design.log_probability(positions, used)))
    positions, used, exact, log_probability = map(torch.cat, zip(*parts, strict=True))
    return Draw(positions, used, rows.n, rows.counts, exact, log_probability)


# sampler(rows, π float64 [B, L] or [B, 1], random bits int64 [B, L]) → the draw with its π and, if known, log q(M).
Sampler = Callable[[Rows, torch.Tensor, torch.Tensor], Draw]
SAMPLERS: dict[str, Sampler] = {"pareto": _pareto, "conditional_poisson": _conditional_poisson}


def fully_explored(rows: Rows, _: Parameters) -> Selection:
    """Disjoint masks: "Improving Self-supervised Pre-training via a Fully-Explored Masked Language Model" (2010.06040).

    A keyed permutation of the n maskable positions is divided into S = ⌈n/k⌉ segments of ⌊n/S⌋ or ⌈n/S⌉ ≤ k positions.
    Epoch e predicts segment e mod S of the permutation of round e div S: every maskable position exactly once per
    round. Differences from the paper: segments are of equal size (to within one) instead of leaving a short last one;
    and unless the loader yields J copies of a row (the paper: J = S), its segments are one epoch apart.

    The permutation is the order in which `uniform` ranks the positions in the round's first epoch. Segment 0 is
    therefore the mask that `uniform` draws there, or its first ⌈n/S⌉ positions if that is fewer than k: on data that is
    read once, the two strategies coincide if they predict equally many positions.

    Weights 1. Every position is equally likely to lie in a given segment of m positions: a single mask is a uniform
    one of size m, and Σ ℓ / m is unbiased for the mean of ℓ, contexts included. Over a round Σ ℓ counts every token
    once, so Σ ℓ / n equals that mean exactly if ℓ_i depends on i alone.
    """
    s = torch.div(rows.n + rows.counts - 1, rows.counts.clamp(min=1), rounding_mode="floor").clamp(min=1)
    rounds = torch.div(rows.batch.epochs, s, rounding_mode="floor")
    first_epochs = rounds * s
    segment = rows.batch.epochs - first_epochs
    keys = row_keys(rows.seed, replace(rows.batch, epochs=first_epochs))[:, None]
    bits = hashing.stream(keys, rows.places + SELECTION)
    low = position_bits(bits.shape[1])
    mask = (1 << low) - 1
    order = ascending((bits & ~mask).masked_fill_(~rows.maskable, never(low)) + rows.places)
    # Segment = the ranks r with ⌊r S/n⌋ = segment.
    first = torch.div(segment * rows.n + s - 1, s, rounding_mode="floor")
    size = torch.div((segment + 1) * rows.n + s - 1, s, rounding_mode="floor") - first
    slots = torch.arange(rows.width, device=first.device)
    ranks = (first[:, None] + slots) % order.shape[1]
    positions = order.gather(1, ranks) & mask
    return Selection(positions, slots < size[:, None], torch.ones_like(positions, dtype=torch.float64))


def whole_word(rows: Rows, parameters: Parameters) -> Selection:
    """All tokens of a word or none (BERT's whole-word masking, Google 2019): words in random order until k is reached.

    A word that no longer fits is skipped and the next one tried, as in BERT's code, in at most _PASSES passes; after
    those a word that would still fit is (rarely) missed. Hence at most k tokens, seldom fewer; none if every word is
    longer than k.

    Weights 1, as in the literature, hence biased: words of several tokens are skipped more often, so their tokens have
    π_i below k/n, single-token words above, and π_i has no simple form that could be divided out.
    """
    assert parameters.word_starts is not None
    _, word = _words(rows, parameters)
    return _in_groups(rows, word, word)


def span(rows: Rows, parameters: Parameters) -> Selection:
    """Spans of whole words of geometrically distributed length (SpanBERT, Joshi et al. 2020, arXiv 1907.10529).

    The row is tiled with spans of G words each, P(G = g) ∝ p (1 − p)^(g−1), or 1/g (n-grams of ALBERT, Lan et al. 2019,
    arXiv 1909.11942), for g ≤ longest; spans are taken in random
    order until k tokens are reached. The last one is truncated at a word boundary (SpanBERT: at any token), and single
    words of the next span fill the remaining budget by the rule of `whole_word`. Differences from SpanBERT: spans do
    not overlap and end at special tokens; corruption is per token; there is no span boundary objective.

    Weights 1, hence biased like whole_word; tiling makes all π_i equal except for fitting the last words.
    """
    assert parameters.span_thresholds is not None
    starts, word = _words(rows, parameters)
    batch, length = starts.shape
    # Words that start a span: 0, 0 + G_0, … With next² = next∘next, next⁴, … the words reached double each time.
    bits = (hashing.stream(rows.keys, rows.places + _LENGTH) >> 40) & 0xFF_FFFF
    lengths = 1 + torch.bucketize(bits, parameters.span_thresholds, right=True)
    end = torch.full((batch, 1), length, device=word.device)
    following = torch.cat([(rows.places + lengths).clamp_(max=length), end], dim=1)
    reached = torch.zeros((batch, length + 1), dtype=torch.bool, device=word.device)
    reached[:, 0] = True
    for _ in range(length.bit_length()):
        reached = reached.scatter(1, torch.where(reached, following, length), True)
        following = following.gather(1, following)
    number = (starts.cumsum(1) - 1).clamp_(min=0)
    starts_span = starts & (reached.gather(1, number) | _after_special(rows.maskable))
    return _in_groups(rows, _latest(starts_span, rows.places), word)


def span_thresholds(p: float | None, longest: int) -> torch.Tensor:
    """int64 [longest − 1]: G = 1 + the number of thresholds that 24 random bits reach, P(G = g) ∝ p (1 − p)^(g−1); p
    None: P(G = g) ∝ 1/g (ALBERT)."""
    if p is None:
        sums = list(accumulate(1 / g for g in range(1, longest + 1)))
        return torch.tensor([round(x / sums[-1] * 2**24) for x in sums[:-1]], dtype=torch.int64)
    total = 1 - (1 - p) ** longest
    return torch.tensor([round((1 - (1 - p) ** g) / total * 2**24) for g in range(1, longest)], dtype=torch.int64)


def _words(rows: Rows, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, L], whether a position starts a word; int64 [B, L], the start of the word that a position belongs to."""
    is_start = rows.maskable
    if parameters.word_starts is not None:
        marked = rows.look_up(parameters.word_starts) | _after_special(is_start)
        if parameters.word_ends is not None:
            marked[:, 1:] |= rows.look_up(parameters.word_ends)[:, :-1]
        is_start = is_start & marked
    return is_start, _latest(is_start, rows.places)


def _after_special(maskable: torch.Tensor) -> torch.Tensor:
    after = torch.ones_like(maskable)
    after[:, 1:] = ~maskable[:, :-1]
    return after


def _latest(mark: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """bool [B, L] → int64 [B, L]: the last marked position up to and including each one; 0 before the first."""
    return torch.where(mark, places, 0).cummax(1).values


def _in_groups(rows: Rows, group: torch.Tensor, word: torch.Tensor) -> Selection:
    """Take groups of words in random order, the words of a group from left to right, skipping those that do not fit.

    group, word: int64 [B, L], start of the group and of the word of each token; words lie within groups.
    """
    bits = hashing.stream(rows.keys, group + SELECTION)
    low = position_bits(bits.shape[1])
    keys = (bits >> 2 * low << 2 * low) + (group << low)
    order = ascending(keys.masked_fill_(~rows.maskable, never(low)) + rows.places) & ((1 << low) - 1)
    sizes = torch.zeros_like(word).scatter_add_(1, word, rows.maskable.long())
    word_in_order = word.gather(1, order)
    size = sizes.gather(1, word_in_order)
    # Tokens of the same word after this one.
    following = size - 1 - (order - word_in_order)
    candidate = rows.places < rows.n[:, None]
    room = rows.counts[:, None]
    taken = torch.zeros_like(candidate)
    for _ in range(_PASSES):
        # A word that does not fit now never will: room only shrinks.
        candidate = candidate & (size <= room)
        fits = candidate & (candidate.cumsum(1) + following <= room)
        taken |= fits
        candidate &= ~fits
        room = room - fits.sum(1, keepdim=True)
    # Taken positions first, the others after them; slots from K on share one slot that is dropped.
    filled, so_far = rows.counts[:, None] - room, taken.cumsum(1)
    slot = torch.where(taken, so_far - 1, filled + rows.places - so_far).clamp_(max=rows.width)
    positions = torch.empty((len(order), rows.width + 1), dtype=torch.int64, device=order.device)
    positions = positions.scatter_(1, slot, order)[:, : rows.width].contiguous()
    used = torch.arange(rows.width, device=order.device) < filled
    return Selection(positions, used, torch.ones_like(positions, dtype=torch.float64))


Strategy = Callable[[Rows, Parameters], Selection]
STRATEGIES: dict[str, Strategy] = {
    "uniform": uniform,
    "whole_word": whole_word,
    "span": span,
    "fully_explored": fully_explored,
    "frequency": frequency,
    "mapnet": mapnet,
}
