"""Pretraining loop: `maskvr train --config run.yaml`, `deepspeed --module maskvr_ds.train --config run.yaml`.

Collectives: those of a step are described in training/step.py, those around checkpoints in checkpoint/save.py and
load.py.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskvr_ds import hashing
from maskvr_ds.checkpoint.load import ContentError
from maskvr_ds.config import RunConfig, add_run_options, load_config, run_deepspeed_config, with_local_model
from maskvr_ds.data.keys import DROPOUT
from maskvr_ds.engine.deepspeed_patches import free_memory
from maskvr_ds.engine.engine import loss_scale, set_learning_rate
from maskvr_ds.models.compiled import check_compiler
from maskvr_ds.reliability.divergence import DivergedError
from maskvr_ds.reliability.signals import StoppedError, StopRequest
from maskvr_ds.reliability.watchdog import Watchdog
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.launched import launch_token
from maskvr_ds.run_folder.layout import COMPLETED, LOSS_PLOT, METRICS, STOPPED
from maskvr_ds.run_folder.status import EXIT_STOPPED
from maskvr_ds.runtime import distributed, logs
from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.telemetry.metrics import StepRecord
from maskvr_ds.telemetry.monitors import check_monitors
from maskvr_ds.telemetry.plots import plot_loss
from maskvr_ds.training.corpora import check_corpora
from maskvr_ds.training.length import remarks, with_steps
from maskvr_ds.training.micro_size import resolve_micro_sizes
from maskvr_ds.training.phases import RunPhase, ends_phase, plan, tokens_after
from maskvr_ds.training.report import end_lines, start_lines
from maskvr_ds.training.resume import ResumePoint, find_resume_point, pass_by
from maskvr_ds.training.rollback import batches, roll_back, windows_of
from maskvr_ds.training.run import write_run_status
from maskvr_ds.training.saver import Saver, is_due
from maskvr_ds.training.setup import PhaseContext, setup_phase
from maskvr_ds.training.step import StepResult, run_step

# Exceptions that all ranks raise together and that are not failures.
_EXPECTED_EXITS = (DivergedError, StoppedError)

# Not __name__: ranks run this file as __main__, which is no logger of the project.
logger = logging.getLogger("maskvr_ds.train")


def train(
    config: RunConfig, resume: str | None = None, stop: StopRequest | None = None, token: str | None = None
) -> None:
    """Start or resume a run and train it phase by phase. Collective: call on all ranks after `distributed.initialize`.

    resume: None (output_dir must be empty), "auto" or a path, see `checkpoints.find`. stop: signals that end the run.
    token: of this job, as chosen by its launcher (run_folder/launched.py).

    Raises ValueError (ConfigError, CorpusError, CheckpointError, FencedError) for faults that the user can correct,
    RemoteError if another rank raised it, FloatingPointError if the run diverged, StoppedError once it has saved and
    stopped on request.
    """
    fence = Fence(config.output_dir, token)
    point = distributed.run_on_rank0(lambda: find_resume_point(config, resume, fence))
    config = config.model_copy(update={"model": point.model})
    if not config.training.is_resolved:
        state = None if point.checkpoint is None else point.checkpoint.state
        history, finished = ([], False) if state is None else (state.phases, ends_phase(state))
        config = distributed.run_on_rank0(lambda: with_steps(config, history, finished=finished))
    distributed.run_on_rank0(lambda: check_monitors(config.monitor))
    config = resolve_micro_sizes(config, point)
    phases = plan(config)
    world_size = distributed.world_size()
    for phase in phases:
        distributed.run_collectively(partial(phase.naming, partial(phase.config.accumulation_steps, world_size)))
    deepspeed_config = distributed.run_collectively(lambda: run_deepspeed_config(config))
    if config.training.compile != "none":
        distributed.run_collectively(lambda: check_compiler(distributed.device()))
    remaining = distributed.run_on_rank0(lambda: point.remaining_phases(phases))
    if len(remaining) > 1:
        # A fault in the last phase's corpus must show now, not after a week in the first.
        distributed.run_on_rank0(lambda: check_corpora(remaining))
    if point.step >= (last := phases[-1].last_step):
        logger.info(
            "%s: trained to step %d already, the configuration has %d steps; nothing to do. To train further, set "
            "training.steps higher",
            config.output_dir,
            point.step,
            last,
        )
    trained, first = None, point
    while remaining:
        try:
            saver = train_phase(config, remaining[0], deepspeed_config, point, fence, stop)
            remaining, trained = remaining[1:], saver.latest
            if remaining and saver.latest is not None:
                # As at a resume: nothing is unpickled before its hash was compared.
                point = distributed.run_on_rank0(partial(point.at_verified, saver.latest))
        except DivergedError as error:
            point = roll_back(remaining[0], error, point, fence)
            # If the phase has no intact checkpoint, the run may return to an earlier phase.
            remaining = point.remaining_phases(phases)
        except ContentError as error:
            named = point is first and resume not in (None, "auto")
            point = pass_by(config.output_dir, error, point, named=named)
            remaining = point.remaining_phases(phases)
        free_memory()
    # The run may have more steps than the configuration, if it resumed after the last of these.
    reached = max(phases[-1].last_step, point.step)
    distributed.run_on_rank0(partial(write_run_status, config.output_dir, COMPLETED, reached, fence))
    if distributed.rank() == 0:
        _report(config, phases[-1], reached, trained)


def _report(config: RunConfig, phase: RunPhase, step: int, checkpoint: Path | None) -> None:
    """Plot the run's metrics and say where its result is. The run is complete: a failure is a warning."""
    try:
        plot_loss(config.output_dir / METRICS, config.output_dir / LOSS_PLOT)
    except Exception as error:  # of matplotlib, or of a full disk
        logger.warning("%s could not be plotted (%s); try `maskvr plot` later", config.output_dir / LOSS_PLOT, error)
    try:
        lines = [] if checkpoint is None else end_lines(config, phase, step, checkpoint)
    except OSError as error:
        lines = []
        logger.warning("step %d is complete; its figures cannot be read now: %s", step, error)
    for line in lines:
        logger.info("%s", line)


def train_phase(
    run: RunConfig,
    phase: RunPhase,
    deepspeed_config: dict[str, Any],
    point: ResumePoint,
    fence: Fence,
    stop: StopRequest | None = None,
) -> Saver:
    """Train one phase from `point` to its last step; returns its saver. Collective: call on all ranks.

    Entering a phase is a resume from the last checkpoint of the previous one, whether the process was killed in
    between or not. fence: acquired here, or checked. Raises DivergedError if the run must roll back.
    """
    context = setup_phase(run, phase, deepspeed_config, point, fence)
    step, samples = context.state.step, context.state.samples
    reader = batches(context.loader, step - phase.first_step, windows_of(context.rollbacks, phase.index))
    saver = Saver(phase, context, fence, point.folder)
    context.engine.train()
    _announce(run, phase, context)
    # Rank 0 looks for requests to stop in the run's folder.
    here = run.output_dir if distributed.rank() == 0 else None
    watchdog = Watchdog(run.output_dir, run.hangs.timeout, orderly=_EXPECTED_EXITS)
    with watchdog, _closing(context, reader, saver, watchdog):
        if step == 0 and context.evaluation:
            with _paused(context, watchdog):
                context.log.held_out(step, context.evaluation.figures(context.engine.module))
        while step < phase.last_step:
            watchdog.mark(step, "data")
            number, batch = next(reader)
            watchdog.mark(step, "step")
            set_learning_rate(context.engine, lr := phase.learning_rate(step))
            context.set_rate(phase.masking_rate(step))
            torch.manual_seed(hashing.fold(phase.config.seed, DROPOUT, step, distributed.rank()) >> 1)
            scale, skipped = loss_scale(context.engine), context.engine.skipped_steps
            result = run_step(
                context.engine,
                context.masker,
                batch,
                phase.config.batch.micro_size,
                context.learner,
                objectives=phase.config.objectives,
                guard=context.guard,
                stop=stop is not None and stop.requested(here, fence.token),
                writing=saver.writing,
                verifying=context.verification.flags,
            )
            step += 1
            samples += phase.config.batch.global_size
            record = _record(context, phase, result, step=step, samples=samples, lr=lr, scale=scale, skipped=skipped)
            context.log.step(record)
            context.log.add(epoch=context.loader.epochs((number + 1) * phase.config.batch.global_size))
            context.log.add(**context.guard.after_update(step, number, result.grad_norm, loss_scale=scale))
            context.guard.check(step, is_last=step == phase.last_step)
            stopping = stop is not None and stop.requested_on_any_rank(DeferredTensor(result.stop_requests))
            written = saver.all_written(DeferredTensor(result.writing_ranks))
            chooser = context.chooser if context.chooser and context.chooser.due(step, phase.last_step) else None
            save = saver.due(step, stopping=stopping)
            evaluate = is_due(step, phase.config.evaluation.every_steps, phase.last_step)
            # Not when stopping: the time that a scheduler leaves is for the checkpoint.
            evaluate |= phase.config.checkpoint.keep_best and save and not stopping
            evaluation = context.evaluation if evaluate else None
            health = context.health if context.health and context.health.due(step) else None
            saver.check_replicas(step, saving=save)
            context.verification.after_step(step, result.verifying_ranks)
            if not (evaluation or chooser or save or written or health):
                continue
            with _paused(context, watchdog):
                held_out = evaluation.figures(context.engine.module) if evaluation else {}
                context.log.add(**held_out, **(health.figures(context.engine.module) if health else {}))
                if chooser:
                    context.choose(step, (number + 1) * phase.config.batch.global_size)
                if save or written:
                    saver.finish()
                if save:
                    wait = stopping or step == phase.last_step
                    saver.save(step, samples, record, batch=number, wait=wait, held_out=held_out)
                if save and stopping and step < phase.run_steps:
                    distributed.run_on_rank0(partial(write_run_status, run.output_dir, STOPPED, step, fence))
                    raise StoppedError(f"stopped at step {step} on request, saved in {saver.latest}")
    return saver


def _announce(run: RunConfig, phase: RunPhase, context: PhaseContext) -> None:
    """Before the first step: what will be trained, and its FLOPs, which take a moment to count."""
    if context.state.step >= phase.last_step:
        return  # nothing is left to train
    context.count_flops()
    for line in start_lines(phase, max(1, len(run.phases)), context, distributed.world_size()):
        logger.info("%s", line)
    of_auto = context.chooser.warnings(phase.last_step) if context.chooser else []
    for remark in (*remarks(phase.config, context.corpus), *of_auto):
        logger.warning("%s", remark)


def _record(
    context: PhaseContext,
    phase: RunPhase,
    result: StepResult,
    *,
    step: int,
    samples: int,
    lr: float,
    scale: float | None,
    skipped: int,
) -> StepRecord:
    """The step's line of metrics.jsonl. scale: fp16 loss scale of this step; skipped: updates that DeepSpeed had
    skipped before it."""
    engine = context.engine
    # A skipped step leaves the trust ratios of the last update in place.
    updated = engine.skipped_steps == skipped and not context.guard.update_skipped
    ratios, rms = (
        getattr(engine.basic_optimizer, name, None) if updated else None for name in ("trust_ratios", "update_rms")
    )
    norm = result.grad_norm
    return StepRecord(
        step=step,
        samples=samples,
        tokens=tokens_after(phase, samples, context.state.phases, context.corpus.sequence_length),
        lr=lr,
        counters=DeferredTensor(result.counters),
        loss_sum=DeferredTensor(result.loss_sum),
        pair_loss=None if result.pair_loss is None else DeferredTensor(result.pair_loss),
        grad_norm=DeferredTensor(norm) if isinstance(norm, torch.Tensor) else norm,
        trust_ratios=None if ratios is None else DeferredTensor(ratios),
        update_rms=None if rms is None else DeferredTensor(rms),
        token_flops=context.token_flops(),
        proposal=None if context.learner is None else context.learner.step(),
        extra={"skipped_updates": engine.skipped_steps}
        | ({} if scale is None else {"loss_scale": scale})
        | ({"phase": phase.name} if phase.name else {}),
    )


@contextmanager
def _paused(context: PhaseContext, watchdog: Watchdog) -> Iterator[None]:
    """Evaluation and saving between two steps: their time does not count as training time."""
    distributed.wait_for_device()
    started = time.perf_counter()
    watchdog.pause()
    yield
    context.log.exclude(time.perf_counter() - started)


@contextmanager
def _closing(context: PhaseContext, reader: Any, saver: Saver, watchdog: Watchdog) -> Iterator[None]:
    """Close log, reader and engine at the end of a phase and at expected exits; other errors leave them as they are."""
    expected: Exception | None = None
    try:
        yield
    except _EXPECTED_EXITS as error:
        expected = error
        # A checkpoint that is still being written is one to return to.
        watchdog.pause()
        saver.finish()
    context.verification.cancel()
    context.log.close()
    reader.close()
    context.engine.destroy()
    if expected is not None:
        raise expected


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit status: 0 done; 1 error; 75 (EXIT_STOPPED) stopped by a signal, with
    a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m maskvr_ds.train", description="One rank of a pretraining run.")
    add_run_options(parser)
    # Added by the deepspeed launcher; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # Added by a launcher of this project: the token of its job.
    parser.add_argument("--launch", type=launch_token, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    logs.configure(arguments.verbosity, rank=distributed.rank())
    stop = StopRequest()

    def run() -> int | None:
        # One rank may ask a hub; the others are given the folder.
        assignments = distributed.run_on_rank0(lambda: with_local_model(arguments.config, arguments.assignments))
        config = distributed.run_collectively(lambda: load_config(arguments.config, assignments))
        try:
            train(config, arguments.resume, stop, arguments.launch)
        except StoppedError as stopped:
            logger.info("%s", stopped)
            return EXIT_STOPPED
        return None

    return distributed.run_as_rank(run)


if __name__ == "__main__":
    sys.exit(main())
