"""What a run stands on: its corpora, its folder, and what of it must not change."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, RunConfig, dump_config
from maskvr_ds.data.mixture import corpora_identity
from maskvr_ds.models.pretrained import InitialWeights
from maskvr_ds.run_folder import checkpoints as manifest
from maskvr_ds.run_folder import status
from maskvr_ds.run_folder.fence import Fence, process_age
from maskvr_ds.run_folder.layout import CONFIG
from maskvr_ds.runtime import distributed
from maskvr_ds.training.phases import RunPhase

# Seconds that ranks may come to life later than what launches them.
_LAUNCHING = 60.0
_MAPNET_MAY_CHANGE = {"lr", "check_every"}


def make_run_folder(run: Path, fence: Fence) -> None:
    """Have the run's folder, and be its owner. Every rank calls. Raises FencedError where another job is."""

    def look() -> None:
        if not run.is_dir():
            raise ConfigError(f"output_dir {run}: not on a file system that all nodes share")

    distributed.run_on_rank0(lambda: run.mkdir(parents=True, exist_ok=True))
    distributed.run_collectively(look)
    fence.hold(distributed.run_on_rank0(partial(fence.take, distributed.world_size())))


def mark_running(config: RunConfig, fence: Fence, latest: Path | None) -> None:
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


def write_run_status(run: Path, name: str, step: int, fence: Fence) -> None:
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
