"""What becomes of a step whose loss or gradient norm is not finite, or far above the median of late.

1. Its update is left out: neither weights nor moments see it (MAPNet learns from those of its gradient norms that are
   finite). The loss is known to all ranks before the optimizer steps, and so is the norm that DeepSpeed has taken by
   then; the optimizer's step is held back between the two.
2. Where more than `max_skipped` of the last `history` steps were so, the run goes back to its last checkpoint, and
   passes over the batches of those steps from there on. After `max_rollbacks` to one checkpoint it ends.
3. Nothing is saved after a step whose update was left out: the fault may be the weights'. What is due is saved after
   the next good step; a phase that would end on such a step goes back too.

A resume is exact: figures and bad steps of late stand in the checkpoint, roll-backs in RUN/rollbacks.json, which is
written before the run goes back; which batches are read is a function of the roll-backs and of the number trained.

No collective: all ranks hold the same figures. The host waits for the loss of every step.
"""

import math
import statistics
from collections import deque
from typing import Any

import torch

from maskvr_ds.config.reliability import DivergenceConfig

Window = tuple[int, int]


class DivergedError(ArithmeticError):
    """The run goes back. Raised on every rank alike, at the end of a step."""

    def __init__(self, step: int, reason: str, windows: list[Window]) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.windows = step, reason, windows


class Guard:
    """Judges the steps of one phase.

    Args:
        config: the section. restored: `state` of the checkpoint that the phase goes on from; empty: it begins.
    """

    def __init__(self, config: DivergenceConfig, restored: dict[str, Any]) -> None:
        self._config = config
        self._losses: deque[float] = deque(restored.get("losses", ()), config.history)
        self._norms: deque[float] = deque(restored.get("norms", ()), config.history)
        # (step, number of its batch in the phase) of those that were left out.
        self._bad: list[tuple[int, int]] = [(step, batch) for step, batch in restored.get("bad", ())]
        self._loss = 0.0
        self._update_skipped = False
        # Why the last update was left out.
        self._fault: str | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it, in JSON types."""
        return {"losses": list(self._losses), "norms": list(self._norms), "bad": self._bad}

    @property
    def enabled(self) -> bool:
        return self._config.enabled

    def before_update(self, loss: float, norm: float | None) -> None:
        """The loss of the step whose update comes next; its gradient norm, where that is known already."""
        self._loss = loss
        self._update_skipped = self._reason(norm or 0.0) is not None

    def allow_update(self, norm: torch.Tensor | float) -> bool:
        """Whether the optimizer may step; norm: global gradient norm before clipping. Waits for the device.

        Once false, false for the rest of the step: ZeRO steps the optimizer once per parameter group.
        """
        if not self._config.enabled:
            return True
        self._update_skipped = self._update_skipped or self._reason(float(norm)) is not None
        return not self._update_skipped

    def _reason(self, norm: float) -> str | None:
        for name, value, past, factor in (
            ("loss", self._loss, self._losses, self._config.loss_factor),
            ("grad_norm", norm, self._norms, self._config.norm_factor),
        ):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if len(past) * 5 >= self._config.history and value > factor * (median := statistics.median(past)):
                return f"{name} is {value:.4g}, more than {factor:g} times the median {median:.4g}"
        return None

    def after_update(
        self, step: int, batch: int, norm: torch.Tensor | float, *, loss_scale: float | None
    ) -> dict[str, str]:
        """Take the step in; → what its line in metrics.jsonl says of it: why its update was left out, if it was.

        batch: number of its batch in the phase. loss_scale: of fp16, which leaves out updates by itself to find it.
        """
        self._fault = None
        if not self._config.enabled:
            return {}
        norm = float(norm)
        if loss_scale is not None and norm == math.inf and math.isfinite(self._loss):
            return {}
        reason = self._reason(norm)
        self._update_skipped, self._fault = reason is not None, reason
        if reason is None:
            self._losses.append(self._loss)
            self._norms.append(norm)
            return {}
        self._bad = [(s, b) for s, b in self._bad if s > step - self._config.history] + [(step, batch)]
        return {"update_left_out": reason}

    def check(self, step: int, *, is_last: bool) -> None:
        """Raise DivergedError, on every rank alike, where updates were left out too often, or that of a phase's last
        step."""
        if self._fault is not None and (is_last or len(self._bad) > self._config.max_skipped):
            margin = self._config.margin
            windows = [(max(0, b - margin), b + margin + 1) for _, b in self._bad]
            raise DivergedError(step, self._fault, windows)

    @property
    def update_skipped(self) -> bool:
        """Whether the last update was skipped."""
        return self._update_skipped

    def clear_skipped(self) -> None:
        """Stop counting skipped updates that led to a rollback: their batches are skipped from now on."""
        self._bad = []
