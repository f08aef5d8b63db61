"""Decisions of masking.strategy auto, as pure functions of measurements and costs. Loads no torch, calls no collective.

A plan is a strategy, the number J of segments of a row per global batch, a rate, and the layer at which [MASK] enters.
Plans are rated by the progress of a step (analysis/gradient_variance/progress.py) divided by its seconds, relative to
the plan in use:

- another plan is better if the confidence interval of its ratio lies above 1;
- the plain plan of the present rate, one mask of a row per batch without a proposal or late mask tokens, is better than
  what has more if its estimate is above 1: what is more complicated must prove itself, not what is simple;
- the best of these is taken once two consecutive measurements agree: among many measurements on few rows some are far
  off, and a plan taken by chance would stay for long. Two that find different lower rates agree on the higher one;
- the rate never rises, so that a run ends at the rate of its goal. A rate that has fallen too early would cost the rest
  of the run, hence the caution.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from maskvr_ds.masking.checks import predictions_lost, segments

UNIFORM, SEGMENTS, PROPOSAL = "uniform", "fully_explored", "mapnet"
# Share of the predictions that segments may lose to uniform masks as the plain plan.
_LOSS_ALLOWED = 0.001
# Largest ratio of neighbouring rates.
_STEP = 1.5
# Measurements that a new proposal gets to prove itself.
_TRIAL = 2

# (estimate, low, high); NaN if undefined.
Interval = tuple[float, float, float]


@dataclass(frozen=True, order=True)
class MaskingPlan:
    """strategy: uniform, fully_explored or mapnet. segments: J of a row per global batch. rate: share predicted.
    late: layer at which [MASK] enters in training; 0: at the first, or at masking.late_layer."""

    strategy: str
    segments: int
    rate: float
    late: int = 0

    def stored(self) -> list[Any]:
        """For JSON."""
        return [self.strategy, self.segments, self.rate, *([self.late] if self.late else [])]

    @classmethod
    def read(cls, stored: Sequence[Any], rate: float) -> Self:
        """From `stored`. rate: if it lacks one, as in checkpoints of earlier versions."""
        strategy, count, *more = stored
        return cls(str(strategy), int(count), float(more[0] if more else rate), int(more[1] if len(more) > 1 else 0))

    def __str__(self) -> str:
        several = f", {self.segments} segments of a row per batch" if self.segments > 1 else ""
        late = f", [MASK] from layer {self.late}" if self.late else ""
        return f"{self.strategy} at rate {self.rate:.4g}{several}{late}"


@dataclass(frozen=True)
class Rating:
    """A plan relative to the one in use. progress: of a step. seconds: of a step."""

    progress: Interval
    seconds: float

    @property
    def per_second(self) -> Interval:
        """Progress per second."""
        estimate, low, high = self.progress
        return estimate / self.seconds, low / self.seconds, high / self.seconds


def plain(counts: int | Counter[int], rate: float, late: int = 0) -> MaskingPlan:
    """One mask of a row per batch: `fully_explored` across epochs if its segments are as long as uniform masks (within
    a step it is uniform masks then), `uniform` otherwise. counts: of maskable positions, as `predictions_lost` takes
    them."""
    return MaskingPlan(SEGMENTS if predictions_lost(counts, rate) <= _LOSS_ALLOWED else UNIFORM, 1, rate, late)


def ladder(rate: float, final_rate: float | None) -> tuple[float, ...]:
    """Rates to choose from: from `rate` down to `final_rate` (null: `rate` alone) in equal ratios of at most 1.5, the
    ones in between to four digits."""
    if final_rate is None or final_rate >= rate:
        return (rate,)
    count = math.ceil(math.log(rate / final_rate) / math.log(_STEP) - 1e-9)
    between = (round(rate * (final_rate / rate) ** (i / count), 4) for i in range(1, count))
    return (rate, *(x for x in between if final_rate < x < rate), final_rate)


def segment_counts(n: int, rate: float, global_size: int) -> tuple[int, ...]:
    """Possible J > 1: a global batch consists of complete groups, and a row of n positions has ⌈n/k⌉ segments."""
    return tuple(j for j in range(2, segments(n, rate) + 1) if global_size % j == 0)


def same_round_share(copies: int, of_row: int) -> float:
    """Share of the pairs among `copies` consecutive epochs that lie in one round of `of_row` segments, over all places
    in a round where the first may lie; 1 if copies is 1."""
    pairs = [
        (start + a) // of_row == (start + b) // of_row
        for start in range(0, copies * of_row, copies)
        for a in range(copies)
        for b in range(a)
    ]
    return sum(pairs) / len(pairs) if pairs else 1.0


def best_plan(ratings: Mapping[MaskingPlan, Rating], current: MaskingPlan, fallback: MaskingPlan) -> MaskingPlan:
    """The plan with the highest progress per second among those that are better than `current`, which is returned if
    none is. fallback: the plain plan of the present rate. Plans with a higher rate are not considered."""
    better = []
    for plan, rating in ratings.items():
        estimate, low, _ = rating.per_second
        # Comparisons with NaN are false: then nothing is better.
        proven = estimate > 1 if plan == fallback else low > 1
        if plan != current and plan.rate <= current.rate and proven and math.isfinite(estimate):
            better.append((estimate, plan))
    return max(better)[1] if better else current


def next_plan(best: MaskingPlan, before: MaskingPlan, current: MaskingPlan) -> MaskingPlan:
    """The plan to continue with, from the best ones of the last two measurements."""
    if max(best.rate, before.rate) < current.rate and best.segments == before.segments == 1:
        return max(best, before, key=lambda plan: plan.rate)
    return best if best == before and best.rate <= current.rate else current


def reason(ratings: Mapping[MaskingPlan, Rating], best: MaskingPlan, chosen: MaskingPlan, current: MaskingPlan) -> str:
    """Why `chosen` follows `current`, for people."""
    if best == current:
        others = [(rating.per_second[0], plan) for plan, rating in ratings.items() if plan != current]
        known = [x for x in others if math.isfinite(x[0])]
        if not others:
            return "there is no other plan"
        if not known:
            return "no estimate: too few rows to tell the gradient from its noise (masking.auto.rows)"
        return f"no plan is better: {_told(ratings, max(known)[1])}"
    verdict = _told(ratings, best)
    if chosen == current:
        return f"{verdict}; taken if the next measurement agrees"
    if chosen != best:
        return f"{verdict}; the measurement before preferred {chosen}"
    return f"{verdict}, in two measurements"


def _told(ratings: Mapping[MaskingPlan, Rating], plan: MaskingPlan) -> str:
    estimate, low, high = ratings[plan].per_second
    interval = f"[{low:.3f}, {high:.3f}]" if math.isfinite(low) else "(no interval)"
    return f"{plan} makes {estimate:.3f} {interval} times the progress per second"


@dataclass(frozen=True)
class ProposalTrial:
    """Whether MAPNet is trained. Times are counted in measurements.

    learning: trained and measured. failed: measurements since it started, or was last used, that did not choose it.
    rest: how long it stays off. pause: the next rest, which doubles after every trial without success, so that the time
    that trials take becomes negligible.
    """

    learning: bool = False
    failed: int = 0
    rest: int = 0
    pause: int = 1

    def after(self, *, promising: bool, used: bool, best: bool) -> Self:
        """The state after a measurement. promising: whether a proposal that removes as much of the mask variance as is
        expected at most would pay for its time. used: whether masks follow it now. best: whether it measured best."""
        if used:
            return replace(self, learning=True, failed=0, pause=1)
        if not self.learning:
            if self.rest:
                return replace(self, rest=self.rest - 1)
            return replace(self, learning=promising, failed=0)
        failed = self.failed + 1
        if best or (promising and failed < _TRIAL):
            return replace(self, failed=failed)
        return replace(self, learning=False, failed=0, rest=self.pause, pause=2 * self.pause)
