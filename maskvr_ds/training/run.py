"""What a run stands on: its corpora, its folder, and what of it must not change."""

import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.shards import HELD_OUT, Corpus, OpenFiles, open_here
from maskvr_ds.checkpoint import save
from maskvr_ds.config import ConfigError, MaskingConfig, RunConfig, dump_config
from maskvr_ds.data.mixture import corpora_identity, open_mixture
from maskvr_ds.data.shared_files import NodeFiles
from maskvr_ds.data.vocabulary import frequency_scores, token_counts, word_starts
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.masking.strategies import Parameters, Proposal, segments, span_thresholds
from maskvr_ds.models.pretrained import InitialWeights
from maskvr_ds.run_folder import checkpoints as manifest
from maskvr_ds.run_folder import status
from maskvr_ds.run_folder.fence import Fence, process_age
from maskvr_ds.runtime import distributed
from maskvr_ds.training.phases import RunPhase

CONFIG = "config.yaml"
# Seconds that ranks may come to life later than what launches them.
_LAUNCHING = 60.0
_MAPNET_MAY_CHANGE = {"lr", "check_every"}


def open_corpora(config: RunConfig, open_files: OpenFiles = open_here) -> tuple[Corpus, Corpus | None]:
    """Training and held-out corpora, several as one; opening reads no token data. open_files: see `Corpus`."""
    corpus = open_mixture([(entry.path, entry.weight) for entry in config.data.corpora], open_files)
    if corpus.sequence_length > (positions := config.model.max_position_embeddings):
        folder = config.model.initialize_from
        theirs = f", those of {folder}; build the corpus with --sequence-length {positions} at most" if folder else ""
        raise ConfigError(
            f"{corpus.folder}: sequences of {corpus.sequence_length} tokens exceed "
            f"model.max_position_embeddings {positions}{theirs}"
        )
    check_masking(config, corpus)
    return corpus, _open_held_out(config, corpus, open_files)


def check_masking(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError for what sequence length and vocabulary do not allow."""
    masking, longest = config.masking, corpus.sequence_length - 2
    if masking.strategy in ("fully_explored", "auto"):
        if masking.final_rate is not None:
            for n in range(1, longest + 1):
                if (before := segments(n, masking.rate)) != (after := segments(n, masking.final_rate)):
                    raise ConfigError(
                        f"masking.final_rate {masking.final_rate:g}: with strategy {masking.strategy} the rate must "
                        f"not change the number of segments within a round, and rows of {n} tokens would go from "
                        f"{before} to {after}; leave final_rate out, or change the rate from phase to phase"
                    )
        if (copies := sequence_copies(masking, corpus)) > (most := segments(longest, masking.rate)):
            raise ConfigError(
                f"masking.segments_per_sequence {copies}: a sequence of {corpus.sequence_length} tokens has {most} "
                f"segments at rate {masking.rate:g}; that is the most"
            )
        if config.batch.global_size % copies:
            below = config.batch.global_size // copies * copies
            sizes = [size for size in (below, below + copies) if size]
            raise ConfigError(
                f"batch.global_size {config.batch.global_size} is not a multiple of {copies}, the segments of a "
                f"sequence that share a global batch; set it to {' or '.join(str(b) for b in sizes)}, or "
                "masking.segments_per_sequence to a divisor of it"
            )
    if masking.strategy == "auto" and config.auto.rows > corpus.rows:
        raise ConfigError(f"auto.rows {config.auto.rows}: {corpus.folder} has {corpus.rows} rows")
    if masking.strategy in ("whole_word", "span"):
        word_starts(corpus.tokenizer_folder, corpus.manifest.vocab_size)


def sequence_copies(masking: MaskingConfig, corpus: Corpus) -> int:
    """J: how often a row comes in a global batch. All segments of a full row, where their number is not given."""
    if masking.placement != "same_batch":
        return 1
    return masking.segments_per_sequence or segments(corpus.sequence_length - 2, masking.rate)


def create_masker(
    masking: MaskingConfig, corpus: Corpus, *, seed: int, device: torch.device, proposal: Proposal | None = None
) -> Masker:
    """The run's masks; of auto, those that it begins with. Every rank calls. proposal: of strategies mapnet and auto.

    Collectives (strategy frequency): one all-reduce of int64 [2, V], what each rank counted in its share of the
    shards; one broadcast of the scores, which a power on other hardware may round otherwise.
    """
    parameters = Parameters(
        sampler=masking.sampler, estimator=masking.estimator, floor=masking.floor, proposal=proposal
    )
    vocab_size = corpus.manifest.vocab_size
    if masking.strategy in ("whole_word", "span"):
        starts = torch.from_numpy(word_starts(corpus.tokenizer_folder, vocab_size))
        thresholds = span_thresholds(masking.span_probability, masking.span_maximum)
        parameters = replace(parameters, word_starts=starts, span_thresholds=thresholds)
    if masking.strategy == "frequency":
        mine = range(distributed.rank(), len(corpus.manifest.shards), distributed.world_size())
        of_passages = masking.document_frequency_power != 0
        counted = distributed.agreed(lambda: token_counts(corpus, mine, of_passages=of_passages))
        counts = distributed.all_reduce_sum(torch.from_numpy(counted).to(device)).cpu().numpy()
        powers = masking.frequency_power, masking.document_frequency_power
        scores = distributed.broadcast_object(frequency_scores(counts, *powers))
        parameters = replace(parameters, token_scores=torch.from_numpy(scores))
    return distributed.agreed(
        lambda: Masker.for_corpus(
            corpus.manifest,
            seed=seed,
            strategy="fully_explored" if masking.strategy == "auto" else masking.strategy,
            parameters=parameters,
            rate=masking.rate,
            final_rate=masking.final_rate,
            corruption=Corruption(masking.mask_probability, masking.random_probability),
            device=device,
        )
    )


def open_and_verify(phase: RunPhase) -> tuple[Corpus, Corpus | None]:
    """As `open_corpora`, each shard opened once on each node, and verified as data.verify says: once in the whole job,
    the work divided among the ranks. Every rank calls."""
    config, rank, world_size = phase.config, distributed.rank(), distributed.world_size()
    files = NodeFiles(distributed.gather_objects, rank)

    def open_phase() -> tuple[Corpus, Corpus | None]:
        with files:
            corpus, held_out = open_corpora(config, files.open)
        if config.data.verify == "full":
            for opened in (corpus, held_out):
                if opened is not None:
                    opened.verify(range(rank, len(opened.manifest.shards), world_size))
        return corpus, held_out

    return distributed.agreed(partial(phase.naming, open_phase))


def check_same_corpora(corpora: Sequence[Corpus | None]) -> None:
    """Raise ConfigError where a rank sees other ones under these paths than rank 0 does. Every rank calls.

    Each may be whole by itself; what they would train on together is none of them. Collectives: one broadcast, one
    object all-gather.
    """
    found = [None if corpus is None else _fingerprint(corpus) for corpus in corpora]
    expected = distributed.broadcast_object((socket.gethostname(), found))

    def compare() -> None:
        for corpus, ours, theirs in zip(corpora, found, expected[1], strict=True):
            if ours != theirs and corpus is not None:
                raise ConfigError(
                    f"{corpus.folder}: rank {distributed.rank()} on {socket.gethostname()} sees another manifest there "
                    f"than rank 0 on {expected[0]}; all nodes must see one corpus: copy it anew, or share it"
                )

    distributed.agreed(compare)


def _fingerprint(corpus: Corpus) -> tuple[str, int, dict[str, Any]]:
    return corpus.manifest.tokenizer_sha256, corpus.manifest.sequence_length, corpora_identity(corpus)


def check_corpora(phases: Sequence[RunPhase]) -> None:
    """Open what every phase will need, so that no fault waits for the end of the phase before it.

    Raises ValueError naming the phase, also where its tokenizer is not that of the first of them.
    """
    first: Corpus | None = None
    for phase in phases:
        corpus, _ = phase.naming(partial(open_corpora, phase.config))
        first = first or corpus
        if (theirs := corpus.manifest.tokenizer_sha256) != (ours := first.manifest.tokenizer_sha256):
            raise ConfigError(
                f"phase {phase.name!r}: {corpus.folder}: tokenizer {theirs[:12]} differs from {ours[:12]} of "
                f"{first.folder}; build the corpora of all phases with one tokenizer"
            )


def _open_held_out(config: RunConfig, corpus: Corpus, open_files: OpenFiles) -> Corpus | None:
    if config.evaluation.every_steps == 0:
        return None
    given = config.data.held_out_path
    paths = [given] if given else [entry.path / HELD_OUT for entry in config.data.corpora]
    if missing := next((path for path in paths if not path.exists()), None):
        raise ConfigError(
            f"{missing}: no held-out corpus; build with --held-out, set data.held_out_path, or evaluation.every_steps=0"
        )
    held_out = open_mixture([(path, 1.0) for path in paths], open_files)
    for key in ("tokenizer_sha256", "sequence_length"):
        if (theirs := getattr(held_out.manifest, key)) != (ours := getattr(corpus.manifest, key)):
            raise ConfigError(f"{paths[0]}: {key} {theirs} differs from the training corpus' {ours}")
    return held_out


def find_checkpoint(config: RunConfig, resume: str | None) -> Path | None:
    """The checkpoint to go on from, if any. Raises ValueError where output_dir holds what must not be written over."""
    run = config.output_dir
    used = manifest.begun(run)
    if used and resume is None:
        raise ConfigError(f"output_dir {run} is not empty; add --resume auto to go on, or name another folder")
    latest = None if resume is None else save.find(run, resume)
    if used and latest is None and not (run / CONFIG).is_file():
        raise ConfigError(f"output_dir {run} is not empty and not a run's folder ({CONFIG} is missing)")
    return latest


def make_run_folder(run: Path, fence: Fence) -> None:
    """Have the run's folder, and be its owner. Every rank calls. Raises FencedError where another job is."""

    def look() -> None:
        if not run.is_dir():
            raise ConfigError(f"output_dir {run}: not on a file system that all nodes share")

    distributed.agreed(lambda: run.mkdir(parents=True, exist_ok=True), on=0)
    distributed.agreed(look)
    fence.hold(distributed.agreed(partial(fence.take, distributed.world_size()), on=0))


def begin(config: RunConfig, fence: Fence, latest: Path | None) -> None:
    """Training begins, or goes on: the folder says with which configuration, and no more that it was stopped, nor that
    it should. latest: the checkpoint that it goes on from."""
    fence.check()
    if latest is not None:
        manifest.write_origin(config.output_dir, latest)
    write_config(config)
    status.clear(config.output_dir)
    # Launchers do so too, before they start ranks, and may be asked before this one has started.
    launching = _LAUNCHING if distributed.world_size() > 1 else 0.0
    status.forget_request(config.output_dir, process_age() + launching)


def end(run: Path, name: str, step: int, fence: Fence) -> None:
    """`outcome.write`, unless another job has taken the run: then raises FencedError."""
    fence.check()
    status.write(run, name, step)


def write_config(config: RunConfig) -> None:
    """The run's resolved configuration, whole or not at all."""
    path = config.output_dir / CONFIG
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(path)


def run_settings(config: RunConfig) -> dict[str, Any]:
    """What may change between the parts of a run and bears on training, flat: name → value."""
    dump = config.model_dump(mode="json", include={"optimizer", "schedule", "training", "batch", "deepspeed"})
    if config.learns_proposal:
        dump["mapnet"] = config.mapnet.model_dump(include=_MAPNET_MAY_CHANGE)
    nested = {f"{s}.{k}": v for s, fields in dump.items() if isinstance(fields, dict) for k, v in fields.items()}
    if (folder := config.model.initialize_from) is not None:
        nested["model.initialize_from"] = str(folder)
    return {"deepspeed": config.deepspeed, **nested}


def run_identity(phase: RunPhase, corpus: Corpus, initial: InitialWeights | None) -> dict[str, Any]:
    """What must not change within a phase, in JSON types. initial: by its SHA-256, since a folder may move."""
    config, manifest = phase.config, corpus.manifest
    identity = {
        "tokenizer": manifest.tokenizer_sha256,
        "sequence_length": manifest.sequence_length,
        **corpora_identity(corpus),
        "model": config.model.model_dump(exclude={"preset", "activation_checkpointing", "initialize_from"})
        | ({} if initial is None else {"initialize_from": initial.sha256}),
        "seed": config.seed,
        "batch.global_size": config.batch.global_size,
        "masking": config.masking.model_dump(exclude={"change_at_resume"}),
        # Moments, decay and clipping come from the checkpoint: a change would go unheeded, or be another optimizer.
        "optimizer": config.optimizer.model_dump(exclude={"lr"}),
    }
    if config.masking.strategy == "auto":
        identity["auto"] = config.auto.model_dump()
    if config.learns_proposal:
        identity["mapnet"] = config.mapnet.model_dump(exclude=_MAPNET_MAY_CHANGE)
    if phase.start is not None:
        # What was zeroed stays zeroed: a change would go unheeded.
        identity["start"] = phase.start.model_dump(include={"moments", "step_counter"})
    return json.loads(json.dumps(identity))
