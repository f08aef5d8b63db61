"""Measurement of the candidates of masking.strategy auto: progress of a step under every plan, relative to one of them.

Let J disjoint segments of a row share a batch; V_d is the data part of the variance, V_m the mask part, e_a the
deviation caused by segment a of a round given the row (random_effects.py), c = E⟨e_a, e_b⟩ for two segments of one
round. Of the pairs among the J copies of a row in a batch, a share f belongs to one round (`same_round_share`): if J
does not divide the row's S segments, some batches start with the last segments of a round and end with the first of the
next, whose deviations are independent. The mean of J segments has variance V_m/J + f c (J − 1)/J, a batch of B passes
contains B/J rows, so its gradient has the variance

    total(J) / B,   total(J) = J V_d + V_m + (J − 1) f c.

Pairs of segments of one round give c, which is negative, since disjoint masks complement each other; V_d is the price:
J different rows would have averaged it out. One measurement of pairs rates every J.

All plans are measured on the same rows with the same random numbers: uniform masks at every rate from the present one
down, segments and the proposal at the present rate. At equal rate they make equally many predictions, except for
segments, whose n/S predictions are measured as they are. The goal is the gradient of uniform masks at the held-out
rate.

Rows are drawn as training draws them, from a mixture by weight; each at most once, since products of different rows
must be independent.

[MASK] enters at the layer of the present plan; the plain plan of the present rate is also measured with [MASK] from
each other layer. The goal is as held-out losses are: [MASK] from the first layer, or from masking.late_layer.

Cost: `rows` · `draws` · 2 forward and backward passes for the goal, each rate and each other layer, segments and the
proposal. Collectives: those of moments.py.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.moments import Measured, Sample, measure_gradients
from maskvr_ds.analysis.gradient_variance.progress import gain, jackknife, product
from maskvr_ds.analysis.gradient_variance.random_effects import Counts, Floats, VarianceComponents, variances
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.config import AutoConfig, ConfigError
from maskvr_ds.config.masking import HELD_OUT_RATE
from maskvr_ds.data.loader import sample_rows
from maskvr_ds.data.mixture import Share
from maskvr_ds.masking.checks import hidden_at
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import STRATEGIES
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.training.auto_choice import (
    PROPOSAL,
    SEGMENTS,
    UNIFORM,
    MaskingPlan,
    Rating,
    same_round_share,
)
from maskvr_ds.training.auto_spacing import kinds_of_masks, passes_of

# counts [C, N] of the rows → progress of a step, times a factor that all plans share: [C].
Gain = Callable[[Floats], Floats]
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Candidates:
    """What is measured: the plain plans of the rates from the present one down, under uniform masks; `counts` of
    segments, of rows with `of_row` segments; the proposal, if it is trained; plain plans of the present rate with
    [MASK] from other layers than in the present plan."""

    plain: tuple[MaskingPlan, ...]
    counts: tuple[int, ...]
    of_row: int
    proposal: bool
    late: tuple[MaskingPlan, ...] = ()


@dataclass(frozen=True)
class Found:
    """Result of `measure_candidates`, identical on all ranks up to rounding.

    gains: of every plan. ideal: of a proposal that removes as much of the mask variance as is expected at most, at the
    present rate. data, mask: V_d and V_m of uniform masks at the present rate, relative to the squared mean gradient of
    the goal. passes: forward and backward, over all ranks.
    """

    gains: dict[MaskingPlan, Gain]
    ideal: Gain
    data: float
    mask: float
    passes: int


def late_masks_of(plan: MaskingPlan, corpus: Corpus) -> LateMasks | None:
    """Where [MASK] enters in the steps of a plan; None: at the first layer, or at masking.late_layer."""
    if not plan.late:
        return None
    n = corpus.sequence_length - 2
    hidden = hidden_at(n, plan.rate, disjoint=plan.strategy == SEGMENTS)
    return LateMasks(plan.late, corpus.manifest.special_tokens.mask, hidden)


def rows_of_epoch(shares: Sequence[Share], seed: int, count: int) -> NDArray[np.int64]:
    """The first `count` different rows of an epoch in an order of its own, or all of them: int64 [at most count]."""
    slots, found = sum(share.slots for share in shares), np.empty(0, dtype=np.int64)
    for start in range(0, slots, _ROWS_AT_ONCE):
        more, _ = sample_rows(np.arange(start, min(start + _ROWS_AT_ONCE, slots)), shares, seed)
        found = np.concatenate([found, more])
        _, first = np.unique(found, return_index=True)
        if len(first) >= count:
            break
    return found[np.sort(first)][:count]


def check_rows(shares: Sequence[Share], count: int) -> None:
    """Raise ConfigError if an epoch has fewer different rows than `count`, masking.auto.rows."""
    if (found := len(rows_of_epoch(shares, 0, count))) < count:
        raise ConfigError(
            f"masking.auto.rows {count}: an epoch has only {found} different rows, and progress is measured on "
            "different ones; set it lower, or train on more rows"
        )


def measure_candidates(
    candidates: Candidates,
    config: AutoConfig,
    *,
    sample: Sample,
    sketcher: Sketcher,
    masker: Masker,
    proposer: Proposer | None,
    batch: int,
    enter: Callable[[int], None] | None = None,
) -> Found:
    """Measure all candidates on the sample. Collective: call on all ranks.

    masker: with the seed of this measurement; it is copied. batch: B. enter: sets the layer at which [MASK] enters the
    sketcher's model, 0 as for the goal; None if no plan differs in it.
    """

    def measured(strategy: str, rate: float, late: int, goal: Any = None, **options: Any) -> Measured:
        assert enter is not None or not late
        if enter is not None:
            enter(late)
        own = copy.copy(masker)
        own.strategy = STRATEGIES[strategy]
        own.fix_rate(rate)
        return measure_gradients(sample, sketcher, own, goal=goal, **options)

    single = {"draws": 2 * config.draws, "copies": 1}
    goal = measured(UNIFORM, HELD_OUT_RATE, 0, **single)
    of_goal = replace(goal.moments, cross=(goal.means @ goal.means.T).numpy())
    uniform = {
        plan: of_goal
        if (plan.rate, plan.late) == (HELD_OUT_RATE, 0)
        else measured(UNIFORM, plan.rate, plan.late, goal.means, **single).moments
        for plan in (*candidates.plain, *candidates.late)
    }
    gains: dict[MaskingPlan, Gain] = {plan: partial(_gain, moments, batch=batch) for plan, moments in uniform.items()}
    rate, late = candidates.plain[0].rate, candidates.plain[0].late
    if candidates.counts:
        pairs = measured(SEGMENTS, rate, late, goal.means, draws=config.draws, copies=2, one_round=True)
        for count in candidates.counts:
            share = same_round_share(count, candidates.of_row)
            total = partial(total_variance, pairs.moments, pairs.single, count, together=share)
            gains[MaskingPlan(SEGMENTS, count, rate, late)] = partial(_gain, pairs.moments, batch=batch, total=total)
    if candidates.proposal:
        assert proposer is not None
        gate, learning = proposer.gate, proposer.learning
        proposer.gate, proposer.learning = "always", False
        gains[MaskingPlan(PROPOSAL, 1, rate, late)] = partial(
            _gain, measured(PROPOSAL, rate, late, goal.means, **single).moments, batch=batch
        )
        proposer.gate, proposer.learning = gate, learning
    now = uniform[candidates.plain[0]]
    ideal = partial(_gain, now, batch=batch, total=partial(_with_less_mask_variance, now, config.proposal_saves))
    kinds = kinds_of_masks(
        ((plan.rate, plan.late) for plan in uniform),
        segments=bool(candidates.counts),
        proposal=candidates.proposal,
    )
    return Found(gains, ideal, *_parts(now, of_goal), passes_of(config, kinds))


def _gain(
    moments: VarianceComponents, counts: Floats, *, batch: int, total: Callable[[Counts], Floats] | None = None
) -> Floats:
    return gain(moments, counts, batch, None if total is None else total(Counts(counts)))


def total_variance(pairs: VarianceComponents, single: Floats, count: int, ways: Counts, *, together: float) -> Floats:
    """total(J) for J = `count`: float64 [C].

    pairs: two segments of one round. single: variance of single ones, float64 [N, G]. together: f.
    """
    of_rows, of_pairs = (v[:, -1] for v in variances(pairs, ways))
    sizes = ways.counts @ pairs.relative_sizes / ways.counts.sum(1)
    of_one = (ways.counts @ single).sum(1) / ways.counts.sum(1) / sizes**2
    covariance = of_pairs - of_one
    total: Floats = count * of_rows + of_one + (count - 1) * together * covariance
    return total


def _with_less_mask_variance(moments: VarianceComponents, saved: float, ways: Counts) -> Floats:
    data, mask = (v[:, -1] for v in variances(moments, ways))
    total: Floats = data + (1 - saved) * mask
    return total


def _parts(moments: VarianceComponents, goal: VarianceComponents) -> tuple[float, float]:
    """V_d and V_m, relative to ‖G‖²."""
    every = np.ones((1, len(goal.within)))
    (length,) = product(goal.gram.sum(0), every)
    data, mask = (float(v[0, -1]) for v in variances(moments, Counts(every)))
    return data / float(length), mask / float(length)


def rate_plans(
    gains: Mapping[MaskingPlan, Gain],
    seconds: Mapping[MaskingPlan, float],
    current: MaskingPlan,
    rows: int,
    level: float,
) -> dict[MaskingPlan, Rating]:
    """Progress of every plan relative to `current`, with its seconds relative to those of `current`."""
    reference = gains[current]

    def ratio(own: Gain, counts: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return own(counts) / reference(counts)

    return {
        plan: Rating(
            (1.0, 1.0, 1.0) if own is reference else jackknife(partial(ratio, own), rows, level),
            seconds[plan] / seconds[current],
        )
        for plan, own in gains.items()
    }
