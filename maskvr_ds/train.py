"""Pretraining: `maskvr train --config run.yaml`, `deepspeed --module maskvr_ds.train --config run.yaml`.

Collectives of a step, over the world group: one all-reduce of int64 [4] (digests, predictions) before the first
backward pass, one of float64 [1] (loss) after the last; DeepSpeed's gradient reduction; LAMB's norms; MAPNet's, where
it proposes the masks (proposer.py).
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.shards import Corpus
from maskvr_ds import checkpoint, distributed, hashing
from maskvr_ds.batch import MaskedBatch, TokenBatch
from maskvr_ds.checkpoint import CheckpointState
from maskvr_ds.config import (
    RunConfig,
    add_run_options,
    deepspeed_config_path,
    load_config,
)
from maskvr_ds.engine import (
    create_engine,
    free_memory,
    loss_scale,
    model_dtype,
    partition_sizes,
    read_deepspeed_config,
    set_learning_rate,
    step_and_norm,
    zero_stage,
)
from maskvr_ds.evaluate import HeldOut
from maskvr_ds.loader import Loader
from maskvr_ds.masking import Masker, data_digest, mask_digest
from maskvr_ds.metrics import METRICS, DeferredTensor, MetricsLog, StepRecord, plot_loss
from maskvr_ds.model import bert_config, flops_per_sequence, weighted_loss
from maskvr_ds.phases import RunPhase, apply_start, done, next_phase, plan, run_wide, tokens_done
from maskvr_ds.proposer import STATE as MAPNET_STATE
from maskvr_ds.proposer import Proposer
from maskvr_ds.run import (
    check_corpora,
    create_masker,
    find_checkpoint,
    make_run_folder,
    open_and_verify,
    run_identity,
    run_settings,
    sequence_copies,
    write_config,
)

if TYPE_CHECKING:
    import deepspeed

# What a key is for, so that no two uses share random numbers.
_WEIGHTS, _ORDER, _MASKS, _DROPOUT, _MAPNET = range(5)
_PROBE_ROWS = 2


def train(config: RunConfig, resume: str | None = None) -> None:
    """Run or go on with a run, phase by phase. Every rank calls, after `distributed.initialize`.

    resume: None (the folder must be empty), "auto" or a path: see `checkpoint.find`.
    Raises ValueError (ConfigError, CorpusError, CheckpointError) for what the user can mend, RemoteError where another
    rank did, FloatingPointError where the run diverged.
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
        distributed.agreed(lambda: check_corpora(left))
    for phase in left:
        latest = train_phase(config, phase, deepspeed_config, latest)
        free_memory()
    if distributed.rank() == 0:
        plot_loss(config.output_dir / METRICS, config.output_dir / "loss.png")


def train_phase(run: RunConfig, phase: RunPhase, deepspeed_config: dict[str, Any], latest: Path | None) -> Path | None:
    """Train what is left of one phase; → its last checkpoint. Every rank calls.

    latest: the checkpoint to go on from, of this phase or the last one of the phase before: crossing the boundary is
    a resume, whether the process was killed there or not.
    """
    config = phase.config
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    corpus, held_out = distributed.agreed(lambda: phase.naming(lambda: open_and_verify(config, rank, world_size)))
    make_run_folder(run.output_dir)

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
        state = resume_from(latest, engine, phase, state)
    proposer = make_proposer(config, manifest.vocab_size, engine, latest)
    distributed.agreed(lambda: write_config(run), on=0)
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
    log = MetricsLog(
        config.output_dir,
        rank=rank,
        resume_step=step,
        resume_tokens=tokens_before + (samples - phase.first_sample) * corpus.sequence_length,
        total_steps=phase.run_steps,
        monitor=config.monitor,
        token_flops=sequence_flops / corpus.sequence_length / world_size,
        tensor_names=getattr(engine.basic_optimizer, "tensor_names", ()),
    )

    engine.train()
    batches = loader.batches(samples - phase.first_sample)
    while step < phase.last_step:
        batch = next(batches)
        lr = phase.learning_rate(step)
        set_learning_rate(engine, lr)
        masker.set_rate(phase.masking_rate(step))
        torch.manual_seed(hashing.fold(config.seed, _DROPOUT, step, rank) >> 1)
        scale, skipped = loss_scale(engine), engine.skipped_steps
        counters, loss_sum, grad_norm = run_step(engine, masker, batch, config.batch.micro_size, proposer)
        step += 1
        samples += config.batch.global_size
        # A step that was left out has none: those of the last update are still there.
        ratios = getattr(engine.basic_optimizer, "trust_ratios", None) if engine.skipped_steps == skipped else None
        record = StepRecord(
            step=step,
            samples=samples,
            tokens=tokens_before + (samples - phase.first_sample) * corpus.sequence_length,
            lr=lr,
            counters=DeferredTensor(counters),
            loss_sum=DeferredTensor(loss_sum),
            grad_norm=DeferredTensor(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm,
            trust_ratios=None if ratios is None else DeferredTensor(ratios),
            proposal=None if proposer is None else proposer.step(),
            # Updates that DeepSpeed left out because gradients were not finite; the scale that this step's loss had.
            extra={"skipped_updates": engine.skipped_steps}
            | ({} if scale is None else {"loss_scale": scale})
            | ({"phase": phase.name} if phase.name else {}),
        )
        log.step(record)
        to_evaluate = evaluation if is_due(step, config.evaluation.every_steps, phase.last_step) else None
        to_save = is_due(step, config.checkpoint.every_steps, phase.last_step)
        if to_evaluate is None and not to_save:
            continue
        distributed.wait_for_device()
        pause = time.perf_counter()
        if to_evaluate is not None:
            log.add(held_out_loss=to_evaluate.loss(engine.module))
        if to_save:
            # The figures of the steps that a checkpoint contains must not be lost with the process.
            log.synchronise()
            check_finite(record)
            if proposer is not None:
                proposer.check()
            history = [*before, done(phase, step - phase.first_step, corpus.sequence_length)]
            latest = checkpoint.save(
                config.output_dir,
                engine,
                replace(state, step=step, samples=samples, phases=history),
                probe=probe,
                tokenizer=corpus.tokenizer_folder,
                keep_last=config.checkpoint.keep_last,
                beside=None if proposer is None else {MAPNET_STATE: (proposer.state(), proposer.metadata())},
            )
        log.exclude(time.perf_counter() - pause)
    log.close()
    batches.close()
    engine.destroy()
    return latest


def make_proposer(
    config: RunConfig, vocab_size: int, engine: "deepspeed.DeepSpeedEngine", latest: Path | None
) -> Proposer | None:
    """The mask proposal, as the checkpoint left it, or new where it has none (a phase before went without)."""
    if config.masking.strategy != "mapnet":
        return None
    proposer = Proposer(
        config.mapnet,
        vocab_size=vocab_size,
        max_length=config.model.max_position_embeddings,
        seed=hashing.fold(config.seed, _MAPNET),
        device=distributed.device(),
    )
    proposer.attach(engine.module)
    if latest is not None:
        proposer.run_step = checkpoint.read_state(latest).step
        if (tensors := checkpoint.read_beside(latest, MAPNET_STATE)) is not None:
            distributed.agreed(lambda: proposer.load(tensors))
    return proposer


def resume_from(
    latest: Path, engine: "deepspeed.DeepSpeedEngine", phase: RunPhase, state: CheckpointState
) -> CheckpointState:
    """Load a checkpoint; → the state of this phase with its step, samples and history. Every rank calls.

    At the start of a phase, with the last checkpoint of the one before, the phase's policy is applied. Until this
    phase has saved, every resume comes by here again, with that same checkpoint: it is applied once.
    """
    begins = len(distributed.agreed(lambda: checkpoint.read_state(latest), on=0).phases) == phase.index > 0
    expected = replace(state, identity=run_wide(state.identity)) if begins else state
    loaded = checkpoint.load(latest, engine, expected=expected)
    _say(f"resumed from {latest}: step {loaded.step}, {loaded.samples:,} samples")
    if begins:
        assert phase.start is not None
        apply_start(engine.basic_optimizer, phase.start)
        start = ", ".join(f"{what} {do}" for what, do in phase.start)
        _say(f"phase {phase.name} begins: {start}")
    else:
        for name, value in state.settings.items():
            if (was := loaded.settings.get(name)) != value:
                _say(f"  changed since: {name} {was!r} -> {value!r}")
    return replace(state, step=loaded.step, samples=loaded.samples, phases=loaded.phases)


def run_step(
    engine: Any, masker: Masker, batch: TokenBatch, micro_size: int, proposer: Proposer | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """One optimizer step on this rank's share of the global batch.

    Nothing here makes the host wait for the device; DeepSpeed's own step may, for its overflow check.

    Returns all-reduced counters int64 [4] (data_digest, mask_digest, predictions, skipped sequences), all-reduced
    Σ w ℓ float64 [1], and the gradient norm before clipping.
    """
    micro_batches = list(batch.split(micro_size))
    masked_batches = [masker(micro) for micro in micro_batches]
    counters = torch.stack(
        [
            data_digest(batch),
            _total(mask_digest(micro, masked) for micro, masked in zip(micro_batches, masked_batches, strict=True)),
            _total((masked.weights != 0).sum() for masked in masked_batches),
            _total((masked.weights == 0).all(1).sum() for masked in masked_batches),
        ]
    )
    distributed.all_reduce_sum(counters)
    # DeepSpeed averages over micro-batches and ranks; this turns its mean of sums into Σ w ℓ / Σ k over the global
    # batch, however the predictions are spread over micro-batches and ranks.
    scale = len(micro_batches) * distributed.world_size() / counters[2].clamp(min=1).double()
    loss_sum = torch.zeros(1, dtype=torch.float64, device=counters.device)
    for number, (micro, masked) in enumerate(zip(micro_batches, masked_batches, strict=True), 1):
        loss = weighted_loss(engine, masked)
        engine.backward(loss * scale.float())
        loss_sum += loss.detach()
        if proposer is not None:
            proposer.observe(micro, masker.maskable(micro), masked)
        if number < len(masked_batches):
            engine.step()
    grad_norm = step_and_norm(engine)
    return counters, distributed.all_reduce_sum(loss_sum), grad_norm


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


def _total(terms: Any) -> torch.Tensor:
    return torch.stack(list(terms)).sum()


def probe_batch(corpus: Corpus, masker: Masker, device: torch.device) -> MaskedBatch:
    """A few fixed rows, masked: what an export's logits are compared on."""
    probe = Loader(corpus, seed=0, global_size=min(_PROBE_ROWS, corpus.rows), device=device)
    return masker(next(probe.batches()))


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit status: 0 done, 1 error."""
    parser = argparse.ArgumentParser(prog="python -m maskvr_ds.train", description="One rank of a pretraining run.")
    add_run_options(parser)
    # The deepspeed launcher adds it; the rank's place is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    # Renamings inside torch that DeepSpeed has yet to follow: nothing that the user of a run could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        distributed.initialize()
        config = distributed.agreed(lambda: load_config(arguments.config, arguments.assignments))
        train(config, arguments.resume)
    except distributed.RemoteError:
        return 1  # the rank that failed tells it
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
