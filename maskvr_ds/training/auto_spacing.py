"""Rows of a measurement of masking.strategy auto, and steps between two: measurements may take a share of the seconds
of the steps at most.

A measurement takes 2 R D gradients of single rows (R rows, D `auto.draws`) for each kind of masks, as many for any
batch size: with `auto.rows` a small part of a step of thousands of rows, or dozens of steps of 32. Where it takes less
than its share, it has more rows, since the intervals of its estimates shrink with their square root; where it takes
more, it comes less often. Its seconds are counted as gradients times the seconds of one, which are measured once, with
the costs of the candidates (mask_costs.py). Rows and interval follow from these, from the configuration and the corpus
alone: ranks, resumes and repeats measure after the same steps. Loads no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from maskvr_ds.config import AutoConfig
from maskvr_ds.config.masking import HELD_OUT_RATE
from maskvr_ds.training.auto_choice import segment_counts
from maskvr_ds.training.step_costs import StepCosts

# A change needs two measurements, and the rate falls over several.
FEW = 4


def kinds_of_masks(plain: Iterable[tuple[float, int]], *, segments: bool, proposal: bool) -> int:
    """Number of kinds of masks that a measurement takes gradients under: those of the goal, uniform ones of each rate
    and layer of `plain`, segments, the proposal."""
    return len({(HELD_OUT_RATE, 0), *plain}) + segments + proposal


def passes_of(config: AutoConfig, kinds: int) -> int:
    """Forward and backward passes of a row in a measurement, over all ranks."""
    return 2 * kinds * config.rows * config.draws


def most_passes(config: AutoConfig, rates: Sequence[float], n: int, batch: int, *, proposal: bool) -> int:
    """The same with all candidates, those of the highest of the rates: what no measurement exceeds.

    n: maskable positions of a full row. batch: rows of a global batch.
    """
    layers = (0, *config.late_layers)
    segments = any(segment_counts(n, rate, batch) for rate in rates)
    kinds = (
        kinds_of_masks(
            {*((rate, now) for rate in rates), *((rates[0], other) for other in layers)},
            segments=segments,
            proposal=proposal,
        )
        for now in layers
    )
    return passes_of(config, max(kinds))


@dataclass(frozen=True)
class Spacing:
    """every: steps between measurements. rows: of a measurement. price: of a measurement with all candidates, in steps
    with the masks whose step is the shortest; None: not known. asked: masking.auto.every_steps. share:
    masking.auto.max_share."""

    every: int
    rows: int
    price: float | None
    asked: int
    share: float | None

    @classmethod
    def of(cls, config: AutoConfig, costs: StepCosts, most: int, available: int) -> Self:
        """The most rows, from auto.rows to auto.max_rows, whose measurements take at most max_share of the seconds of
        every_steps steps, whatever masks are chosen; if these are not even auto.rows, the shortest interval at which
        theirs do.

        most: passes of a measurement of auto.rows rows. available: different rows that can be drawn.
        """
        share, asked, rows = config.max_share, config.every_steps, config.rows
        price = None if costs.per_pass is None else most * costs.per_pass / costs.shortest
        if price is None or share is None:
            return cls(asked, rows, price, asked, share)
        if price > share * asked:
            return cls(math.ceil(price / share), rows, price, asked, share)
        more = max(rows, min(math.floor(rows * share * asked / price), config.most_rows, available))
        return cls(asked, more, price * more / rows, asked, share)

    @property
    def limited(self) -> bool:
        """Whether the price of a measurement is known, and limited."""
        return self.price is not None and self.share is not None

    def due(self, step: int, first: int) -> bool:
        """Whether to measure after `step` steps of the run. first: the phase's first step.

        At multiples of the interval; if limited, not before the phase has had as many steps.
        """
        return step % self.every == 0 and (not self.limited or step - first >= self.every)

    def count(self, first: int, last: int) -> int:
        """Measurements of a phase of the steps `first` to `last`, after the last of which none is made."""
        lowest = first + (self.every if self.limited else 1)
        return max(0, (last - 1) // self.every - (lowest - 1) // self.every)

    def __str__(self) -> str:
        """When and why, for people."""
        when = f"measures on {self.rows:,} rows every {self.every:,} steps"
        if self.price is None:
            return f"{when}: what a measurement takes is not known"
        number = f"{self.price:,.3g}"
        steps = f"a measurement costs as much as {number} step{'' if number == '1' else 's'}"
        if self.share is None:
            return f"{when}: {steps}, without a limit"
        if self.every == self.asked:
            return f"{when}: {steps}, {_percent(self.price / self.every)} of the seconds of the steps"
        return f"{when}: {steps}, at most {_percent(self.share)} of the seconds of the steps (masking.auto.max_share)"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def warnings(spacing: Spacing, first: int, last: int) -> list[str]:
    """What makes measurements too many, or of little use, in a phase of the steps `first` to `last`, a sentence
    each."""
    found = []
    if spacing.price is None and spacing.share is not None:
        found.append(
            f"masking.auto.max_share {spacing.share:g}: not applied: the run or its costs are from an earlier version, "
            f"which did not measure what a measurement takes; one every {spacing.every:,} steps "
            "(masking.auto.every_steps). For a new run, measure the costs again: `maskvr benchmark strategy-cost "
            "--config`, or without masking.auto.costs"
        )
    if (count := spacing.count(first, last)) < FEW:
        remedy = "raise masking.auto.max_share" if spacing.every > spacing.asked else "lower masking.auto.every_steps"
        found.append(
            f"masking.strategy auto: {last - first:,} steps have room for {count or 'no'} measurement"
            f"{'' if count == 1 else 's'}, one every {spacing.every:,} steps, and a change takes two that agree: the "
            f"masks hardly change. Set masking.strategy to a fixed one, train longer, or {remedy}"
        )
    return found
