"""Pretraining: `maskvr train --config run.yaml`, `deepspeed --module maskvr_ds.train --config run.yaml`.

Collectives of a step, over the world group: one all-reduce of int64 [4] (digests, predictions) before the first
backward pass, one of float64 [1] (loss) after the last; DeepSpeed's gradient reduction; LAMB's norms.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    model_dtype,
    read_deepspeed_config,
    set_learning_rate,
    step_and_norm,
    zero_stage,
)
from maskvr_ds.evaluate import HeldOut
from maskvr_ds.loader import Loader
from maskvr_ds.masking import Corruption, Masker, data_digest, mask_digest
from maskvr_ds.metrics import METRICS, DeferredTensor, MetricsLog, StepRecord, plot_loss
from maskvr_ds.model import bert_config, flops_per_sequence, weighted_loss
from maskvr_ds.run import open_corpora, open_run_folder, run_identity, run_settings, write_config
from maskvr_ds.schedule import learning_rate

# What a key is for, so that no two uses share random numbers.
_WEIGHTS, _ORDER, _MASKS, _DROPOUT = range(4)
_PROBE_ROWS = 2


def train(config: RunConfig, resume: str | None = None) -> None:
    """Run or go on with a run. Every rank calls, after `distributed.initialize`.

    resume: None (the folder must be empty), "auto" or a path: see `checkpoint.find`.
    Raises ValueError (ConfigError, CorpusError, CheckpointError) for what the user can mend, RemoteError where another
    rank did, FloatingPointError where the run diverged.
    """
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    accumulation = distributed.agreed(lambda: config.accumulation_steps(world_size))
    deepspeed_config = distributed.agreed(lambda: read_deepspeed_config(deepspeed_config_path(config.deepspeed)))
    corpus, held_out = distributed.agreed(lambda: open_corpora(config, rank, world_size))
    latest = open_run_folder(config, resume)

    manifest = corpus.manifest
    bert = bert_config(config.model, vocab_size=manifest.vocab_size, pad_id=manifest.special_tokens.pad)
    engine = create_engine(
        bert,
        deepspeed_config,
        model=config.model,
        batch=config.batch,
        optimizer=config.optimizer,
        accumulation=accumulation,
        seed=hashing.fold(config.seed, _WEIGHTS),
    )
    state = CheckpointState(
        step=0,
        samples=0,
        world_size=world_size,
        zero_stage=zero_stage(deepspeed_config),
        dtype=str(model_dtype(deepspeed_config)).removeprefix("torch."),
        identity=run_identity(config, corpus),
        settings=run_settings(config),
    )
    if latest is not None:
        loaded = checkpoint.load(latest, engine, expected=state)
        _say(f"resumed from {latest}: step {loaded.step}, {loaded.samples:,} samples")
        for name, value in state.settings.items():
            if (was := loaded.settings.get(name)) != value:
                _say(f"  changed since: {name} {was!r} -> {value!r}")
        state = replace(state, step=loaded.step, samples=loaded.samples)
    distributed.agreed(lambda: write_config(config), on=0)

    corruption = Corruption(config.masking.mask_probability, config.masking.random_probability)
    masker = distributed.agreed(
        lambda: Masker.for_corpus(
            manifest,
            seed=hashing.fold(config.seed, _MASKS),
            strategy=config.masking.strategy,
            rate=config.masking.rate,
            corruption=corruption,
            device=device,
        )
    )
    loader = Loader(
        corpus,
        seed=hashing.fold(config.seed, _ORDER),
        global_size=config.batch.global_size,
        rank=rank,
        world_size=world_size,
        device=device,
        prefetch=config.data.prefetch,
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
    log = MetricsLog(
        config.output_dir,
        rank=rank,
        resume_step=state.step,
        resume_tokens=state.samples * corpus.sequence_length,
        total_steps=config.training.steps,
        monitor=config.monitor,
        token_flops=sequence_flops / corpus.sequence_length / world_size,
    )

    engine.train()
    step, samples = state.step, state.samples
    batches = loader.batches(samples)
    while step < config.training.steps:
        batch = next(batches)
        lr = scheduled_rate(config, step)
        set_learning_rate(engine, lr)
        torch.manual_seed(hashing.fold(config.seed, _DROPOUT, step, rank) >> 1)
        counters, loss_sum, grad_norm = run_step(engine, masker, batch, config.batch.micro_size)
        step += 1
        samples += config.batch.global_size
        record = StepRecord(
            step=step,
            samples=samples,
            tokens=samples * corpus.sequence_length,
            lr=lr,
            counters=DeferredTensor(counters),
            loss_sum=DeferredTensor(loss_sum),
            grad_norm=DeferredTensor(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm,
            # Updates that DeepSpeed left out because gradients were not finite.
            extra={"skipped_updates": engine.skipped_steps},
        )
        log.step(record)
        to_evaluate = evaluation if is_due(step, config.evaluation.every_steps, config.training.steps) else None
        to_save = is_due(step, config.checkpoint.every_steps, config.training.steps)
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
            checkpoint.save(
                config.output_dir,
                engine,
                replace(state, step=step, samples=samples),
                probe=probe,
                tokenizer=corpus.tokenizer_folder,
                keep_last=config.checkpoint.keep_last,
            )
        log.exclude(time.perf_counter() - pause)
    log.close()
    if rank == 0:
        plot_loss(config.output_dir / METRICS, config.output_dir / "loss.png")


def run_step(
    engine: Any, masker: Masker, batch: TokenBatch, micro_size: int
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
    for number, masked in enumerate(masked_batches, 1):
        loss = weighted_loss(engine, masked)
        engine.backward(loss * scale.float())
        loss_sum += loss.detach()
        if number < len(masked_batches):
            engine.step()
    grad_norm = step_and_norm(engine)
    return counters, distributed.all_reduce_sum(loss_sum), grad_norm


def is_due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something that happens after every n-th step (0: never) and after the last is to happen now."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def check_finite(record: StepRecord) -> None:
    """Raise FloatingPointError, on every rank alike, where the step's loss or gradient norm is not finite.

    Called before saving: a checkpoint of a diverged model must not push a good one out.
    """
    line = record.resolve()
    for name in ("loss", "grad_norm"):
        if not math.isfinite(line[name]):
            raise FloatingPointError(
                f"step {record.step}: {name} is {line[name]}; not saved. Resume from the last checkpoint with a lower "
                "optimizer.lr or more schedule.warmup_steps"
            )


def _total(terms: Any) -> torch.Tensor:
    return torch.stack(list(terms)).sum()


def scheduled_rate(config: RunConfig, step: int) -> float:
    """Learning rate of 0-based update `step`."""
    return learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup_steps=config.schedule.warmup_steps,
        total_steps=config.schedule_steps,
        power=config.schedule.power,
        final=config.schedule.final_lr,
    )


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
    except FloatingPointError as error:
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
