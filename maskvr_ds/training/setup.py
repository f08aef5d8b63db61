"""What a phase trains with: all that is made, or restored, before its first step.

Collectives: those of opening corpora (run.py), of loading (checkpoint.py, restore.py) and of the masker's statistics.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.config import RunConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.ds_config import model_dtype, zero_stage
from maskvr_ds.engine.engine import create_engine
from maskvr_ds.engine.master_weights import partition_sizes
from maskvr_ds.masking import mapnet
from maskvr_ds.masking.factory import create_masker, sequence_copies
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import segments
from maskvr_ds.models import pretrained
from maskvr_ds.models.bert import bert_config
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.pretrained import InitialWeights
from maskvr_ds.reliability.divergence import Guard
from maskvr_ds.run_folder.checkpoints import CheckpointState
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics import MetricsLog
from maskvr_ds.training.auto_strategy import Chooser
from maskvr_ds.training.corpora import check_same_corpora, open_and_verify
from maskvr_ds.training.held_out import HeldOut
from maskvr_ds.training.phases import RunPhase, tokens_done
from maskvr_ds.training.resume import make_proposer, resume_from
from maskvr_ds.training.rollback import read_rollbacks
from maskvr_ds.training.run import make_run_folder, mark_running, run_identity, run_settings

# What a key is for, so that no two uses share random numbers.
WEIGHTS, ORDER, MASKS, DROPOUT, MAPNET, AUTO = range(6)
_PROBE_ROWS = 2


@dataclass(frozen=True)
class PhaseContext:
    """chooser: of the masks, where masking.strategy is auto. state: where the phase begins or goes on. tokens_before:
    of the phases before it. probe: a few fixed rows, masked: what an export's logits are compared on."""

    corpus: Corpus
    engine: Any
    masker: Masker
    proposer: Proposer | None
    loader: Loader
    chooser: Chooser | None
    evaluation: HeldOut | None
    probe: MaskedBatch
    state: CheckpointState
    tokens_before: int
    rollbacks: list[dict[str, Any]]
    log: MetricsLog
    guard: Guard


def setup_phase(
    run: RunConfig,
    phase: RunPhase,
    deepspeed_config: dict[str, Any],
    initial: InitialWeights | None,
    latest: Path | None,
    fence: Fence,
) -> PhaseContext:
    """Open, check, make and restore; the run's folder is this job's from here on. Every rank calls.

    initial: what the run began, or begins, with. latest: the checkpoint to go on from, of this phase or the last one of
    the phase before. Raises ValueError (of whatever kind) on every rank alike for what the user can mend.
    """
    config = phase.config
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    corpus, held_out = open_and_verify(phase)
    check_same_corpora((corpus, held_out))
    begins_with = initial if latest is None else None
    if begins_with is not None:
        distributed.run_on_rank0(lambda: pretrained.check_vocabulary(begins_with, corpus))
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
        seed=hashing.fold(config.seed, WEIGHTS),
        initial=begins_with,
    )
    state = CheckpointState(
        step=0,
        samples=0,
        world_size=world_size,
        zero_stage=zero_stage(deepspeed_config),
        dtype=str(model_dtype(deepspeed_config)).removeprefix("torch."),
        partitions=partition_sizes(engine),
        identity=run_identity(phase, corpus, initial),
        settings=run_settings(config),
    )
    if latest is not None:
        state = resume_from(run.output_dir, latest, engine, phase, state)
    proposer = make_proposer(config, manifest.vocab_size, engine, latest, hashing.fold(config.seed, MAPNET))
    distributed.run_on_rank0(lambda: mark_running(run, fence, latest))

    masker = create_masker(
        config.masking,
        corpus,
        seed=phase.key(MASKS),
        device=device,
        proposal=None if proposer is None else proposer.propose,
    )
    loader = Loader(
        corpus,
        seed=phase.key(ORDER),
        global_size=config.batch.global_size,
        rank=rank,
        world_size=world_size,
        device=device,
        prefetch=config.data.prefetch,
        copies=sequence_copies(config.masking, corpus),
    )
    sequence_flops = flops_per_sequence(bert, corpus.sequence_length, masker.maximum_predictions)
    chooser = None
    if config.masking.strategy == "auto":
        chooser = make_chooser(phase, engine, masker, loader, proposer, sequence_flops)
        if state.auto:
            chooser.restore(state.auto)
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
    probe = Loader(held_out or corpus, seed=0, global_size=min(_PROBE_ROWS, (held_out or corpus).rows), device=device)
    tokens_before = tokens_done(state.phases[: phase.index])
    rollbacks = distributed.run_on_rank0(lambda: read_rollbacks(run.output_dir, state.guard))
    guard = Guard(config.divergence, state.guard if len(state.phases) > phase.index else {})
    if any(entry["to_step"] == state.step for entry in rollbacks):
        guard.forget()
    guard.attach(engine)
    log = MetricsLog(
        config.output_dir,
        rank=rank,
        resume_step=state.step,
        resume_samples=state.samples,
        resume_tokens=tokens_before + (state.samples - phase.first_sample) * corpus.sequence_length,
        total_steps=phase.run_steps,
        monitor=config.monitor,
        token_flops=sequence_flops / corpus.sequence_length / world_size,
        tensor_names=getattr(engine.basic_optimizer, "tensor_names", ()),
        rollbacks=rollbacks,
    )
    if begins_with is not None:
        log.event(event="initialized", step=0, folder=str(begins_with.folder), sha256=begins_with.sha256)
    return PhaseContext(
        corpus=corpus,
        engine=engine,
        masker=masker,
        proposer=proposer,
        loader=loader,
        chooser=chooser,
        evaluation=evaluation,
        probe=masker(next(probe.batches())),
        state=state,
        tokens_before=tokens_before,
        rollbacks=rollbacks,
        log=log,
        guard=guard,
    )


def make_chooser(
    phase: RunPhase, engine: Any, masker: Masker, loader: Loader, proposer: Proposer | None, sequence_flops: float
) -> Chooser:
    """sequence_flops: of the model's forward and backward pass of a sequence."""
    config, length = phase.config, loader.corpus.sequence_length
    most = segments(length - 2, config.masking.rate)
    cost = config.mapnet.cost
    if cost is None:
        network = {name: getattr(config.mapnet, name) for name in ("layers", "hidden", "reach")}
        cost = mapnet.flops_per_sequence(**network, sequence_length=length) / sequence_flops
    return Chooser(
        config.auto,
        engine=engine,
        masker=masker,
        loader=loader,
        proposer=proposer,
        # A batch has whole rows.
        most=next(j for j in range(most, 0, -1) if config.batch.global_size % j == 0),
        proposal_cost=cost,
        micro_size=config.batch.micro_size,
        seed=phase.key(AUTO),
    )
