"""Pretraining: `maskvr train --config run.yaml`, `deepspeed --module maskvr_ds.train --config run.yaml`.

Collectives: those of a step are told in step.py, those around checkpoints in checkpoint.py.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.shards import Corpus
from maskvr_ds import checkpoint, distributed, hashing, outcome
from maskvr_ds.background import Background
from maskvr_ds.batch import MaskedBatch
from maskvr_ds.checkpoint import CheckpointState
from maskvr_ds.config import (
    RunConfig,
    add_run_options,
    deepspeed_config_path,
    load_config,
)
from maskvr_ds.divergence import DivergedError, Guard, batches, read_rollbacks, windows_of
from maskvr_ds.engine import (
    create_engine,
    free_memory,
    loss_scale,
    model_dtype,
    partition_sizes,
    read_deepspeed_config,
    set_learning_rate,
    zero_stage,
)
from maskvr_ds.evaluate import HeldOut
from maskvr_ds.fence import Fence
from maskvr_ds.loader import Loader
from maskvr_ds.masking import Masker
from maskvr_ds.metrics import METRICS, DeferredTensor, MetricsLog, StepRecord, plot_loss
from maskvr_ds.model import bert_config, flops_per_sequence
from maskvr_ds.phases import RunPhase, done, next_phase, plan, tokens_done
from maskvr_ds.proposer import STATE as MAPNET_STATE
from maskvr_ds.restore import go_back, make_proposer, resume_from, say
from maskvr_ds.run import (
    begin,
    check_corpora,
    check_same_corpora,
    create_masker,
    end,
    find_checkpoint,
    make_run_folder,
    open_and_verify,
    run_identity,
    run_settings,
    sequence_copies,
)
from maskvr_ds.signals import StoppedError, StopRequest
from maskvr_ds.step import run_step
from maskvr_ds.watchdog import Watchdog

# What a key is for, so that no two uses share random numbers.
_WEIGHTS, _ORDER, _MASKS, _DROPOUT, _MAPNET = range(5)
_PROBE_ROWS = 2


def train(config: RunConfig, resume: str | None = None, stop: StopRequest | None = None) -> None:
    """Run or go on with a run, phase by phase. Every rank calls, after `distributed.initialize`.

    resume: None (the folder must be empty), "auto" or a path: see `checkpoint.find`. stop: signals that end the run.
    Raises ValueError (ConfigError, CorpusError, CheckpointError) for what the user can mend, RemoteError where another
    rank did, FloatingPointError where the run diverged, StoppedError where it was asked to stop and has saved.
    """
    phases = plan(config)
    world_size = distributed.world_size()
    for phase in phases:
        distributed.agreed(partial(phase.naming, partial(phase.config.accumulation_steps, world_size)))
    deepspeed_config = distributed.agreed(lambda: read_deepspeed_config(deepspeed_config_path(config.deepspeed)))
    latest = distributed.agreed(lambda: find_checkpoint(config, resume), on=0)
    first = 0
    if latest is not None:
        state = distributed.agreed(partial(checkpoint.read_state, latest), on=0)
        first = distributed.agreed(lambda: next_phase(phases, state), on=0)
    left = phases[first:]
    if len(left) > 1:
        # A fault in the last phase's corpus must show now, not after a week in the first.
        distributed.agreed(lambda: check_corpora(left), on=0)
    fence = Fence(config.output_dir)
    while left:
        try:
            latest = train_phase(config, left[0], deepspeed_config, latest, fence, stop)
            left = left[1:]
        except DivergedError as error:
            latest = go_back(left[0].config, left[0], error, latest, fence)
        free_memory()
    if distributed.rank() == 0:
        end(config.output_dir, outcome.COMPLETED, phases[-1].last_step, fence)
        plot_loss(config.output_dir / METRICS, config.output_dir / "loss.png")


def train_phase(
    run: RunConfig,
    phase: RunPhase,
    deepspeed_config: dict[str, Any],
    latest: Path | None,
    fence: Fence,
    stop: StopRequest | None = None,
) -> Path | None:
    """Train what is left of one phase; → its last checkpoint. Every rank calls.

    latest: the checkpoint to go on from, of this phase or the last one of the phase before: crossing the boundary is
    a resume, whether the process was killed there or not. fence: taken here, or checked. Raises DivergedError where it
    shall be called again.
    """
    config = phase.config
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    corpus, held_out = open_and_verify(phase)
    check_same_corpora((corpus, held_out))
    make_run_folder(run.output_dir, fence)

    manifest = corpus.manifest
    bert = bert_config(config.model, vocab_size=manifest.vocab_size, pad_id=manifest.special_tokens.pad)
    engine = create_engine(
        bert,
        deepspeed_config,
        model=config.model,
        batch=config.batch,
        optimizer=config.optimizer,
        accumulation=config.accumulation_steps(world_size),
        seed=hashing.fold(config.seed, _WEIGHTS),
    )
    state = CheckpointState(
        step=0,
        samples=0,
        world_size=world_size,
        zero_stage=zero_stage(deepspeed_config),
        dtype=str(model_dtype(deepspeed_config)).removeprefix("torch."),
        partitions=partition_sizes(engine),
        identity=run_identity(phase, corpus),
        settings=run_settings(config),
    )
    if latest is not None:
        state = resume_from(run.output_dir, latest, engine, phase, state)
    proposer = make_proposer(config, manifest.vocab_size, engine, latest, hashing.fold(config.seed, _MAPNET))
    distributed.agreed(lambda: begin(run, fence), on=0)
    before = state.phases[: phase.index]
    tokens_before = tokens_done(before)

    masker = create_masker(
        config.masking,
        corpus,
        seed=phase.key(_MASKS),
        device=device,
        proposal=None if proposer is None else proposer.propose,
    )
    loader = Loader(
        corpus,
        seed=phase.key(_ORDER),
        global_size=config.batch.global_size,
        rank=rank,
        world_size=world_size,
        device=device,
        prefetch=config.data.prefetch,
        copies=sequence_copies(config.masking, corpus),
    )
    evaluation = None
    if held_out is not None:
        evaluation = HeldOut(
            held_out,
            rows=config.evaluation.rows,
            micro_size=config.batch.micro_size,
            rank=rank,
            world_size=world_size,
            device=device,
        )
    probe = probe_batch(held_out or corpus, masker, device)
    sequence_flops = flops_per_sequence(bert, corpus.sequence_length, masker.maximum_predictions)
    step, samples = state.step, state.samples
    rollbacks = distributed.agreed(lambda: read_rollbacks(run.output_dir, state.guard), on=0)
    log = MetricsLog(
        config.output_dir,
        rank=rank,
        resume_step=step,
        resume_tokens=tokens_before + (samples - phase.first_sample) * corpus.sequence_length,
        total_steps=phase.run_steps,
        monitor=config.monitor,
        token_flops=sequence_flops / corpus.sequence_length / world_size,
        tensor_names=getattr(engine.basic_optimizer, "tensor_names", ()),
        rollbacks=rollbacks,
    )
    guard = Guard(config.divergence, state.guard if len(state.phases) > phase.index else {})
    if any(entry["to_step"] == step for entry in rollbacks):
        guard.forget()
    guard.attach(engine)

    background = Background() if config.checkpoint.asynchronous else None

    def finish() -> None:
        """Have the checkpoint that is being written count, if there is one. Every rank calls."""
        nonlocal latest
        watchdog.mark(step, "pause")
        if background is not None and (finished := background.finish()) is not None:
            latest, event = finished
            log.event(**event)

    engine.train()
    save_due = False
    reader = batches(loader, step - phase.first_step, windows_of(rollbacks, phase.index))
    with Watchdog(run.output_dir, run.hangs.timeout) as watchdog, _closing(log, reader, engine, finish):
        while step < phase.last_step:
            watchdog.mark(step, "data")
            number, batch = next(reader)
            watchdog.mark(step, "step")
            lr = phase.learning_rate(step)
            set_learning_rate(engine, lr)
            masker.set_rate(phase.masking_rate(step))
            torch.manual_seed(hashing.fold(config.seed, _DROPOUT, step, rank) >> 1)
            scale, skipped = loss_scale(engine), engine.skipped_steps
            asked = stop is not None and stop.heard(run.output_dir if rank == 0 else None)
            counters, loss_sum, grad_norm = run_step(
                engine,
                masker,
                batch,
                config.batch.micro_size,
                proposer,
                guard=guard,
                stop=asked,
                writing=background is not None and background.writing,
            )
            step += 1
            samples += config.batch.global_size
            # A step that was left out has none: those of the last update are still there.
            updated = engine.skipped_steps == skipped and not guard.held
            ratios = getattr(engine.basic_optimizer, "trust_ratios", None) if updated else None
            record = StepRecord(
                step=step,
                samples=samples,
                tokens=tokens_before + (samples - phase.first_sample) * corpus.sequence_length,
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
            written = background is not None and background.agreed(DeferredTensor(counters[5:]))
            to_evaluate = evaluation if is_due(step, config.evaluation.every_steps, phase.last_step) else None
            save_due |= stopping or is_due(step, config.checkpoint.every_steps, phase.last_step)
            to_save = save_due and not guard.held
            if to_evaluate is None and not to_save and not written:
                continue
            distributed.wait_for_device()
            pause = time.perf_counter()
            watchdog.mark(step, "pause")
            if to_evaluate is not None:
                log.add(held_out_loss=to_evaluate.loss(engine.module))
            if to_save or written:
                finish()
            if to_save:
                saving, save_due = time.perf_counter(), False
                # The figures of the steps that a checkpoint contains must not be lost with the process.
                log.synchronise()
                check_finite(record)
                if proposer is not None:
                    proposer.check()
                history = [*before, done(phase, step - phase.first_step, corpus.sequence_length)]
                guarded = {**guard.state(), "rollbacks": rollbacks}
                saved = checkpoint.save(
                    config.output_dir,
                    engine,
                    replace(state, step=step, samples=samples, phases=history, guard=guarded),
                    probe=probe,
                    tokenizer=corpus.tokenizer_folder,
                    keep=config.checkpoint,
                    fence=fence,
                    beside=None if proposer is None else {MAPNET_STATE: (proposer.state(), proposer.metadata())},
                    background=background,
                )
                seconds = time.perf_counter() - saving
                if background is None:
                    latest = saved
                    log.event(event="checkpoint", step=step, seconds=seconds)
                else:
                    background.pausing(seconds)
                    if stopping or step == phase.last_step:
                        finish()
                if stopping and step < phase.run_steps:
                    distributed.agreed(partial(end, run.output_dir, outcome.STOPPED, step, fence), on=0)
                    raise StoppedError(f"stopped at step {step} as a signal asked, saved in {latest}")
            log.exclude(time.perf_counter() - pause)
    return latest


@contextmanager
def _closing(log: MetricsLog, reader: Any, engine: Any, finish: Callable[[], None]) -> Iterator[None]:
    """Close them at the end, and where a phase is left on purpose; other errors leave everything as it is.

    finish: a checkpoint that is still being written is one to go back to.
    """
    try:
        yield
    except (DivergedError, StoppedError):
        finish()
        log.close()
        reader.close()
        engine.destroy()
        raise
    log.close()
    reader.close()
    engine.destroy()


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


def probe_batch(corpus: Corpus, masker: Masker, device: torch.device) -> MaskedBatch:
    """A few fixed rows, masked: what an export's logits are compared on."""
    probe = Loader(corpus, seed=0, global_size=min(_PROBE_ROWS, corpus.rows), device=device)
    return masker(next(probe.batches()))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit status: 0 done, 1 error, 75 (EXIT_STOPPED) stopped by a signal, with
    a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m maskvr_ds.train", description="One rank of a pretraining run.")
    add_run_options(parser)
    # The deepspeed launcher adds it; the rank's place is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    stop = StopRequest()
    # Renamings inside torch that DeepSpeed has yet to follow: nothing that the user of a run could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        distributed.initialize()
        config = distributed.agreed(lambda: load_config(arguments.config, arguments.assignments))
        train(config, arguments.resume, stop)
    except distributed.RemoteError:
        return 1  # the rank that failed tells it
    except StoppedError as stopped:
        say(f"{stopped}; go on with --resume auto")
        return outcome.EXIT_STOPPED
    except ArithmeticError as error:  # FloatingPointError, ReplicaError
        # All ranks come to the same figures.
        if distributed.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        distributed.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
