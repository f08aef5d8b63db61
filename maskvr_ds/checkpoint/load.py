"""Loading a checkpoint into an engine, and reading its tensors.

Collectives: `distributed.run_collectively` and `run_on_rank0`; those of DeepSpeed's load_checkpoint.
"""

import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file

from maskvr_ds.checkpoint import reshard
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointError, CheckpointState
from maskvr_ds.run_folder.layout import MANIFEST, PROBE, WEIGHTS
from maskvr_ds.runtime import distributed


def load(
    run: Path,
    checkpoint: Checkpoint,
    engine: deepspeed.DeepSpeedEngine,
    expected: CheckpointState,
    may_differ: Collection[str] = (),
) -> None:
    """Load a verified checkpoint into the engine. Collective: call on all ranks.

    run: where a converted checkpoint is stored, if one is needed. expected: identity, world size and ZeRO stage of the
    present run; its step and samples are ignored. may_differ: keys of the identity that need not agree.
    Raises CheckpointError if the checkpoint belongs to another run or is not visible on this node.
    """
    folder, state = checkpoint.folder, checkpoint.state
    distributed.run_collectively(lambda: _check_visible(folder))
    distributed.run_on_rank0(lambda: check_compatible(checkpoint, expected, may_differ))
    if reshard.same_layout(state, expected):
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")
    else:
        universal = distributed.run_on_rank0(lambda: reshard.convert(run, folder, state, expected))
        reshard.load(universal, engine)


def _check_visible(folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: rank 0 sees it, {socket.gethostname()} does not (yet); checkpoints must lie on a file system "
            "that all nodes share: resume again"
        )


def check_compatible(checkpoint: Checkpoint, expected: CheckpointState, may_differ: Collection[str]) -> None:
    """Raise CheckpointError naming every difference from the present run."""
    state = checkpoint.state
    found = [
        "the corpus has other shards (data.path)" if name == "shards" else f"{name} was {was!r}, is {now!r}"
        for key, value in expected.identity.items()
        if key not in may_differ
        for name, was, now in differences(key, state.identity.get(key), value)
    ]
    if state.dtype != expected.dtype:
        found.append(f"dtype was {state.dtype}, is {expected.dtype}")
    if found:
        of_masks = any(difference.startswith("masking.") for difference in found)
        raise CheckpointError(
            f"{checkpoint.folder}: belongs to another run: {'; '.join(found)}. "
            "Restore these settings to resume, or start a new run in another output_dir"
            + ("; masking.change_at_resume=true lets masks differ" if of_masks else "")
        )


def differences(key: str, was: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(dotted key, earlier value, present value) of everything that differs, in mappings key by key.

    A subsection that only one side has follows from another setting (masking.strategy), which is reported instead.
    """
    if not isinstance(was, dict) or not isinstance(now, dict):
        return [] if was == now else [(key, was, now)]
    nested = (differences(f"{key}.{name}", was.get(name), now.get(name)) for name in {**was, **now})
    found = [difference for differing in nested for difference in differing]
    return [d for d in found if isinstance(d[1], dict) == isinstance(d[2], dict)] or found


def read_probe(folder: Path) -> dict[str, torch.Tensor]:
    """input_ids int64 [B, L], positions int64 [B, K], logits float32 [B, K, V], optionally attention_mask."""
    return load_file(folder / PROBE)


def read_extra(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """Tensors of a further safetensors file, as given to `save`; None if the checkpoint has none."""
    return load_file(folder / name) if (folder / name).is_file() else None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> float32 weights of the BertForMaskedLM."""
    return load_file(folder / WEIGHTS)
