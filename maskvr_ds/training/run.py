"""Run directory and run identity: preparing the folder, and the settings that must not change on resume.

Collectives: `distributed.run_on_rank0` and `run_collectively` at start-up.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, Objectives, RunConfig, dump_config
from maskvr_ds.config.masking import MAPNET_MAY_CHANGE
from maskvr_ds.data.mixture import corpora_identity, members
from maskvr_ds.models.initial_folder import InitialWeights
from maskvr_ds.run_folder import checkpoints, status
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.launched import seconds_since
from maskvr_ds.run_folder.launches import CorpusCounts, append_launch
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONFIG
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import atomic_write, remove_partials, sha256
from maskvr_ds.runtime.processes import process_age
from maskvr_ds.training.phases import RunPhase

# Seconds by which ranks may start later than their launcher.
_LAUNCH_SECONDS = 60.0


def make_run_folder(run: Path, fence: Fence) -> None:
    """Create the run's folder and take ownership of it. Collective: call on all ranks.

    Raises ConfigError if a rank does not see the folder, FencedError if another job owns the run.
    """

    def check_shared() -> None:
        if not run.is_dir():
            raise ConfigError(f"output_dir {run}: not on a file system that all nodes share")
        if (run / CHECKPOINTS).is_symlink() and not (run / CHECKPOINTS).is_dir():
            raise ConfigError(f"{run / CHECKPOINTS}: a link that does not lead to a folder here; create the folder")

    distributed.run_on_rank0(lambda: run.mkdir(parents=True, exist_ok=True))
    distributed.run_collectively(check_shared)
    fence.hold(distributed.run_on_rank0(partial(fence.take, distributed.world_size())))


def mark_running(config: RunConfig, fence: Fence, checkpoint: Path | None) -> None:
    """Write config.yaml, clear stop markers from earlier jobs and temporary files of killed ones. checkpoint: the one
    that the run resumes from.

    Raises FencedError if another job owns the run.
    """
    fence.check()
    if checkpoint is not None:
        checkpoints.write_origin(config.output_dir, checkpoint)
    atomic_write(config.output_dir / CONFIG, dump_config(config))
    status.clear(config.output_dir)
    # A request may have been made after the start of the launcher, and before that of this process.
    age = seconds_since(fence.token)
    if age is None:
        age = process_age() + (_LAUNCH_SECONDS if distributed.world_size() > 1 else 0.0)
    status.forget_request(config.output_dir, max(age, process_age()), fence.token)
    # Younger ones may be another program's that is at work in the folder, for example a launcher's.
    now, longest = status.clock(config.output_dir), process_age() + _LAUNCH_SECONDS
    for folder in (config.output_dir, config.output_dir / CHECKPOINTS):
        remove_partials(folder, now, longest)


def record_launch(config: RunConfig, corpus: Corpus) -> None:
    """Append to launches.jsonl with what and on what this job trains. config: of the phase. Call on rank 0."""
    counts = [
        CorpusCounts(
            path=str(entry.path),
            weight=entry.weight,
            rows=manifest.rows,
            tokens=manifest.tokens,
            documents=manifest.documents,
            sequence_length=manifest.sequence_length,
            tokenizer_sha256=manifest.tokenizer_sha256,
            vocab_size=manifest.vocab_size,
            sources={source.name: source.documents for source in manifest.mixture},
        )
        for entry, manifest in zip(config.data.corpora, (member.manifest for member in members(corpus)), strict=True)
    ]
    ranks = distributed.world_size()
    append_launch(
        config.output_dir,
        ranks=ranks,
        ranks_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        device=distributed.device_name(),
        corpora=counts,
    )


def write_run_status(run: Path, name: str, step: int, fence: Fence) -> None:
    """Record that the run is COMPLETED or STOPPED (`name`) at `step`. Raises FencedError if another job owns it."""
    fence.check()
    status.write(run, name, step, fence.token)


def run_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that affect training and may change on resume, flat: name -> value."""
    dump = config.model_dump(mode="json", include={"optimizer", "schedule", "training", "batch", "deepspeed"})
    if config.masking.learns_proposal:
        dump["masking.mapnet"] = config.masking.mapnet.model_dump(include=MAPNET_MAY_CHANGE)
    del dump["training"]["compile"]  # of the identity
    nested = {f"{s}.{k}": v for s, fields in dump.items() if isinstance(fields, dict) for k, v in fields.items()}
    if (folder := config.model.initialize_from) is not None:
        nested["model.initialize_from"] = str(folder)
        if config.model.vocabulary != "same":
            nested["model.vocabulary"] = config.model.vocabulary
    return {"deepspeed": config.deepspeed, **nested}


def _masking_identity(config: RunConfig) -> dict[str, Any]:
    """Token scores by SHA-256: the file may move."""
    values = config.masking.identity()
    if config.masking.strategy == "frequency" and (path := config.masking.frequency.scores) is not None:
        values["frequency"]["scores"] = sha256(path)
    return values


def run_identity(phase: RunPhase, corpus: Corpus, initial: InitialWeights | None) -> dict[str, Any]:
    """Settings that must not change within a phase, in JSON types. Initial weights by SHA-256: a folder may move."""
    config, manifest = phase.config, corpus.manifest
    identity = {
        "tokenizer": manifest.tokenizer_sha256,
        "sequence_length": manifest.sequence_length,
        "special_tokens": manifest.special_tokens.model_dump(),
        "vocab_size": manifest.vocab_size,
        **corpora_identity(corpus),
        "model": config.model.identity() | ({} if initial is None else {"initialize_from": initial.sha256}),
        "seed": config.seed,
        "batch.global_size": config.batch.global_size,
        "masking": _masking_identity(config),
        "objectives": (config.objectives or Objectives()).model_dump(exclude_none=True),
        # Moments, decay and clipping come from the checkpoint: a change would be ignored, or be another optimizer. The
        # kernels may change: results are equal up to rounding.
        "optimizer": config.optimizer.model_dump(exclude={"lr", "fused"}),
        # Other random numbers for dropout.
        "training.compile": config.training.compile,
        "data.attention": config.data.attention,
    }
    if phase.start is not None:
        # Zeroing has already happened: a change would be ignored.
        identity["start"] = phase.start.model_dump(include={"moments", "step_counter"})
    return json.loads(json.dumps(identity))
