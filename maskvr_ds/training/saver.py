"""Checkpoint scheduling, synchronous or asynchronous, and the state that goes into a checkpoint.

Collectives: those of checkpoint/save.py.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

from maskvr_ds.checkpoint import save
from maskvr_ds.checkpoint.async_writer import AsyncCheckpointWriter
from maskvr_ds.engine.replicas import check_replicas
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import MAPNET_STATE
from maskvr_ds.run_folder.retention import LOSS, MEASURED
from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.telemetry.metrics import StepRecord
from maskvr_ds.training.phases import RunPhase, done
from maskvr_ds.training.setup import PhaseContext


class Saver:
    """The checkpoints of a phase. Every rank has one; all ranks make the same calls.

    latest: the newest complete checkpoint; initially the one that the phase was resumed from.
    """

    def __init__(self, phase: RunPhase, context: PhaseContext, fence: Fence, latest: Path | None) -> None:
        self.latest = latest
        self._phase, self._context, self._fence = phase, context, fence
        self._background = AsyncCheckpointWriter() if phase.config.checkpoint.asynchronous else None
        self._due = False

    @property
    def writing(self) -> bool:
        """Whether this rank is writing files of an asynchronous checkpoint."""
        return self._background is not None and self._background.writing

    def all_written(self, flag: DeferredTensor) -> bool:
        """Whether all ranks have written their files, so that `finish` will not wait; identical on all ranks.

        Call once per step. flag: int64 [1], all-reduced in this step: the number of ranks that are `writing`.
        """
        return self._background is not None and self._background.all_written(flag)

    def due(self, step: int, *, stopping: bool) -> bool:
        """Whether to write a checkpoint now: every n-th step, after the last one, and when the run is stopping.

        Call once per step: a checkpoint that is due stays due until it is written. One that falls on a skipped update
        waits for the next good step: the weights may be at fault.
        """
        self._due |= stopping or is_due(step, self._phase.config.checkpoint.every_steps, self._phase.last_step)
        return self._due and not self._context.guard.update_skipped

    def check_replicas(self, step: int, *, saving: bool) -> None:
        """Compare the ranks' copies of the weights if that is due. Call once per step, before `save`.

        Raises ReplicaError.
        """
        config = self._phase.config.replicas
        if config.enabled and (saving or (config.every_steps > 0 and step % config.every_steps == 0)):
            check_replicas(self._context.engine, step)

    def save(
        self, step: int, samples: int, record: StepRecord, *, batch: int, wait: bool, held_out: dict[str, float]
    ) -> None:
        """Write a checkpoint, once all shards are verified. wait: until it is complete, also if checkpoints are
        asynchronous. batch: number of the step's batch in the phase. held_out: figures of this step, if it was
        evaluated.

        Raises what `BackgroundVerification.wait` raises for damaged shards, FloatingPointError (`check_finite`),
        ReplicaError, what `Guard.not_finite` raises if weights, moments or the probe's logits are not finite, and what
        `checkpoint.save.save` raises.
        """
        context, config = self._context, self._phase.config
        # Weights that were trained on a damaged shard must not count as good.
        context.verification.wait(step)
        started, self._due = time.perf_counter(), False
        # Metrics of the steps that a checkpoint contains must survive the process.
        context.log.flush_to_disk()
        check_finite(record)
        extra = None
        if context.proposer is not None:
            context.proposer.check()
            extra = {MAPNET_STATE: (context.proposer.state(), context.proposer.metadata())}
        before = context.state.phases[: self._phase.index]
        history = [*before, done(self._phase, step - self._phase.first_step, context.corpus.sequence_length)]
        guard = {**context.guard.state(), "rollbacks": context.rollbacks}
        auto = {} if context.chooser is None else context.chooser.state()
        best: dict[str, float] = {}
        if config.checkpoint.keep_best and context.evaluation and math.isfinite(held_out.get(LOSS, math.nan)):
            measured = {**held_out, "held_out_rows": context.evaluation.rows}
            best = {name: measured[name] for name in (LOSS, *MEASURED) if name in measured}
        state = replace(
            context.state, step=step, samples=samples, phases=history, guard=guard, auto=auto, held_out=best
        )
        try:
            saved = save.save(
                config.output_dir,
                context.engine,
                state,
                probe=context.probe,
                tokenizer=context.corpus.tokenizer_folder,
                keep=config.checkpoint,
                fence=self._fence,
                extra=extra,
                background=self._background,
            )
        except save.NotFiniteError as error:
            context.guard.not_finite(step, batch, str(error))
            raise
        seconds = time.perf_counter() - started
        if self._background is None:
            self.latest = saved
            context.log.event(event="checkpoint", step=step, seconds=seconds)
            return
        self._background.record_pause(seconds)
        if wait:
            self.finish()

    def finish(self) -> None:
        """Complete the asynchronous checkpoint in flight, if there is one."""
        if self._background is not None and (finished := self._background.finish()) is not None:
            self.latest, event = finished
            self._context.log.event(**event)


def is_due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something that happens every n-th step (0: never) and after the last step happens now."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def check_finite(record: StepRecord) -> None:
    """Raise FloatingPointError, on all ranks, if the step's loss or gradient norm is not finite.

    Called before saving: a checkpoint of a diverged model must not displace a good one. In fp16 an infinite norm is not
    divergence but part of the search for the loss scale: that update was skipped (`engine.step_and_norm`).
    """
    line = record.resolve()
    for name in ("loss", "grad_norm"):
        if name == "grad_norm" and "loss_scale" in line and line[name] == math.inf:
            continue
        if not math.isfinite(line[name]):
            raise FloatingPointError(
                f"step {record.step}: {name} is {line[name]}; not saved. Resume from the last checkpoint with a lower "
                "optimizer.lr or more schedule.warmup_steps"
            )
