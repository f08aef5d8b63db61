"""Pretraining: `maskvr train --config run.yaml`, `deepspeed --module maskvr_ds.train --config run.yaml`.

Collectives of a step, over the world group: one all-reduce of int64 [4] (digests, predictions) before the first
backward pass, one of float64 [1] (loss) after the last; DeepSpeed's gradient reduction; LAMB's norms.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.shards import Corpus
from maskvr_ds import checkpoint, distributed, hashing
from maskvr_ds.batch import MaskedBatch, TokenBatch
from maskvr_ds.checkpoint import CheckpointState
from maskvr_ds.config import (
    ConfigError,
    DataConfig,
    RunConfig,
    add_run_options,
    deepspeed_config_path,
    dump_config,
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
from maskvr_ds.schedule import learning_rate

# What a key is for, so that no two uses share random numbers.
_WEIGHTS, _ORDER, _MASKS, _DROPOUT = range(4)
_PROBE_ROWS = 2


def train(config: RunConfig, resume: str | None = None) -> None:
    """Run or go on with a run. Every rank calls, after `distributed.initialize`.

    resume: None (the folder must be empty), "auto" or a path: see `checkpoint.find`.
    Raises ValueError (ConfigError, CorpusError, CheckpointError) for what the user can mend.
    """
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    accumulation = config.accumulation_steps(world_size)
    deepspeed_config = read_deepspeed_config(deepspeed_config_path(config.deepspeed))
    corpus, held_out = open_corpora(config, rank, world_size)
    latest = open_run_folder(config, resume)

    manifest, special = corpus.manifest, corpus.manifest.special_tokens
    bert = bert_config(config.model, vocab_size=manifest.vocab_size, pad_id=special.pad)
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
    )
    if latest is not None:
        state = checkpoint.load(latest, engine, expected=state)
        _say(f"resumed from {latest}: step {state.step}, {state.samples:,} samples")
    if rank == 0:
        (config.output_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    masker = Masker(
        vocab_size=manifest.vocab_size,
        mask_id=special.mask,
        special_ids=special.all,
        sequence_length=corpus.sequence_length,
        seed=hashing.fold(config.seed, _MASKS),
        strategy=config.masking.strategy,
        rate=config.masking.rate,
        corruption=Corruption(config.masking.mask_probability, config.masking.random_probability),
        device=device,
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
    if held_out is not None and config.evaluation.every_steps:
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
        log.step(
            StepRecord(
                step=step,
                samples=samples,
                tokens=samples * corpus.sequence_length,
                lr=lr,
                counters=DeferredTensor(counters),
                loss_sum=DeferredTensor(loss_sum),
                grad_norm=DeferredTensor(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm,
                extra={},
            )
        )
        last = step == config.training.steps
        pause = time.perf_counter()
        if evaluation and (last or step % config.evaluation.every_steps == 0):
            log.add(held_out_loss=evaluation.loss(engine.module))
        if last or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
            # The figures of the steps that a checkpoint contains must not be lost with the process.
            log.flush()
            checkpoint.save(
                config.output_dir,
                engine,
                CheckpointState(**{**vars(state), "step": step, "samples": samples}),
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
    """One optimizer step on this rank's share of the global batch, waiting for the device nowhere.

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


def open_corpora(config: RunConfig, rank: int, world_size: int) -> tuple[Corpus, Corpus | None]:
    """Training and held-out corpus, their shards verified (the work divided among the ranks)."""
    error: Exception | None = None
    try:
        corpus = Corpus(config.data.path)
        if corpus.sequence_length > config.model.max_position_embeddings:
            raise ConfigError(
                f"{config.data.path}: sequences of {corpus.sequence_length} tokens exceed "
                f"model.max_position_embeddings {config.model.max_position_embeddings}"
            )
        held_out = _open_held_out(config.data, corpus)
        if config.data.verify == "full":
            for opened in (corpus, held_out):
                if opened is not None:
                    opened.verify(range(rank, len(opened.manifest.shards), world_size))
    except (ValueError, OSError) as fault:
        error = fault
    distributed.agree(error)
    return corpus, held_out


def _open_held_out(data: DataConfig, corpus: Corpus) -> Corpus | None:
    path = data.held_out_path
    if path is None:
        path = data.path / "held_out"
        if not path.exists():
            return None
    held_out = Corpus(path)
    for key in ("tokenizer_sha256", "sequence_length"):
        if (theirs := getattr(held_out.manifest, key)) != (ours := getattr(corpus.manifest, key)):
            raise ConfigError(f"{path}: {key} {theirs} differs from the training corpus' {ours}")
    return held_out


def open_run_folder(config: RunConfig, resume: str | None) -> Path | None:
    """Make or re-open config.output_dir; → the checkpoint to go on from, if any."""
    run = config.output_dir
    error: Exception | None = None
    latest = None
    if distributed.rank() == 0:
        try:
            if resume is None and run.exists() and any(run.iterdir()):
                raise ConfigError(f"output_dir {run} is not empty; add --resume auto to go on, or name another folder")
            latest = None if resume is None else checkpoint.find(run, resume)
            run.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as fault:
            error = fault
    distributed.agree(error)
    unshared = None if run.is_dir() else ConfigError(f"output_dir {run}: not on a file system that all nodes share")
    distributed.agree(unshared)
    return distributed.broadcast_object(latest)


def run_identity(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """What must not change within a run, in JSON types."""
    manifest = corpus.manifest
    identity = {
        "tokenizer": manifest.tokenizer_sha256,
        "sequence_length": manifest.sequence_length,
        "shards": hashing.fold(0, *(int(shard.sha256, 16) for shard in manifest.shards)),
        "model": config.model.model_dump(exclude={"preset", "activation_checkpointing"}),
        "seed": config.seed,
        "batch.global_size": config.batch.global_size,
        "masking": config.masking.model_dump(),
        # DeepSpeed takes all of these but lr from the checkpoint: a change would go unheeded.
        "optimizer": config.optimizer.model_dump(exclude={"lr"}),
    }
    return json.loads(json.dumps(identity))


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
        config = load_config(arguments.config, arguments.assignments)
        distributed.initialize()
        train(config, arguments.resume)
    except (ValueError, OSError, distributed.RemoteError) as error:
        # A fault that all ranks see is told once; one that a single rank sees reaches rank 0 by `agree`.
        if distributed.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    distributed.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
