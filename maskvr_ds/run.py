"""What a run stands on: its corpora, its folder, and what of it must not change."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds import checkpoint, distributed, hashing
from maskvr_ds.config import ConfigError, RunConfig, dump_config

CONFIG = "config.yaml"


def open_corpora(config: RunConfig, rank: int, world_size: int) -> tuple[Corpus, Corpus | None]:
    """Training and held-out corpus, their shards verified (the work divided among the ranks)."""
    corpus = Corpus(config.data.path)
    if corpus.sequence_length > config.model.max_position_embeddings:
        raise ConfigError(
            f"{config.data.path}: sequences of {corpus.sequence_length} tokens exceed "
            f"model.max_position_embeddings {config.model.max_position_embeddings}"
        )
    held_out = _open_held_out(config, corpus)
    if config.data.verify == "full":
        for opened in (corpus, held_out):
            if opened is not None:
                opened.verify(range(rank, len(opened.manifest.shards), world_size))
    return corpus, held_out


def _open_held_out(config: RunConfig, corpus: Corpus) -> Corpus | None:
    if config.evaluation.every_steps == 0:
        return None
    path = config.data.held_out_path or config.data.path / "held_out"
    if not path.exists():
        raise ConfigError(
            f"{path}: no held-out corpus; build with --held-out, set data.held_out_path, or evaluation.every_steps=0"
        )
    held_out = Corpus(path)
    for key in ("tokenizer_sha256", "sequence_length"):
        if (theirs := getattr(held_out.manifest, key)) != (ours := getattr(corpus.manifest, key)):
            raise ConfigError(f"{path}: {key} {theirs} differs from the training corpus' {ours}")
    return held_out


def open_run_folder(config: RunConfig, resume: str | None) -> Path | None:
    """Make or re-open config.output_dir; → the checkpoint to go on from, if any."""
    run = config.output_dir

    def find() -> Path | None:
        # A kill while config.yaml is written leaves a partial file alone.
        used = run.exists() and any(not p.name.endswith(".partial") for p in run.iterdir())
        if used and resume is None:
            raise ConfigError(f"output_dir {run} is not empty; add --resume auto to go on, or name another folder")
        latest = None if resume is None else checkpoint.find(run, resume)
        if used and latest is None and not (run / CONFIG).is_file():
            raise ConfigError(f"output_dir {run} is not empty and not a run's folder ({CONFIG} is missing)")
        run.mkdir(parents=True, exist_ok=True)
        return latest

    def look() -> None:
        if not run.is_dir():
            raise ConfigError(f"output_dir {run}: not on a file system that all nodes share")

    latest = distributed.agreed(find, on=0)
    distributed.agreed(look)
    return latest


def write_config(config: RunConfig) -> None:
    """The run's resolved configuration, whole or not at all."""
    path = config.output_dir / CONFIG
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(path)


def run_settings(config: RunConfig) -> dict[str, Any]:
    """What may change between the parts of a run and bears on training, flat: name → value."""
    dump = config.model_dump(mode="json", include={"optimizer", "schedule", "training", "batch", "deepspeed"})
    nested = {f"{s}.{k}": v for s, fields in dump.items() if isinstance(fields, dict) for k, v in fields.items()}
    return {"deepspeed": config.deepspeed, **nested}


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
