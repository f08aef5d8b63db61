"""Divergence guard: skips updates whose loss or gradient norm is non-finite or far above the recent median.

1. A skipped update changes neither weights nor moments (MAPNet still learns from those of its gradient norms that are
   finite). The loss is known on all ranks before the optimizer steps, and DeepSpeed has computed the norm by then:
   engine/deepspeed_patches.py asks `Guard.allow_update` in between.
2. If more than `max_skipped` of the last `history` updates were skipped, the run rolls back to its last checkpoint and
   skips the batches of those steps from there on (training/rollback.py). After `max_rollbacks` to the same checkpoint
   it tries each earlier one once, and then ends.
3. No checkpoint is written after a skipped update, since the weights may be at fault. A checkpoint that is due is
   written after the next good step; a phase whose last update is skipped rolls back, too. If a save finds weights,
   moments or the logits of its probe not finite, nothing is written and the run rolls back.

Resume is exact: recent losses, norms and skipped steps are in the checkpoint, rollbacks in RUN/rollbacks.json, which is
written before the run rolls back. The batches read are a function of the rollbacks and of the number of steps trained.

No collectives: all ranks hold the same figures. The host waits for the loss of every step.
"""

import math
import statistics
from collections import deque
from typing import Any

import torch

from maskvr_ds.config.reliability import DivergenceConfig

Window = tuple[int, int]


class DivergedError(ArithmeticError):
    """The run must roll back. Raised on all ranks at the end of a step; windows: ranges of batches to skip."""

    def __init__(self, step: int, reason: str, windows: list[Window]) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.windows = step, reason, windows


class Guard:
    """Judges the steps of one phase.

    restored: `state()` from the checkpoint that the phase resumes from; empty if the phase starts.
    """

    def __init__(self, config: DivergenceConfig, restored: dict[str, Any]) -> None:
        self._config = config
        self._losses: deque[float] = deque(restored.get("losses", ()), config.history)
        self._norms: deque[float] = deque(restored.get("norms", ()), config.history)
        # Skipped updates: (step, number of its batch in the phase).
        self._bad: list[tuple[int, int]] = [(step, batch) for step, batch in restored.get("bad", ())]
        self._loss = 0.0
        # Loss of this step, not yet read from the device; norm of this step as given and as read.
        self._unread: torch.Tensor | None = None
        self._norm: tuple[torch.Tensor | float, float] | None = None
        self._update_skipped = False
        # Reason for which the last update was skipped.
        self._fault: str | None = None

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, in JSON types."""
        return {"losses": list(self._losses), "norms": list(self._norms), "bad": self._bad}

    @property
    def enabled(self) -> bool:
        return self._config.enabled

    def before_update(self, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Record the loss (float64 scalar on the device) of the step whose update comes next.

        norm: its gradient norm if already known, in which case the host waits for both; else `read` waits.
        """
        self._unread, self._update_skipped, self._norm = loss, False, None
        if norm is not None:
            self._update_skipped = self._reason(self.read(norm)) is not None

    def read(self, norm: torch.Tensor | float) -> float:
        """The gradient norm as a number. Waits for the device once per step, for loss and norm together."""
        if self._norm is not None and self._norm[0] is norm:
            return self._norm[1]
        if self._unread is not None and isinstance(norm, torch.Tensor):
            self._loss, number = torch.stack([self._unread, norm.to(self._unread)]).tolist()
        else:
            self._loss = self._loss if self._unread is None else float(self._unread)
            number = float(norm)
        self._unread, self._norm = None, (norm, number)
        return number

    def allow_update(self, norm: torch.Tensor | float) -> bool:
        """Whether the optimizer may step; norm: global gradient norm before clipping. Waits for the device.

        Once false, false for the rest of the step: ZeRO steps the optimizer once per parameter group.
        """
        if not self._config.enabled:
            return True
        # At ZeRO 0 in fp32 DeepSpeed computes no norm, and `before_update` has judged it.
        number = float(norm) if self._norm is not None and isinstance(norm, float) else self.read(norm)
        self._update_skipped = self._update_skipped or self._reason(number) is not None
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
        """Judge and record a step; returns the entry for its line in metrics.jsonl: the reason if it was skipped.

        batch: number of its batch in the phase. loss_scale: in fp16, where an overflow that only lowers the scale is
        not judged.
        """
        self._fault = None
        if not self._config.enabled:
            return {}
        norm = self.read(norm)  # also the loss, if DeepSpeed skipped the update
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
        """Raise DivergedError on all ranks if too many recent updates were skipped, or that of a phase's last step."""
        if self._fault is not None and (is_last or len(self._bad) > self._config.max_skipped):
            raise self._diverged(step)

    def not_finite(self, step: int, batch: int, reason: str) -> None:
        """Raise on all ranks after an update that was judged good and still left something that is not finite:
        DivergedError, which rolls back; FloatingPointError if the guard is disabled."""
        if not self._config.enabled:
            raise FloatingPointError(
                f"step {step}: {reason}; not saved. Resume from the last checkpoint with a lower optimizer.lr or more "
                "schedule.warmup_steps"
            )
        self._fault, self._bad = reason, [*self._bad, (step, batch)]
        raise self._diverged(step)

    def _diverged(self, step: int) -> DivergedError:
        margin = self._config.margin
        assert self._fault is not None
        return DivergedError(step, self._fault, [(max(0, b - margin), b + margin + 1) for _, b in self._bad])

    @property
    def update_skipped(self) -> bool:
        """Whether the last update was skipped."""
        return self._update_skipped

    def clear_skipped(self) -> None:
        """Stop counting skipped updates that led to a rollback: their batches are skipped from now on."""
        self._bad = []
