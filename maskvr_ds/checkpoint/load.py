"""Loading a checkpoint into an engine, and reading its tensors.

DeepSpeed's files are pickles that nothing but their hash ties to the rest of a checkpoint. What was loaded from them is
therefore compared with the checkpoint's weights, bit by bit, and with its logits on the probe. A file that holds master
weights also holds their moments.

Collectives: `distributed.run_collectively` and `run_on_rank0`; those of DeepSpeed's load_checkpoint, of
`full_fp32_weights`, `not_rounded` and `probe_logits`.
"""

import socket
from collections.abc import Collection
from pathlib import Path
from pickle import PickleError
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from maskvr_ds.checkpoint import reshard
from maskvr_ds.checkpoint.probe import probe_logits
from maskvr_ds.engine.deepspeed_patches import postponed_epilogue
from maskvr_ds.engine.master_weights import full_fp32_weights, not_rounded
from maskvr_ds.models.normalization import statistics
from maskvr_ds.run_folder import launches
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointError, CheckpointState
from maskvr_ds.run_folder.layout import MANIFEST, PROBE, WEIGHTS
from maskvr_ds.runtime import distributed

# Maximum difference of a logit on the probe, relative to the largest: other devices and kernels round otherwise, in
# bf16 by up to 3% (export.TOLERANCE); the weights of another run give other logits altogether.
_PROBE_TOLERANCE = 2.0**-3
# What DeepSpeed raises on files of another shape or form.
_UNLOADABLE = (RuntimeError, ValueError, LookupError, AssertionError, AttributeError, TypeError, EOFError, PickleError)
# Keys of the identity that checkpoints of earlier versions lack.
_NEWER_IDENTITY = ("special_tokens", "vocab_size")
# Their values in such checkpoints, where they are known.
_EARLIER_IDENTITY = {"objectives": {"mlm": 1.0}, "training.compile": "none", "data.attention": "rows"}
# Of the key "shards", whose values say nothing to a reader.
_OTHER_SHARDS = "the corpus has other shards (data.path, data.mixture)"


class ContentError(CheckpointError):
    """A checkpoint whose files are those that checkpoint.json lists, but do not belong together. Raised on all ranks.

    folder: of the checkpoint. fault: what is wrong, without the remedy.
    """

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(f"{fault}. Remove this folder to resume from the previous checkpoint")
        self.folder, self.fault = folder, fault


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
    Raises CheckpointError if the checkpoint belongs to another run, is not visible on this node, or if DeepSpeed cannot
    load its files; ContentError if they hold other weights than the checkpoint, or if its logits are not reproduced.
    """
    folder, state = checkpoint.folder, checkpoint.state
    distributed.run_collectively(lambda: _check_visible(folder))
    distributed.run_on_rank0(lambda: check_compatible(checkpoint, expected, may_differ))
    if reshard.same_layout(state, expected):
        _load_files(run, folder, engine)
    else:
        universal = distributed.run_on_rank0(lambda: reshard.convert(run, folder, state, expected))
        reshard.load(universal, engine)
        _load_statistics(folder, engine)
    _check_loaded(run, folder, engine)


def _load_files(run: Path, folder: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """DeepSpeed's load_checkpoint. Collective: call on all ranks. Raises CheckpointError if it fails on one of them."""
    with postponed_epilogue(engine) as finish:
        distributed.run_collectively(lambda: _load_here(run, folder, engine))
        finish()


def _load_here(run: Path, folder: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    try:
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    except torch.OutOfMemoryError:
        raise
    except _UNLOADABLE as error:
        changed = launches.changed_versions(run)
        versions = f"; versions have changed since: {changed}" if changed else ""
        # No ContentError: what else may be the cause must not lead to an earlier checkpoint.
        raise reshard.failure(folder, "load", error, versions) from error
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")


def _load_statistics(folder: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """Running statistics of batch normalisations, which universal checkpoints lack."""
    if found := statistics(engine.module.mlm):
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name, buffer in found.items():
                buffer.copy_(file.get_tensor(name))


def _check_loaded(run: Path, folder: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """Raise ContentError if the engine's weights or logits differ from those that the checkpoint stores besides
    DeepSpeed's files, CheckpointError if the cause may be the installation. Collective: call on all ranks."""
    weights = full_fp32_weights(engine)
    differing = not_rounded(engine, weights)
    if fault := distributed.run_on_rank0(lambda: _fault_of_weights(folder, weights, differing)):
        raise ContentError(folder, fault)
    probe = {name: tensor.to(distributed.device()) for name, tensor in read_probe(folder).items()}
    logits, _ = probe_logits(engine.module, probe)
    if fault := distributed.run_on_rank0(lambda: _fault_of_logits(run, folder, logits.float(), probe["logits"])):
        raise ContentError(folder, fault)


def _fault_of_weights(folder: Path, weights: dict[str, torch.Tensor], not_rounded: list[str]) -> str | None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
        differing = [n for n, w in weights.items() if n not in stored or not torch.equal(file.get_tensor(n), w)]
    if not (differing := differing or not_rounded):
        return None
    return (
        f"{folder}: DeepSpeed's files (*.pt) hold other weights than {WEIGHTS} ({', '.join(differing[:3])}): files of "
        f"two checkpoints are mixed, although {MANIFEST} lists them"
    )


def _fault_of_logits(run: Path, folder: Path, logits: torch.Tensor, stored: torch.Tensor) -> str | None:
    """Raises CheckpointError if the run has not been trained with the installed versions last: then an earlier
    checkpoint would only hide that they compute another model."""
    difference, largest = (logits - stored).abs().max().item(), stored.abs().max().item()
    if difference <= _PROBE_TOLERANCE * largest:  # not if it is NaN
        return None
    fault = (
        f"{folder}: the model's logits on the stored probe differ by {difference:.3g} from those in {PROBE} (largest "
        f"{largest:.3g})"
    )
    if changed := launches.changed_versions(run):
        raise CheckpointError(
            f"{fault}: its weights are of another checkpoint, or the installed packages compute another model "
            f"({changed}). Restore the installation, or remove this folder to resume from the previous checkpoint"
        )
    return f"{fault}: its weights are of another checkpoint"


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
        _OTHER_SHARDS if name == "shards" else f"{name} was {was!r}, is {now!r}"
        for key, value in expected.identity.items()
        if key not in may_differ and (key in state.identity or key not in _NEWER_IDENTITY)
        for name, was, now in differences(key, state.identity.get(key, _EARLIER_IDENTITY.get(key)), value)
    ]
    if state.dtype != expected.dtype:
        found.append(f"dtype was {state.dtype}, is {expected.dtype}")
    if found:
        of_masks = any(difference.startswith("masking.") for difference in found)
        raise CheckpointError(
            f"{checkpoint.folder}: belongs to another run: {'; '.join(found)}. "
            "Restore these settings to resume, or start a new run in another output_dir, without --resume; from these "
            "weights if you export them (`maskvr export`, model.initialize_from)"
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
    """input_ids int64 [B, L], positions int64 [B, K], logits float32 [B, K, V], optionally attention_mask; for
    models that classify sentence pairs also segment_starts int64 [B] and pair_logits float32 [B, 2]."""
    return load_file(folder / PROBE)


def read_extra(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """Tensors of a further safetensors file, as given to `save`; None if the checkpoint has none."""
    return load_file(folder / name) if (folder / name).is_file() else None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> float32 weights of transformers' masked language model."""
    return load_file(folder / WEIGHTS)
