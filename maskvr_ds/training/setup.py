"""Phase set-up: everything that is opened, created or restored before the first step of a phase.

Collectives: those of corpora.py, run.py, mask_costs.py, resume.py, engine/engine.py and masking/factory.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.analysis.gradient_variance.sketch import check_sketchable
from maskvr_ds.checkpoint.load import ContentError
from maskvr_ds.config import ConfigError, ModelConfig, RunConfig
from maskvr_ds.config.deepspeed import zero_stage
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.keys import MAPNET, MASKS, ORDER, WEIGHTS
from maskvr_ds.data.loader import Loader
from maskvr_ds.data.mixture import real_share, shares
from maskvr_ds.engine.deepspeed_patches import gate_optimizer_step
from maskvr_ds.engine.ds_config import model_dtype
from maskvr_ds.engine.engine import create_engine
from maskvr_ds.engine.master_weights import partition_sizes
from maskvr_ds.masking.checks import hidden_positions, sequence_copies
from maskvr_ds.masking.factory import create_masker
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.rates import Stage, stages
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.compiled import compile_model, warm_up
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.initial_folder import InitialWeights, for_corpus
from maskvr_ds.models.late_masks import CANDIDATES, LateMasks
from maskvr_ds.reliability.divergence import Guard
from maskvr_ds.run_folder.checkpoints import CheckpointState
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.peak_rates import device_peak_tflops
from maskvr_ds.telemetry.metrics import MetricsLog
from maskvr_ds.telemetry.metrics_file import AUTO_COSTS_EVENT
from maskvr_ds.training.auto_measurement import check_rows
from maskvr_ds.training.auto_strategy import Chooser, make_chooser
from maskvr_ds.training.corpora import check_same_corpora, open_and_verify
from maskvr_ds.training.health import HealthMonitor
from maskvr_ds.training.held_out import HeldOut
from maskvr_ds.training.mask_costs import machine, resolve_costs, write_costs
from maskvr_ds.training.phases import RunPhase, tokens_after
from maskvr_ds.training.resume import ResumePoint, restore_engine, restore_proposer
from maskvr_ds.training.rollback import read_rollbacks
from maskvr_ds.training.run import make_run_folder, mark_running, record_launch, run_identity, run_settings
from maskvr_ds.training.step_shapes import StepShapes, late_in_stage
from maskvr_ds.training.verification import BackgroundVerification

logger = logging.getLogger(__name__)

_PROBE_ROWS = 2


@dataclass(frozen=True)
class PhaseContext:
    """State and components that the training loop of a phase uses.

    verification: of shards in the background. chooser: chooses the masks if masking.strategy is auto. state: where the
    phase starts or continues. probe: a few fixed masked rows, on which an export's logits are compared.
    """

    corpus: Corpus
    engine: Any
    masker: Masker
    proposer: Proposer | None
    loader: Loader
    chooser: Chooser | None
    evaluation: HeldOut | None
    probe: MaskedBatch
    state: CheckpointState
    rollbacks: list[dict[str, Any]]
    log: MetricsLog
    guard: Guard
    verification: BackgroundVerification
    shapes: StepShapes
    health: HealthMonitor | None = None

    @property
    def learner(self) -> Proposer | None:
        """MAPNet, while it is trained."""
        return self.proposer if self.chooser is None or self.chooser.learning else None

    def token_flops(self) -> float:
        """FLOPs per rank and token of a step as it is computed now; 0 on ranks that do not log them."""
        late = self.engine.module.late_of_training
        return self.shapes.token_flops(self.masker.maximum_predictions, late) if self.log.active else 0.0

    def count_flops(self) -> None:
        """Count those of the next steps: not while a step is timed."""
        if self.log.active:
            self.shapes.count(self.masker, self.engine.module)

    def choose(self, step: int, samples: int) -> None:
        """Strategy auto: measure, and set the masks of the next steps. Collective: call on all ranks. samples: consumed
        by the loader."""
        assert self.chooser is not None
        self.log.event(**self.chooser.choose(step, samples))
        self.count_flops()

    def set_rate(self, rate: float) -> None:
        """Set the masking rate of the schedule, and the shapes of its stage; strategy auto sets its own."""
        if self.chooser is None:
            self.masker.set_rate(rate)
            self.shapes.enter(self.masker.stage, self.engine.module)


def setup_phase(
    run: RunConfig, phase: RunPhase, deepspeed_config: dict[str, Any], point: ResumePoint, fence: Fence
) -> PhaseContext:
    """Open, check, create and restore; from here on the run's folder belongs to this job. Collective: call on all
    ranks.

    point: at a checkpoint of this phase, at the last one of the previous phase, or at step 0. Raises ValueError (or a
    subclass) on all ranks for faults that the user can correct, of these ContentError identically on all ranks.
    """
    config = phase.config
    corpus, held_out = open_and_verify(phase)
    check_same_corpora((corpus, held_out))
    initial = _initial_weights(point, corpus, config.model)
    table_rows = point.table_rows if initial is None or initial.rows is None else initial.rows.rows
    make_run_folder(run.output_dir, fence)

    pairs = config.pair_objective is not None
    encoder = distributed.run_collectively(lambda: encoder_config(config.model, corpus, table_rows, pair_head=pairs))
    costs, measuring = None, 0.0
    if config.masking.strategy == "auto":
        distributed.run_on_rank0(lambda: _check_auto(config, encoder, corpus))
        here = machine(config, corpus, deepspeed_config)
        trial = partial(trial_engine, phase, corpus, encoder, deepspeed_config)
        costs, measuring = resolve_costs(phase, corpus, here, point, trial)
    engine = _make_engine(phase, corpus, encoder, deepspeed_config, initial)
    state = _initial_state(phase, corpus, deepspeed_config, engine, point.initial)
    if point.checkpoint is not None:
        try:
            state = restore_engine(run.output_dir, point.checkpoint, engine, phase, state)
        except ContentError:
            engine.destroy()  # another one may be made for an earlier checkpoint
            raise
    proposer = restore_proposer(config, corpus, engine, point, hashing.fold(config.seed, MAPNET))
    distributed.run_on_rank0(lambda: mark_running(run, fence, point.folder))
    if costs is not None:
        distributed.run_on_rank0(partial(write_costs, config.output_dir, phase.index, costs, measuring))
    if state.step < phase.last_step:
        distributed.run_on_rank0(lambda: record_launch(config, corpus))

    masker = create_masker(
        config.masking,
        corpus,
        seed=phase.key(MASKS),
        device=distributed.device(),
        proposal=None if proposer is None else proposer.propose,
    )
    _compile(phase, corpus, engine.module, masker.stages)
    loader = _make_loader(phase, corpus)
    chooser = None
    if costs is not None:
        chooser = make_chooser(phase, engine, masker, loader, proposer, costs)
        if state.auto:
            chooser.restore(state.auto, state.step)
    rollbacks = distributed.run_on_rank0(lambda: read_rollbacks(run.output_dir, state.guard))
    guard = _make_guard(phase, state, rollbacks)
    gate_optimizer_step(engine, guard.allow_update, guard.read if guard.enabled else float)
    log = distributed.run_collectively(lambda: _make_log(phase, corpus, engine, state, rollbacks))
    if measuring:
        log.event(event=AUTO_COSTS_EVENT, step=state.step, seconds=round(measuring, 3))
    if initial is not None:
        log.event(event="initialized", step=0, folder=str(initial.folder), sha256=initial.sha256, **_counts(initial))
    return PhaseContext(
        corpus=corpus,
        engine=engine,
        masker=masker,
        proposer=proposer,
        loader=loader,
        chooser=chooser,
        evaluation=None if held_out is None else _make_evaluation(phase, held_out),
        probe=(probe := masker(next(_probe_rows(held_out or corpus, pairs).batches()))),
        state=state,
        rollbacks=rollbacks,
        log=log,
        guard=guard,
        verification=BackgroundVerification((corpus, held_out) if config.data.verify == "background" else ()),
        shapes=StepShapes(config, encoder, corpus),
        health=HealthMonitor(probe, run.monitor.health_every) if run.monitor.health_every else None,
    )


def _initial_weights(point: ResumePoint, corpus: Corpus, model: ModelConfig) -> InitialWeights | None:
    """The pretrained weights that training starts from, for the corpus' vocabulary; None if it resumes, or starts from
    random ones. Collective: call on all ranks."""
    initial = point.initial
    if initial is None or point.checkpoint is not None:
        return None
    return distributed.run_on_rank0(lambda: for_corpus(initial, corpus, model.vocabulary))


def _counts(initial: InitialWeights) -> dict[str, Any]:
    """Of another vocabulary: how its tokens start, for metrics.jsonl."""
    if (rows := initial.rows) is None:
        return {}
    return {"vocabulary": rows.vocabulary, "kept": rows.kept, "averaged": rows.averaged, "fresh": rows.fresh}


def encoder_config(
    model: ModelConfig, corpus: Corpus, table_rows: int | None, *, pair_head: bool = False
) -> PreTrainedConfig:
    """The configuration of transformers for the corpus' vocabulary. table_rows: of the embedding table, if weights
    exist. pair_head: see `transformers_config`. Raises ConfigError if transformers refuses it or the table is too
    small."""
    manifest, special = corpus.manifest, corpus.manifest.special_tokens
    rows = table_rows or model.settings.get("vocab_size", manifest.vocab_size)
    if rows < manifest.vocab_size:
        raise ConfigError(
            f"{corpus.folder}: its tokenizer has {manifest.vocab_size} tokens, the embedding table {rows} rows "
            "(model.settings.vocab_size); set it higher, or remove it"
        )
    token_ids = {"bos_token_id": special.cls, "cls_token_id": special.cls, "mask_token_id": special.mask}
    token_ids |= {"eos_token_id": special.sep, "sep_token_id": special.sep}
    return transformers_config(model, vocab_size=rows, pad_id=special.pad, token_ids=token_ids, pair_head=pair_head)


def separator_of(config: RunConfig, corpus: Corpus) -> int | None:
    """Id of the token that ends a document, for attention within documents; None for attention over rows."""
    return corpus.manifest.special_tokens.sep if config.data.attention == "documents" else None


def late_masks(config: RunConfig, corpus: Corpus) -> LateMasks | None:
    """Where [MASK] enters the model, for the corpus' rows; None: at the first layer."""
    if not config.masking.late_layer:
        return None
    hidden = hidden_positions(config.masking, corpus.sequence_length)
    return LateMasks(config.masking.late_layer, corpus.manifest.special_tokens.mask, hidden)


def _make_engine(
    phase: RunPhase,
    corpus: Corpus,
    encoder: PreTrainedConfig,
    deepspeed_config: dict[str, Any],
    initial: InitialWeights | None,
) -> Any:
    config, candidates = phase.config, phase.config.masking.auto.late_layers
    late = late_masks(config, corpus)
    if candidates:
        # Of the highest layer, for which the model is checked and prepared; then strategy auto sets it.
        late = LateMasks(max(candidates), corpus.manifest.special_tokens.mask, 0, CANDIDATES)
    engine = create_engine(
        encoder,
        deepspeed_config,
        model=config.model,
        batch=config.batch,
        optimizer=config.optimizer,
        accumulation=config.accumulation_steps(distributed.world_size()),
        seed=hashing.fold(config.seed, WEIGHTS),
        row_length=corpus.sequence_length,
        separator=separator_of(config, corpus),
        late=late,
        initial=initial,
    )
    if candidates:
        engine.module.late = None
    return engine


def _compile(phase: RunPhase, corpus: Corpus, module: MaskedLanguageModel, stages: Sequence[Stage]) -> None:
    """Compile what training.compile names, and generate the kernels of a step in all stages of the masking rate.
    Collective: call on all ranks."""
    config = phase.config
    how = config.training.compile
    if how == "none":
        return
    rows, length = config.batch.micro_size, corpus.sequence_length
    padded = corpus.manifest.tokens < corpus.manifest.rows * length

    def compile_here() -> float:
        compile_model(module, how, shapes=len(stages))
        seconds = 0.0
        for stage in stages:
            module.late_in_training = late_in_stage(config.masking, corpus, module.late, stage)
            seconds += warm_up(module, rows=rows, length=length, predictions=stage.slots, padded=padded)
        module.late_in_training = None
        return seconds

    logger.info("training.compile %s: generating kernels", how)
    seconds = distributed.run_collectively(compile_here)
    logger.info("training.compile %s: kernels ready after %.1f s", how, seconds)


def _initial_state(
    phase: RunPhase, corpus: Corpus, deepspeed_config: dict[str, Any], engine: Any, initial: InitialWeights | None
) -> CheckpointState:
    """The state of a run at step 0, in the present layout."""
    return CheckpointState(
        step=0,
        samples=0,
        world_size=distributed.world_size(),
        zero_stage=zero_stage(deepspeed_config),
        dtype=str(model_dtype(deepspeed_config)).removeprefix("torch."),
        partitions=partition_sizes(engine),
        identity=run_identity(phase, corpus, initial),
        settings=run_settings(phase.config),
        digests=hashing.DIGEST_VERSION,
    )


def _make_loader(phase: RunPhase, corpus: Corpus) -> Loader:
    config = phase.config
    return Loader(
        corpus,
        seed=phase.key(ORDER),
        global_size=config.batch.global_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=distributed.device(),
        prefetch=config.data.prefetch,
        copies=sequence_copies(config.masking, corpus),
        pairs=config.pair_objective is not None,
    )


def _make_evaluation(phase: RunPhase, held_out: Corpus) -> HeldOut:
    return HeldOut(
        held_out,
        rows=phase.config.evaluation.rows,
        micro_size=phase.config.batch.micro_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=distributed.device(),
    )


def _probe_rows(corpus: Corpus, pairs: bool) -> Loader:
    size = min(_PROBE_ROWS, corpus.rows)
    return Loader(corpus, seed=0, global_size=size, device=distributed.device(), pairs=pairs)


def _make_guard(phase: RunPhase, state: CheckpointState, rollbacks: list[dict[str, Any]]) -> Guard:
    guard = Guard(phase.config.divergence, state.guard if len(state.phases) > phase.index else {})
    if any(entry["to_step"] == state.step for entry in rollbacks):
        # A rollback has returned here: the skipped updates stored in the checkpoint are those that caused it.
        guard.clear_skipped()
    return guard


def _make_log(
    phase: RunPhase, corpus: Corpus, engine: Any, state: CheckpointState, rollbacks: list[dict[str, Any]]
) -> MetricsLog:
    """Rank 0 alone writes it: the others must not wait for a rank that cannot."""
    optimizer = engine.basic_optimizer
    return MetricsLog(
        phase.config.output_dir,
        rank=distributed.rank(),
        resume_step=state.step,
        resume_tokens=tokens_after(phase, state.samples, state.phases, corpus.sequence_length),
        total_steps=phase.run_steps,
        monitor=phase.config.monitor,
        peak_tflops=device_peak_tflops(distributed.device(), next(engine.module.parameters()).dtype),
        real_share=real_share(corpus),
        tensor_names=optimizer.tensor_names if hasattr(optimizer, "trust_ratios") else (),
        rollbacks=rollbacks,
    )


def _check_auto(config: RunConfig, encoder: PreTrainedConfig, corpus: Corpus) -> None:
    """Raise ConfigError if auto could not measure the architecture or the corpus, which would show after hours."""
    check_rows(shares(corpus), config.masking.auto.rows)
    with torch.random.fork_rng(devices=[]):
        module = MaskedLanguageModel(encoder, separator=separator_of(config, corpus))
    try:
        check_sketchable(module)
    except ValueError as error:
        raise ConfigError(f"masking.strategy auto: {error}; choose another strategy") from None


def trial_engine(phase: RunPhase, corpus: Corpus, encoder: PreTrainedConfig, deepspeed_config: dict[str, Any]) -> Any:
    """An engine like the run's, with random weights, for trial steps. Collective: call on all ranks."""
    engine = _make_engine(phase, corpus, encoder, deepspeed_config, None)
    _compile(phase, corpus, engine.module, stages(corpus.sequence_length, phase.config.masking.rate, None))
    return engine
