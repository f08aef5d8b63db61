"""Loading a checkpoint into an engine."""

from collections.abc import Collection
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file

from maskvr_ds.checkpoint import reshard
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState, read_state
from maskvr_ds.run_folder.layout import PROBE, WEIGHTS
from maskvr_ds.runtime import distributed


def load(
    run: Path,
    folder: Path,
    engine: deepspeed.DeepSpeedEngine,
    expected: CheckpointState,
    may_differ: Collection[str] = (),
) -> CheckpointState:
    """Load a verified checkpoint into the engine. Every rank calls.

    run: where a conversion goes, if one is needed. expected: the present run's identity, world size and stage; its step
    and samples are not looked at. may_differ: keys of the identity that need not agree.
    Raises CheckpointError where the checkpoint belongs to another run.
    """
    state = distributed.run_collectively(lambda: _read_compatible(folder, expected, may_differ))
    if reshard.same_layout(state, expected):
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")
    else:
        universal = distributed.run_on_rank0(lambda: reshard.convert(run, folder, state, expected))
        reshard.load(universal, engine)
    return state


def _read_compatible(folder: Path, expected: CheckpointState, may_differ: Collection[str]) -> CheckpointState:
    """The checkpoint's state. Raises CheckpointError naming every difference from the present run."""
    state = read_state(folder)
    differences = [
        f"{key} was {state.identity.get(key)!r}, is {value!r}"
        for key, value in expected.identity.items()
        if key not in may_differ and state.identity.get(key) != value
    ]
    if state.dtype != expected.dtype:
        differences.append(f"dtype was {state.dtype}, is {expected.dtype}")
    if differences:
        of_masks = any(difference.startswith(("masking ", "mapnet ")) for difference in differences)
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differences)}. "
            "Restore these settings to resume, or start a new run in another output_dir"
            + ("; masking.change_at_resume=true lets masks differ" if of_masks else "")
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
