"""Checkpoints that count only when whole.

    RUN/checkpoints/step-00000100/
        checkpoint.json           written last: step, samples, what the run is, size and SHA-256 of every file
        *.pt                      DeepSpeed's: module, optimizer partitions
        weights.safetensors       fp32 weights, for export and evaluation
        mapnet.safetensors        the mask proposal network, its optimizer and gate (where there is one)
        probe.safetensors         a few rows and the engine's logits on them: what an export is held against
        bert/                     config.json of the model, tokenizer

All of it is written under `checkpoints/.saving/`, synchronised, described by checkpoint.json, and then renamed.
Randomness needs no state of its own: data order, masks and dropout are functions of (seed, step, rank).

Collectives: `distributed.agreed` and `barrier` around each phase; what DeepSpeed and `full_fp32_weights` do.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from maskvr_ds import distributed
from maskvr_ds.batch import MaskedBatch
from maskvr_ds.engine import full_fp32_weights, not_rounded

FORMAT = 2
MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
PROBE = "probe.safetensors"
BERT = "bert"
_FOLDER = "checkpoints"
_SAVING = ".saving"
_DELETING = ".deleting-"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, or of another run."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of itself beside its tensors.

    step: updates done. samples: sequences consumed. world_size, zero_stage, partitions: how it was written
    (engine.partition_sizes).
    dtype: what the model computed in. identity: what must be equal for a run to go on from it. settings: the rest of
    the configuration that bears on training, flat; it may change, and a change is told. phases: what has been trained,
    a mapping a phase (phases.done), the last one perhaps in part.
    """

    step: int
    samples: int
    world_size: int
    zero_stage: int
    dtype: str
    partitions: list[int]
    identity: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    run: Path,
    engine: deepspeed.DeepSpeedEngine,
    state: CheckpointState,
    *,
    probe: MaskedBatch,
    tokenizer: Path,
    keep_last: int,
    beside: Mapping[str, tuple[dict[str, torch.Tensor], dict[str, str]]] | None = None,
) -> Path:
    """Write a checkpoint of the run, then delete all but the newest `keep_last`. Every rank calls.

    probe: a few rows on the device, the same on every rank. tokenizer: folder to copy.
    beside: file name → (tensors on the CPU, metadata): further safetensors files, those of rank 0.
    Returns the checkpoint's folder.
    """
    tag = f"step-{state.step:08d}"
    final = run / _FOLDER / tag
    saving = run / _FOLDER / _SAVING
    folder = saving / tag

    def prepare() -> None:
        shutil.rmtree(saving, ignore_errors=True)
        for rest in (run / _FOLDER).glob(f"{_DELETING}*"):
            shutil.rmtree(rest)
        if final.exists():
            # An incomplete one: a resume passed it over and has come by again.
            _delete(final)
        folder.mkdir(parents=True)

    distributed.agreed(prepare, on=0)
    engine.save_checkpoint(str(saving), tag=tag, save_latest=False)
    weights = full_fp32_weights(engine)
    differing = not_rounded(engine, weights)
    logits = probe_logits(engine.module, probe)

    def describe() -> None:
        # A file a rank: optimizer partitions, and at stage 3 the model's.
        patterns = {0: [], 3: ["*_optim_states.pt", "zero_pp_rank_*_model_states.pt"]}
        for pattern in patterns.get(state.zero_stage, ["*_optim_states.pt"]):
            if (partitions := len(list(folder.glob(pattern)))) != state.world_size:
                raise CheckpointError(
                    f"{folder}: {partitions} of {state.world_size} ranks' {pattern} arrived; "
                    "output_dir must lie on a file system that all nodes share"
                )
        if differing:
            # What an export shall be worth: the master weights are those that the model computes with.
            raise CheckpointError(f"{', '.join(differing)}: the engine's weights are not its rounded fp32 weights")
        save_file(weights, folder / WEIGHTS)
        tensors = {"input_ids": probe.input_ids, "positions": probe.positions, "logits": logits.float()}
        if probe.attention_mask is not None:
            tensors["attention_mask"] = probe.attention_mask
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / PROBE)
        for name, (content, metadata) in (beside or {}).items():
            save_file(content, folder / name, metadata)
        engine.module.mlm.config.save_pretrained(folder / BERT)
        for file in tokenizer.iterdir():
            shutil.copyfile(file, folder / BERT / file.name)
        _write_manifest(folder, state)
        folder.rename(final)
        _synchronise(final.parent)
        shutil.rmtree(saving)
        for old in complete_checkpoints(run)[:-keep_last]:
            _delete(old)

    distributed.barrier()
    distributed.agreed(describe, on=0)
    return final


def _delete(folder: Path) -> None:
    # Hidden first: a deletion cut short must not leave half a checkpoint under its name.
    shutil.rmtree(folder.rename(folder.with_name(_DELETING + folder.name)))


def _write_manifest(folder: Path, state: CheckpointState) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _synchronise(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    content = {"format": FORMAT, **vars(state), "files": files}
    temporary = folder / f".{MANIFEST}.partial"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _synchronise(temporary)
    temporary.rename(folder / MANIFEST)
    _synchronise(folder)


@torch.no_grad()
def probe_logits(module: Any, probe: MaskedBatch) -> torch.Tensor:
    """The module's logits [B, K, V] on the probe, dropout off."""
    training = module.training
    module.eval()
    try:
        return module(probe.input_ids, probe.positions, attention_mask=probe.attention_mask)
    finally:
        module.train(training)


def complete_checkpoints(run: Path) -> list[Path]:
    """Folders of the run's complete checkpoints, oldest first."""
    return sorted(p.parent for p in (run / _FOLDER).glob(f"step-*/{MANIFEST}"))


def read_state(folder: Path) -> CheckpointState:
    """What a checkpoint says of itself. Raises CheckpointError where it is not a complete checkpoint."""
    return CheckpointState(**{k: v for k, v in _read_manifest(folder).items() if k not in ("format", "files")})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint ({MANIFEST} is missing)")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}")
    return content


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError naming the first that is not as written."""
    for name, entry in _read_manifest(folder)["files"].items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MANIFEST}: {name!r} leaves the checkpoint's folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; take an earlier checkpoint")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CheckpointError(f"{path}: {entry['bytes']} bytes expected, {size} found; take an earlier checkpoint")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: the SHA-256 differs from {MANIFEST}; take an earlier checkpoint")


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from.

    "auto": the run's newest complete one, None where the run has not written any yet. Otherwise the path of a
    checkpoint or of a run's folder, which must hold a complete one; it must be this run's newest, or this run's
    folder must be empty: else older and newer states of two histories would stand side by side.
    Raises CheckpointError.
    """
    own = complete_checkpoints(run)
    if resume != "auto":
        found = newest(Path(resume))
        is_newest = bool(own) and found.resolve() == own[-1].resolve()
        if not is_newest and run.exists() and any(run.iterdir()):
            raise CheckpointError(
                f"--resume {resume}: output_dir {run} is not empty, and this is not its newest checkpoint; "
                "name another output_dir"
            )
        return found
    if own:
        return own[-1]
    if broken := sorted((run / _FOLDER).glob("step-*")):
        raise CheckpointError(
            f"{run / _FOLDER}: none of {', '.join(p.name for p in broken)} is complete; "
            "remove the run's folder to begin anew, or give --resume another checkpoint"
        )
    return None


def newest(folder: Path) -> Path:
    """A checkpoint's own folder, or the newest complete one of a run. Raises CheckpointError where there is none."""
    if (folder / MANIFEST).is_file():
        return folder
    if complete := complete_checkpoints(folder):
        return complete[-1]
    raise CheckpointError(f"{folder}: no complete checkpoint there (nor in its {_FOLDER}/)")


def load(folder: Path, engine: deepspeed.DeepSpeedEngine, expected: CheckpointState) -> CheckpointState:
    """Load a verified checkpoint into the engine. Every rank calls.

    expected: the present run's identity, world size and stage; its step and samples are not looked at.
    Raises CheckpointError where a file is damaged or the checkpoint belongs to another run.
    """
    distributed.agreed(lambda: verify(folder), on=0)
    state = distributed.agreed(lambda: _read_compatible(folder, expected))
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")
    return state


def _read_compatible(folder: Path, expected: CheckpointState) -> CheckpointState:
    """The checkpoint's state. Raises CheckpointError naming every difference from the present run."""
    state = read_state(folder)
    differences = [
        f"{key} was {state.identity.get(key)!r}, is {value!r}"
        for key, value in expected.identity.items()
        if state.identity.get(key) != value
    ]
    for key in ("world_size", "zero_stage", "dtype"):
        if (was := getattr(state, key)) != (now := getattr(expected, key)):
            differences.append(f"{key} was {was}, is {now}")
    if not differences and state.partitions != expected.partitions:
        raise CheckpointError(
            f"{folder}: was written in partitions of {state.partitions} elements, this engine's are of "
            f"{expected.partitions}; resume with the zero_optimization section that the run began with"
        )
    if differences:
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differences)}. "
            "Restore these settings to resume, or start a new run in another output_dir"
        )
    return state


def read_probe(folder: Path) -> dict[str, torch.Tensor]:
    """input_ids int64 [B, L], positions int64 [B, K], logits float32 [B, K, V], perhaps attention_mask."""
    return load_file(folder / PROBE)


def read_beside(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """Tensors of a further safetensors file, as `save` was given them; None where the checkpoint has none."""
    return load_file(folder / name) if (folder / name).is_file() else None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Name → float32 weights of the BertForMaskedLM."""
    return load_file(folder / WEIGHTS)
