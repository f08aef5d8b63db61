"""When a phase's checkpoints are written, in a pause or beside training, and what of the run goes into them.

Collectives: those of checkpoint.py.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

from maskvr_ds.checkpoint import save as checkpoint
from maskvr_ds.checkpoint.async_writer import AsyncCheckpointWriter
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import MAPNET_STATE
from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.telemetry.metrics import StepRecord
from maskvr_ds.training.phases import RunPhase, done
from maskvr_ds.training.setup import PhaseContext


class Saver:
    """The checkpoints of a phase. Every rank makes one and calls alike.

    latest: the newest checkpoint that counts, at first the one that the phase goes on from.
    """

    def __init__(self, phase: RunPhase, parts: PhaseContext, fence: Fence, latest: Path | None) -> None:
        self.latest = latest
        self._phase, self._parts, self._fence = phase, parts, fence
        self._background = AsyncCheckpointWriter() if phase.config.checkpoint.asynchronous else None
        self._due = False

    @property
    def writing(self) -> bool:
        """Whether this rank still writes files of a checkpoint beside training."""
        return self._background is not None and self._background.writing

    def written(self, flag: DeferredTensor) -> bool:
        """Whether all ranks have written theirs, so that `finish` need not wait; the same on every rank, once a step.

        flag: int64 [1], all-reduced over this step: on how many ranks `writing` was true.
        """
        return self._background is not None and self._background.agreed(flag)

    def due(self, step: int, *, stopping: bool) -> bool:
        """Whether a checkpoint is to be written now: every n-th step, after the last, and where the run stops.

        One that falls on a step that was left out waits for the next good one: the fault may be the weights'.
        """
        self._due |= stopping or is_due(step, self._phase.config.checkpoint.every_steps, self._phase.last_step)
        return self._due and not self._parts.guard.held

    def save(self, step: int, samples: int, record: StepRecord, *, wait: bool) -> None:
        """Write a checkpoint. wait: until it counts, also where checkpoints are written beside training.

        Raises FloatingPointError (`check_finite`), ReplicaError, and what `checkpoint.save` raises.
        """
        parts, config = self._parts, self._phase.config
        saving, self._due = time.perf_counter(), False
        # The figures of the steps that a checkpoint contains must not be lost with the process.
        parts.log.fsync_path()
        check_finite(record)
        beside = None
        if parts.proposer is not None:
            parts.proposer.check()
            beside = {MAPNET_STATE: (parts.proposer.state(), parts.proposer.metadata())}
        before = parts.state.phases[: self._phase.index]
        history = [*before, done(self._phase, step - self._phase.first_step, parts.corpus.sequence_length)]
        guarded = {**parts.guard.state(), "rollbacks": parts.rollbacks}
        auto = {} if parts.chooser is None else parts.chooser.state()
        saved = checkpoint.save(
            config.output_dir,
            parts.engine,
            replace(parts.state, step=step, samples=samples, phases=history, guard=guarded, auto=auto),
            probe=parts.probe,
            tokenizer=parts.corpus.tokenizer_folder,
            keep=config.checkpoint,
            fence=self._fence,
            beside=beside,
            background=self._background,
        )
        seconds = time.perf_counter() - saving
        if self._background is None:
            self.latest = saved
            parts.log.event(event="checkpoint", step=step, seconds=seconds)
            return
        self._background.pausing(seconds)
        if wait:
            self.finish()

    def finish(self) -> None:
        """Have the checkpoint that is being written count, if there is one."""
        if self._background is not None and (finished := self._background.finish()) is not None:
            self.latest, event = finished
            self._parts.log.event(**event)


def is_due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something that happens after every n-th step (0: never) and after the last is to happen now."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def check_finite(record: StepRecord) -> None:
    """Raise FloatingPointError, on every rank alike, where the step's loss or gradient norm is not finite.

    Called before saving: a checkpoint of a diverged model must not push a good one out. In fp16 an infinite norm is no
    divergence but the search for the loss scale: the update was left out (`step_and_norm` knows when that must end).
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
