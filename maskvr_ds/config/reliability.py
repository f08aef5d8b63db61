"""Sections `checkpoint`, `divergence`, `replicas` and `hangs`. Loads no torch."""

from typing import Annotated

from pydantic import Field

from maskvr_ds.config.base import Count, Factor, PositiveCount, Section, Steps, Timeout


class CheckpointConfig(Section):
    """Schedule and retention of checkpoints. One is always saved after the last step."""

    every_steps: Steps = 1000
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: Annotated[PositiveCount, Field(ge=2)] = 3
    """Number of newest checkpoints to keep, at least 2: if the newest turns out to be bad, the run needs another."""
    keep_every_steps: Steps = 0
    """Also keep the checkpoints of steps that are multiples of this number; 0: none. It does not cause checkpoints."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss, of each phase; checkpoints/best names it. Held-out rows
    are then evaluated before every save, except when the run is asked to stop."""
    asynchronous: bool = False
    """Copy to host memory at once and write to disk while training continues."""


class DivergenceConfig(Section):
    """Guard against divergence: an update whose loss or gradient norm is non-finite, or far above the median of the
    last `history` good steps, is skipped. If that happens too often, the run rolls back to its last checkpoint and
    skips the batches of such steps."""

    enabled: bool = True
    """Whether to check losses and gradient norms."""
    loss_factor: Factor = 2.0
    """A loss above this multiple of the median is too high (judged once a fifth of `history` is recorded)."""
    norm_factor: Factor = 100.0
    """A gradient norm above this multiple of the median is too high."""
    history: PositiveCount = 100
    """Number of steps that the medians and `max_skipped` refer to."""
    max_skipped: Count = 2
    """Maximum number of skipped updates within the last `history` steps; one more causes a rollback."""
    margin: Count = 1
    """Batches before and after that of a bad step that are skipped with it after a rollback."""
    max_rollbacks: Count = 3
    """Maximum number of rollbacks to the same checkpoint. After that the run rolls back to each earlier checkpoint that
    it has kept, once, and ends with an explanation if that does not help either."""


class ReplicasConfig(Section):
    """Comparison, by hash, of the copies that ranks hold of the same weights: of all at ZeRO 0 to 2 (at 0 also of
    masters and moments), at ZeRO 3 of the small ones that every rank keeps. If a rank's copy differs, the run ends
    before it saves a checkpoint, and names the rank."""

    enabled: bool = True
    """Whether to compare before a checkpoint is saved."""
    every_steps: Steps = 0
    """Steps between further comparisons; 0: none."""


class HangsConfig(Section):
    """Detection of hanging ranks."""

    timeout: Timeout = 900.0
    """Seconds without a heartbeat, or without progress while other ranks wait, after which the job is ended. Must
    exceed the duration of the slowest step; at least 1, or 0: never."""
