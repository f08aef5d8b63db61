"""The sections of what keeps a run alive: checkpoints, divergence, hangs. Loads no torch."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from maskvr_ds.config.base import Section

Factor = Annotated[float, Field(gt=1)]


class CheckpointConfig(Section):
    """After every n-th step and after the last; 0: only after the last."""

    every_steps: NonNegativeInt = 1000
    keep_last: PositiveInt = 3
    # Those of every n-th step are kept for good; 0: none. Counts only where a checkpoint falls on such a step.
    keep_every_steps: NonNegativeInt = 0
    # Copied to host memory at once, written while training goes on.
    asynchronous: bool = False


class DivergenceConfig(Section):
    """A step whose loss or gradient norm is not finite, or far above the median of late, updates no weights; where
    that comes too often the run goes back to its last checkpoint and passes over the batches of such steps."""

    enabled: bool = True
    # Far above: times the median of the last `history` good steps (judged once a fifth of them are there).
    loss_factor: Factor = 2.0
    norm_factor: Factor = 100.0
    history: PositiveInt = 100
    # So many of `history` steps in a row may leave their update out; one more, and the run goes back.
    max_skipped: NonNegativeInt = 2
    # Batches before and after that of a bad step that are passed over with it.
    margin: NonNegativeInt = 1
    # To the same checkpoint; then the run ends with an explanation.
    max_rollbacks: NonNegativeInt = 3


class HangsConfig(Section):
    # Seconds after which a rank that gives no sign of life, or does not get on while others wait, ends the job. Longer
    # than the slowest step. 0: never.
    timeout: Annotated[float, Field(ge=0)] = 900.0
