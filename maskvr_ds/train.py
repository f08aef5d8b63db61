"""Pretraining: `maskvr train --config run.yaml`, `deepspeed --module maskvr_ds.train --config run.yaml`.

Collectives: those of a step are told in step.py, those around checkpoints in checkpoint.py.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskvr_ds import hashing
from maskvr_ds.config import RunConfig, add_run_options, deepspeed_config_path, load_config
from maskvr_ds.engine.deepspeed_patches import free_memory
from maskvr_ds.engine.ds_config import read_deepspeed_config
from maskvr_ds.engine.engine import loss_scale, set_learning_rate
from maskvr_ds.models.pretrained import InitialWeights
from maskvr_ds.reliability.divergence import DivergedError
from maskvr_ds.reliability.signals import StoppedError, StopRequest
from maskvr_ds.reliability.watchdog import Watchdog
from maskvr_ds.run_folder import checkpoints, layout, status
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import LOSS_PLOT, METRICS
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.runtime.distributed import say
from maskvr_ds.telemetry.metrics import StepRecord
from maskvr_ds.telemetry.plots import plot_loss
from maskvr_ds.training import resume as resume
from maskvr_ds.training.corpora import check_corpora
from maskvr_ds.training.phases import RunPhase, plan
from maskvr_ds.training.resume import find_checkpoint, remaining_phases, resolve_model_config
from maskvr_ds.training.rollback import batches, roll_back, windows_of
from maskvr_ds.training.run import write_run_status
from maskvr_ds.training.saver import Saver, is_due
from maskvr_ds.training.setup import DROPOUT, PhaseContext, setup_phase
from maskvr_ds.training.step import run_step

# What ends a phase before its last step, on all ranks alike.
_EXPECTED_EXITS = (DivergedError, StoppedError)


def train(config: RunConfig, resume: str | None = None, stop: StopRequest | None = None) -> None:
    """Run or go on with a run, phase by phase. Every rank calls, after `distributed.initialize`.

    resume: None (the folder must be empty), "auto" or a path: see `checkpoint.find`. stop: signals that end the run.
    Raises ValueError (ConfigError, CorpusError, CheckpointError) for what the user can mend, RemoteError where another
    rank did, FloatingPointError where the run diverged, StoppedError where it was asked to stop and has saved.
    """
    latest = distributed.run_on_rank0(lambda: find_checkpoint(config, resume))
    # Before anything asks for sizes, which the folder has, or the checkpoint. Rank 0's: it may be on one host.
    model, initial = distributed.run_on_rank0(partial(resolve_model_config, config.model, latest))
    config = config.model_copy(update={"model": model})
    phases = plan(config)
    world_size = distributed.world_size()
    for phase in phases:
        distributed.run_collectively(partial(phase.naming, partial(phase.config.accumulation_steps, world_size)))
    deepspeed_config = distributed.run_collectively(
        lambda: read_deepspeed_config(deepspeed_config_path(config.deepspeed))
    )
    left = remaining_phases(phases, latest)
    if len(left) > 1:
        # A fault in the last phase's corpus must show now, not after a week in the first.
        distributed.run_on_rank0(lambda: check_corpora(left))
    fence = Fence(config.output_dir)
    while left:
        try:
            latest = train_phase(config, left[0], deepspeed_config, initial, latest, fence, stop)
            left = left[1:]
            if left and latest is not None:
                # As at a resume, nothing is unpickled that is not what was written.
                distributed.run_on_rank0(partial(checkpoints.verify, latest))
        except DivergedError as error:
            latest = roll_back(left[0].config, left[0], error, latest, fence)
            # Where the phase has none of its own and the last one before it is damaged, that may be two phases back.
            left = remaining_phases(phases, latest)
        free_memory()
    if distributed.rank() == 0:
        write_run_status(config.output_dir, layout.COMPLETED, phases[-1].last_step, fence)
        plot_loss(config.output_dir / METRICS, config.output_dir / LOSS_PLOT)


def train_phase(
    run: RunConfig,
    phase: RunPhase,
    deepspeed_config: dict[str, Any],
    initial: InitialWeights | None,
    latest: Path | None,
    fence: Fence,
    stop: StopRequest | None = None,
) -> Path | None:
    """Train what is left of one phase; → its last checkpoint. Every rank calls.

    initial: what the run began with, if not with weights from its seed. latest: the checkpoint to go on from, of this
    phase or the last one of the phase before: crossing the boundary is a resume, whether the process was killed there
    or not. fence: taken here, or checked. Raises DivergedError where it shall be called again.
    """
    config = phase.config
    parts = setup_phase(run, phase, deepspeed_config, initial, latest, fence)
    engine, masker, proposer, log, guard = parts.engine, parts.masker, parts.proposer, parts.log, parts.guard
    step, samples = parts.state.step, parts.state.samples
    reader = batches(parts.loader, step - phase.first_step, windows_of(parts.rollbacks, phase.index))
    saver = Saver(phase, parts, fence, latest)
    engine.train()
    watchdog = Watchdog(run.output_dir, run.hangs.timeout, orderly=_EXPECTED_EXITS)
    with watchdog, _closing(parts, reader, saver, watchdog):
        while step < phase.last_step:
            watchdog.mark(step, "data")
            number, batch = next(reader)
            watchdog.mark(step, "step")
            lr = phase.learning_rate(step)
            set_learning_rate(engine, lr)
            masker.set_rate(phase.masking_rate(step))
            torch.manual_seed(hashing.fold(config.seed, DROPOUT, step, distributed.rank()) >> 1)
            scale, skipped = loss_scale(engine), engine.skipped_steps
            asked = stop is not None and stop.heard(run.output_dir if distributed.rank() == 0 else None)
            counters, loss_sum, grad_norm = run_step(
                engine, masker, batch, config.batch.micro_size, proposer, guard=guard, stop=asked, writing=saver.writing
            )
            step += 1
            samples += config.batch.global_size
            # A step that was left out has none: those of the last update are still there.
            updated = engine.skipped_steps == skipped and not guard.held
            ratios = getattr(engine.basic_optimizer, "trust_ratios", None) if updated else None
            record = StepRecord(
                step=step,
                samples=samples,
                tokens=parts.tokens_before + (samples - phase.first_sample) * parts.corpus.sequence_length,
                lr=lr,
                counters=DeferredTensor(counters[:4]),
                loss_sum=DeferredTensor(loss_sum),
                grad_norm=DeferredTensor(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm,
                trust_ratios=None if ratios is None else DeferredTensor(ratios),
                proposal=None if proposer is None else proposer.step(),
                # Updates that DeepSpeed left out as gradients were not finite; the scale that this step's loss had.
                extra={"skipped_updates": engine.skipped_steps}
                | ({} if scale is None else {"loss_scale": scale})
                | ({"phase": phase.name} if phase.name else {}),
            )
            log.step(record)
            log.add(**guard.after_update(step, number, grad_norm, loss_scale=scale))
            guard.check(step, is_last=step == phase.last_step)

            stopping = stop is not None and stop.agreed(DeferredTensor(counters[4:5]))
            written = saver.written(DeferredTensor(counters[5:]))
            to_evaluate = parts.evaluation if is_due(step, config.evaluation.every_steps, phase.last_step) else None
            to_save = saver.due(step, stopping=stopping)
            chooser = parts.chooser if parts.chooser is not None and parts.chooser.due(step, phase.last_step) else None
            if to_evaluate is None and chooser is None and not to_save and not written:
                continue
            distributed.wait_for_device()
            pause = time.perf_counter()
            watchdog.pause()
            if to_evaluate is not None:
                log.add(held_out_loss=to_evaluate.loss(engine.module))
            if chooser is not None:
                log.event(**chooser.choose(step, (number + 1) * config.batch.global_size))
            if to_save or written:
                saver.finish()
            if to_save:
                saver.save(step, samples, record, wait=stopping or step == phase.last_step)
                if stopping and step < phase.run_steps:
                    distributed.run_on_rank0(partial(write_run_status, run.output_dir, layout.STOPPED, step, fence))
                    raise StoppedError(f"stopped at step {step} as a signal asked, saved in {saver.latest}")
            log.exclude(time.perf_counter() - pause)
    return saver.latest


@contextmanager
def _closing(parts: PhaseContext, reader: Any, saver: Saver, watchdog: Watchdog) -> Iterator[None]:
    """Close them at the end, and where a phase is left on purpose; other errors leave everything as it is."""
    left: Exception | None = None
    try:
        yield
    except _EXPECTED_EXITS as error:
        left = error
        # A checkpoint that is still being written is one to go back to.
        watchdog.pause()
        saver.finish()
    parts.log.close()
    reader.close()
    parts.engine.destroy()
    if left is not None:
        raise left


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit status: 0 done, 1 error, 75 (EXIT_STOPPED) stopped by a signal, with
    a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m maskvr_ds.train", description="One rank of a pretraining run.")
    add_run_options(parser)
    # The deepspeed launcher adds it; the rank's place is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    stop = StopRequest()

    def run() -> int | None:
        config = distributed.run_collectively(lambda: load_config(arguments.config, arguments.assignments))
        try:
            train(config, arguments.resume, stop)
        except StoppedError as stopped:
            say(f"{stopped}; go on with --resume auto")
            return status.EXIT_STOPPED
        return None

    return distributed.run_as_rank(run)


if __name__ == "__main__":
    sys.exit(main())
