"""Metrics log: metrics.jsonl (one line per step), trust_ratios.jsonl, DeepSpeed's monitors and a progress bar.

T trained tensors. Values on the device are copied to the host asynchronously and read one step later, so that logging
never makes the device wait.
"""

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from maskvr_ds import hashing
from maskvr_ds.config import MonitorConfig
from maskvr_ds.run_folder.layout import METRICS, TRUST_RATIOS
from maskvr_ds.runtime import logs
from maskvr_ds.runtime.deferred import DeferredFigures, DeferredTensor
from maskvr_ds.telemetry.metrics_file import HELD_OUT_EVENT, TRUST_RATIO_FIGURES, UPDATE_RMS_FIGURES, keep_until
from maskvr_ds.telemetry.monitors import curve_name, open_monitors

logger = logging.getLogger(__name__)

_HISTOGRAM = "lamb/trust_ratio_log10"
# Seconds between progress lines if stderr is not a terminal and there is no progress bar.
_LINE_EVERY = 30.0
# Steps after the first one from which the time of the others is estimated.
_TIMED_STEPS = 5
# Steps whose pace gives the time that is left.
_PACE_STEPS = 50


@dataclass
class StepRecord:
    """Metrics of one step, of which device values may still be pending.

    counters: int64 [4], all-reduced: data_digest, mask_digest, predictions, sequences without a maskable token.
    loss_sum: float64 [1], all-reduced: Σ w ℓ over the global batch, in nats.
    grad_norm: global norm before clipping; float or scalar tensor.
    trust_ratios: float32 [T]; None if the optimizer has none.
    pair_loss: float64 [1], mean loss of the sentence pairs in nats; None if none are trained.
    update_rms: float32 [T], StableAdamW's; None if the optimizer has none.
    token_flops: FLOPs per rank and token of the global batch, of what the step computed.
    proposal: metrics of the mask proposal network; None without one.
    """

    step: int
    samples: int
    tokens: int
    lr: float
    counters: DeferredTensor
    loss_sum: DeferredTensor
    grad_norm: "DeferredTensor | float"
    extra: dict[str, Any]
    token_flops: float
    trust_ratios: DeferredTensor | None = None
    update_rms: DeferredTensor | None = None
    proposal: DeferredFigures | None = None
    pair_loss: DeferredTensor | None = None

    def resolve(self) -> dict[str, Any]:
        """The step's line of metrics.jsonl; waits for the pending values."""
        data_digest, mask_digest, predictions, skipped = self.counters.values()
        norm = self.grad_norm.values() if isinstance(self.grad_norm, DeferredTensor) else self.grad_norm
        ratios = {} if self.trust_ratios is None else trust_ratio_figures(self.trust_ratios.values())
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "loss": self.loss_sum.values()[0] / max(predictions, 1),
            **({} if self.pair_loss is None else {"pair_loss": self.pair_loss.values()[0]}),
            "lr": self.lr,
            "grad_norm": norm,
            "predictions": predictions,
            "skipped_sequences": skipped,
            "data_digest": f"{data_digest & (1 << 64) - 1:016x}",
            "mask_digest": f"{mask_digest & (1 << 64) - 1:016x}",
            "digest_version": hashing.DIGEST_VERSION,
            **ratios,
            **({} if self.update_rms is None else update_rms_figures(self.update_rms.values())),
            **({} if self.proposal is None else self.proposal.values()),
            **self.extra,
        }


def trust_ratio_figures(ratios: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum trust ratio over the adapted tensors; NaN if a ratio is NaN.

    A ratio of exactly 1 means that the tensor was not adapted: a norm was 0, or it is a bias or LayerNorm in a variant
    that does not adapt these. Those are more than half of BERT's tensors, so the median over all would always be 1. If
    no tensor was adapted, all three are 1.
    """
    values = np.asarray(ratios)
    adapted = values[values != 1] if (values != 1).any() else values
    figures = (adapted.min(), np.median(adapted), adapted.max())
    return {key: float(value) for key, value in zip(TRUST_RATIO_FIGURES, figures, strict=True)}


def update_rms_figures(values: Sequence[float]) -> dict[str, float]:
    """Median and maximum RMS over the tensors, NaN if one is NaN. Updates of tensors above 1 were clipped."""
    figures = (np.median(values), np.max(values))
    return {key: float(value) for key, value in zip(UPDATE_RMS_FIGURES, figures, strict=True)}


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; non-finite values are written as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def duration(seconds: float) -> str:
    """In the two largest units: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class MetricsLog:
    """Logs the metrics of a run on rank 0; on other ranks every method returns immediately.

    Args:
        folder: the run folder.
        resume_step, resume_tokens: progress so far; later lines of an existing metrics.jsonl and later
            values in the monitors are dropped.
        total_steps: for the progress bar.
        monitor: which of DeepSpeed's monitors to write to.
        peak_tflops: peak rate of a rank's device in TFLOP/s, for the MFU; None: not known.
        real_share: share of the tokens that are not padding; the MFU counts these only.
        tensor_names: T names, in the order of the trust ratios; none if the optimizer has no trust ratios.
        rollbacks: the run's "rollback" events so far; metrics.jsonl has each after the step that was rolled back to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        resume_step: int,
        resume_tokens: int,
        total_steps: int,
        monitor: MonitorConfig,
        peak_tflops: float | None = None,
        real_share: float = 1.0,
        tensor_names: Sequence[str] = (),
        rollbacks: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.active = rank == 0
        self._pending: StepRecord | None = None
        self._tokens = resume_tokens
        self._peak_tflops, self._real_share = peak_tflops, real_share
        self._tensor_names = tensor_names
        self._histogram_every = monitor.histogram_every
        if not self.active:
            return
        self.path = folder / METRICS
        self._ratios_path = folder / TRUST_RATIOS
        keep_until(resume_step, self.path, rollbacks)
        # Line buffered, so that a kill loses no complete line.
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        # Both files are open from here on: a job that takes over the run replaces them, and this job cannot write to
        # the new ones.
        self._ratios_file: TextIO | None = None
        if (logged := bool(tensor_names and self._histogram_every)) or self._ratios_path.exists():
            keep_until(resume_step, self._ratios_path)
        if logged:
            self._ratios_file = self._ratios_path.open("a", buffering=1, encoding="utf-8")
        self._monitor = open_monitors(folder, monitor, resume_step)
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step,
            unit="step",
            disable=logs.is_quiet() or not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix}",
        )
        self._clock = self._last_line = time.perf_counter()
        self._timed_steps = 0
        # Seconds of recent steps.
        self._paces: deque[float] = deque(maxlen=_PACE_STEPS)

    def step(self, record: StepRecord) -> None:
        """Add a step; the previous one is written."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens, self._tokens = record.tokens - self._tokens, record.tokens
        rate = tokens / seconds
        tflops = rate * record.token_flops / 1e12
        record.extra.update(tokens_per_second=rate, step_seconds=seconds, model_tflops_per_rank=tflops)
        if self._peak_tflops is not None:
            record.extra.update(mfu=tflops * self._real_share / self._peak_tflops)
        self.flush()
        self._pending = record
        self._estimate_time(record.step, seconds)

    def _estimate_time(self, step: int, seconds: float) -> None:
        """Log, once, the time that the remaining steps will take at the pace of the first ones."""
        self._timed_steps += 1
        # The first step warms up: kernels are chosen or compiled, memory is allocated.
        if self._timed_steps > 1:
            self._paces.append(seconds)
        if len(self._paces) != _TIMED_STEPS or self._timed_steps > 1 + _TIMED_STEPS:
            return
        self._bar.clear()
        logger.info(
            "time      about %s for the remaining %s steps (%.3g s each), evaluations and checkpoints not counted",
            self._time_left(step),
            f"{self._bar.total - step:,}",
            float(np.median(self._paces)),
        )

    def _time_left(self, step: int) -> str:
        """At the pace of recent steps, evaluations and checkpoints not counted."""
        return duration(float(np.median(self._paces)) * (self._bar.total - step))

    def event(self, **content: Any) -> None:
        """Write an event line; `event` in `content` is its kind."""
        if self.active:
            self.flush()
            self._write(self._file, content)

    def held_out(self, step: int, figures: dict[str, float]) -> None:
        """Write held-out figures of a step without training: those before the first one."""
        if not self.active:
            return
        self.event(event=HELD_OUT_EVENT, step=step, **_without_nan(figures))
        self._monitor.write_events([(curve_name(key), value, step) for key, value in figures.items()])
        logger.info("step %d: held-out loss %.4f before training", step, figures["held_out_loss"])

    def add(self, **figures: float | str) -> None:
        """Add values to the line of the current step."""
        if self._pending is not None:
            self._pending.extra.update(figures)

    def flush(self) -> None:
        """Write the pending step, waiting for its values."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        line = pending.resolve()
        self._write(self._file, _without_nan(line))
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        if pending.trust_ratios is not None and self._histogram_every and pending.step % self._histogram_every == 0:
            self._write_trust_ratios(line, pending.trust_ratios.values())
        self._monitor.write_events([(curve_name(key), value, pending.step) for key, value in numbers.items()])
        self._show(line)

    def _write_trust_ratios(self, line: dict[str, Any], ratios: list[float]) -> None:
        """Write all ratios by name, and their histogram to the monitors that support histograms (CSV does not)."""
        finite = [ratio if math.isfinite(ratio) else None for ratio in ratios]
        by_name = dict(zip(self._tensor_names, finite, strict=True))
        if self._ratios_file is not None:
            content = {"step": line["step"], "samples": line["samples"], "trust_ratios": by_name}
            self._write(self._ratios_file, content)
        # Logarithms, because the ratios span decades. MonitorMaster.write_events takes scalars only: call the monitors.
        logarithms = np.log10([ratio for ratio in finite if ratio is not None and ratio > 0])
        if not len(logarithms):
            return
        if self._monitor.tb_monitor is not None:
            self._monitor.tb_monitor.summary_writer.add_histogram(_HISTOGRAM, logarithms, line["step"])
        if self._monitor.wandb_monitor is not None:
            import wandb

            self._monitor.wandb_monitor.log({_HISTOGRAM: wandb.Histogram(logarithms)}, step=line["step"])

    def _write(self, file: TextIO, content: dict[str, Any]) -> None:
        """Append a line. Raises OSError with the file's name, which errors of open files lack."""
        try:
            file.write(json.dumps(content) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.name) from error

    def flush_to_disk(self) -> None:
        """Write and fsync everything so far, so that both files are as durable as a checkpoint."""
        if self.active:
            self.flush()
            for file in (self._file, self._ratios_file):
                if file is not None:
                    os.fsync(file.fileno())

    def exclude(self, seconds: float) -> None:
        """Exclude time not spent training (evaluation, saving) from the next step's tokens_per_second."""
        if self.active:
            self._clock += seconds

    def _show(self, line: dict[str, Any]) -> None:
        text = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in line:
            text += f" (MFU {line['mfu']:.0%})"
        if self._paces and line["step"] < self._bar.total:
            text += f"  {self._time_left(line['step'])} left"
        if "held_out_loss" in line:
            text += f"  held-out {line['held_out_loss']:.4f}"
            if math.isfinite(behind_mask := line.get("held_out_loss_mask", math.nan)):
                text += f" ([MASK] {behind_mask:.4f})"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.perf_counter()
        # A bar shows the held-out loss for a step only: it stays as a line.
        if "held_out_loss" in line or (self._bar.disable and now - self._last_line > _LINE_EVERY):
            self._last_line = now
            logger.info("step %d/%d  %s", line["step"], self._bar.total, text)

    def close(self) -> None:
        """Write the pending step and close files and monitors."""
        if self.active:
            self.flush()
            self._bar.close()
            self._file.close()
            if self._ratios_file is not None:
                self._ratios_file.close()
            if self._monitor.tb_monitor is not None:
                self._monitor.tb_monitor.summary_writer.close()
