"""Schedule of the masking rate, and the numbers of slots per row that follow it. Loads no torch.

A row has K slots for its predictions, and what the head computes grows with K, whether a slot is used or not; so does,
with late mask tokens, what the layers below them save. Every K is a shape of tensors of its own, for which kernels are
compiled and memory is kept: it follows the schedule in stages, at most STAGES of them. Within a stage K is what its
highest rate needs. Slots that are not used have weight 0: the stage changes no mask, and losses by rounding only.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from maskvr_ds.config import MaskingConfig
from maskvr_ds.masking.checks import hidden_positions, round_half_up

# Different K of a schedule. A linear one then saves four fifths of the slots that it would save without stages.
STAGES = 6
_SAMPLED = 1000


@dataclass(frozen=True)
class Stage:
    """A part of a schedule. slots: K. fewest: predictions in a full row at its lowest rate."""

    slots: int
    fewest: int


def masking_rate(step: int, rate: float, final_rate: float | None, *, total_steps: int, decay: str = "linear") -> float:
    """From `rate` at step 0 to `final_rate` (None: `rate`) at step total_steps − 1, constant afterwards.

    decay: "linear", "cosine" (half a period) or "step" (at half of the steps, at once).
    """
    if final_rate is None:
        return rate
    t = min(1.0, step / max(1, total_steps - 1))
    if decay == "cosine":
        t = (1 - math.cos(math.pi * t)) / 2
    elif decay == "step":
        t = float(2 * step >= total_steps)
    # Rounding must not leave the interval: masks have room for the predictions of the larger rate only.
    return min(max((1 - t) * rate + t * final_rate, min(rate, final_rate)), max(rate, final_rate))


def maximum_predictions(sequence_length: int, rate: float) -> int:
    """K: maximum number of predictions in a row of `sequence_length` tokens, of which [CLS] and [SEP] are special."""
    return max(1, round_half_up(rate * (sequence_length - 2)))


def stages(length: int, rate: float, final_rate: float | None) -> tuple[Stage, ...]:
    """Stages of a schedule between two rates for rows of `length` tokens, that with the most slots first: the highest
    and the lowest number, and others at equal distances between them."""
    ends = {maximum_predictions(length, each) for each in (rate, rate if final_rate is None else final_rate)}
    low, apart = min(ends), max(ends) - min(ends)
    slots = sorted({low + -(-apart * i // (STAGES - 1)) for i in range(STAGES)})
    fewest = [low, *(below + 1 for below in slots)]
    return tuple(Stage(*each) for each in reversed(list(zip(slots, fewest, strict=False))))


def stage_at(found: Sequence[Stage], length: int, rate: float) -> Stage:
    """The one of `stages` with the fewest slots that has room at a rate."""
    needed = maximum_predictions(length, rate)
    assert needed <= found[0].slots, (rate, found)
    return next(stage for stage in reversed(found) if stage.slots >= needed)


def shares_of_stages(
    masking: MaskingConfig, length: int, *, first: int, steps: int, total_steps: int
) -> list[tuple[Stage, float]]:
    """Stages of a part of a schedule in their order, and their shares of its steps: those of _SAMPLED steps at equal
    distances.

    first: its first step in the schedule of `total_steps` steps. steps: in the part, at least 1.
    """
    found, rate, decay = stages(length, masking.rate, masking.final_rate), masking.rate, masking.rate_decay
    count = min(steps, _SAMPLED)
    sampled = Counter(
        stage_at(
            found,
            length,
            masking_rate(first + i * steps // count, rate, masking.final_rate, total_steps=total_steps, decay=decay),
        )
        for i in range(count)
    )
    return [(stage, number / count) for stage, number in sampled.items()]


def hidden_in(masking: MaskingConfig, length: int, stage: Stage) -> int:
    """Positions of a full row that are [MASK] in every mask of a stage: what the layers below masking.late_layer do not
    compute."""
    return hidden_positions(masking, length) if masking.strategy in ("fully_explored", "auto") else stage.fewest
