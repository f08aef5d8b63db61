"""Resharding: resume with another world size, ZeRO stage or partitioning.

DeepSpeed's converter (deepspeed.checkpoint.ds_to_universal) assembles the partitions of all ranks, tensor by tensor;
the result is written as one safetensors file, from which every rank copies its fragments to the addresses given by
optim/partitions.py. DeepSpeed's loader of universal checkpoints is not used: it cannot cross between stages 1, 2 and
stage 3, unpickles one file per tensor on every rank, and gives all parameter groups the settings of the first.

    RUN/checkpoints/.universal/
        universal.safetensors     "fp32/NAME", "exp_avg/NAME", "exp_avg_sq/NAME": float32, full tensors
        checkpoint.json           source checkpoint; counters; size and SHA-256 of the file above

Rank 0 writes it under `.converting-*/` and renames it when complete, so a conversion that was killed leaves nothing
that counts; an existing conversion of the same checkpoint is reused. The next save removes it.

Collectives: `load` has DeepSpeed gather stage 3's persistent parameters; no others.
"""

import contextlib
import logging
import os
import secrets
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from safetensors import safe_open
from safetensors.torch import save_file

from maskvr_ds.optim.lamb import parameter_groups
from maskvr_ds.optim.partitions import Layout, layout_of, trainable
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONVERTING, MANIFEST, UNIVERSAL, WEIGHTS
from maskvr_ds.runtime import files

logger = logging.getLogger(__name__)

TENSORS = "universal.safetensors"
_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
# Counters of the engine, stored in DeepSpeed's model file.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
FLATTENED = "a fused optimizer (FP16_Optimizer), which keeps its master weights in one flat tensor"


def same_layout(was: CheckpointState, now: CheckpointState) -> bool:
    """Whether DeepSpeed can load the checkpoint without conversion. At stage 0 every rank holds everything."""
    if was.zero_stage == now.zero_stage == 0:
        return True
    return (was.world_size, was.zero_stage, was.partitions) == (now.world_size, now.zero_stage, now.partitions)


def convert(run: Path, folder: Path, was: CheckpointState, now: CheckpointState) -> Path:
    """Convert a verified checkpoint to its universal form under `run`; returns the folder. Call on one rank.

    Raises CheckpointError if the disk has no room, or if DeepSpeed's files have an unknown form.
    """
    source = files.sha256(folder / MANIFEST)
    target = run / CHECKPOINTS / UNIVERSAL
    if not checkpoints.faults(target) and checkpoints.read_manifest(target)["source"] == source:
        logger.info("the conversion of %s in %s is reused", folder, target)
        return target
    logger.info(
        "converting %s: written by %d ranks at ZeRO stage %d, read by %d at stage %d",
        folder,
        was.world_size,
        was.zero_stage,
        now.world_size,
        now.zero_stage,
    )
    remove(run)
    # Unique: a job that has lost the run to this one may still be at it.
    temporary = run / CHECKPOINTS / f"{CONVERTING}-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    # DeepSpeed's converter writes every tensor twice: as fragments and assembled.
    try:
        checkpoints.check_space(temporary, 3 * checkpoints.size(folder), "converting a checkpoint")
        if was.zero_stage:
            tensors, content = _from_partitions(folder, temporary / "pieces")
            shutil.rmtree(temporary / "pieces", ignore_errors=True)
        else:
            tensors, content = _from_full(folder)
        _check_shapes(folder, tensors)
        save_file(tensors, temporary / TENSORS)
        checkpoints.write_manifest(temporary, {"source": source, **content})
        temporary.rename(target)
    except BaseException:
        files.discard(temporary)  # its space may be what the next checkpoint lacks
        raise
    files.fsync_path(target.parent)
    logger.info("converted: %d tensors in %s", len(tensors), target)
    return target


def remove(run: Path) -> None:
    """Delete finished and unfinished conversions."""
    for path in (run / CHECKPOINTS / UNIVERSAL, *(run / CHECKPOINTS).glob(f"{CONVERTING}*")):
        files.discard(path)


def _unpickle(path: Path) -> dict[str, Any]:
    """Load a file of DeepSpeed from a checkpoint that was verified: listed and hashed in its manifest."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _from_partitions(folder: Path, work: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Convert stages 1 to 3: tensors by "kind/NAME"; step, loss scale and counters."""
    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    arguments = Namespace(
        input_folder=str(folder),
        output_folder=str(work),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with _silence():
            to_universal(arguments)
    except (AssertionError, LookupError, RuntimeError, AttributeError, ValueError, TypeError) as error:
        # Raised on files of an unknown form, as another version of DeepSpeed may write them, or of another shape.
        raise failure(folder, "convert", error) from error
    tensors = {}
    for path in sorted((work / "zero").rglob("*.pt")):
        if path.stem in _KINDS:
            name = path.parent.relative_to(work / "zero").as_posix()
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensor = content["param"] if isinstance(content, dict) else content
            tensors[f"{path.stem}/{name}"] = tensor.float().contiguous()
    model = _unpickle(min(folder.glob("*_model_states.pt")))
    optimizer = _unpickle(min(folder.glob("*_optim_states.pt")))["optimizer_state_dict"]
    inner = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    scaler = optimizer.get("loss_scaler")
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    # Tied parameters also appear under their second name; at stage 3 all tensors are flat.
    named = [(key, key.partition("/")[2], t) for key, t in tensors.items()]
    tensors = {key: _shaped(t, shapes[name]) for key, name, t in named if name in shapes}
    return tensors, _content(inner, model, {} if scaler is None else vars(scaler))


def _from_full(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Convert stage 0, where every rank holds everything: in fp32 the model's weights are the masters, in bf16
    DeepSpeed stores the masters tensor by tensor in addition."""
    model = _unpickle(folder / "mp_rank_00_model_states.pt")
    outer = model["optimizer"]
    if "fp32_groups_flat" in outer:
        raise CheckpointError(f"{folder}: stage 0 in bf16 with {FLATTENED}; resume at stage 0")
    inner = outer.get("optimizer_state_dict", outer)
    tensors = {}
    for number, group in enumerate(inner["param_groups"]):
        for place, (index, name) in enumerate(zip(group["params"], group["param_names"], strict=True)):
            master = outer["fp32_groups"][number][place] if "fp32_groups" in outer else model["module"][name]
            tensors[f"fp32/{name}"] = master.detach().clone()
            for kind in _KINDS[1:]:
                # torch's optimizers create moments at their first step.
                moment = inner["state"].get(index, {}).get(kind)
                tensors[f"{kind}/{name}"] = torch.zeros_like(master) if moment is None else moment.clone()
    return tensors, _content(inner, model, {})


def failure(folder: Path, action: str, error: Exception, versions: str = "") -> CheckpointError:
    """The error for what DeepSpeed raises on verified files. It does not advise to delete them: memory may have been
    short, or they are of another version's form. versions: what has changed since, for the message."""
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{folder}: DeepSpeed cannot {action} its files (*.pt), although they are those that {MANIFEST} lists "
        f"({type(error).__name__}: {reason}){versions}. Start again if this may pass, as a lack of memory does; else "
        f"move this folder out of {CHECKPOINTS}/ to resume from the previous checkpoint"
    )


def _shaped(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return tensor.view(shape) if tensor.numel() == shape.numel() else tensor  # refused by `_check_shapes`


def _check_shapes(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError if DeepSpeed's files hold tensors of other shapes than the checkpoint's weights."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = {f"mlm.{name}": list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    named = [(key.partition("/")[2], list(tensor.shape)) for key, tensor in tensors.items()]
    if unlike := sorted({name for name, shape in named if stored.get(name, shape) != shape}):
        raise CheckpointError(
            f"{folder}: DeepSpeed's files (*.pt) hold other shapes than {WEIGHTS} ({', '.join(unlike[:3])}): they are "
            "not of this model. Remove this folder to resume from the previous checkpoint"
        )


def _content(optimizer: dict[str, Any], model: dict[str, Any], scaler: dict[str, Any]) -> dict[str, Any]:
    state = optimizer["state"]
    first: dict[str, Any] = next(iter(state.values() if isinstance(state, dict) else state), {})
    # FusedAdam counts steps in the parameter group.
    step = first["step"] if "step" in first else optimizer["param_groups"][0].get("step", 0)
    return {
        "step": int(step),
        "counters": {name: int(model[name]) for name in _COUNTERS},
        "loss_scaler": {k: v for k, v in scaler.items() if isinstance(v, bool | int | float)},
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the converter's output: one line per stage and two progress bars."""
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        stderr, sys.stderr = sys.stderr, nothing
        try:
            yield
        finally:
            sys.stderr = stderr


def load(universal: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """Copy a universal checkpoint into an engine of any stage and world size. Collective: call on all ranks."""
    content = checkpoints.read_manifest(universal)
    zero = engine.optimizer
    optimizer = engine.basic_optimizer
    if isinstance(zero, FP16_Optimizer):
        raise CheckpointError(f"cannot resume at stage 0 in bf16 with {FLATTENED}; resume at stage 1, 2 or 3")
    given = [p for group in parameter_groups(engine.module) for _, p in group["params"]]
    layout = layout_of(engine, trainable([{"params": given}]), optimizer.param_groups)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()  # partitions all parameters, including persistent ones
    with safe_open(universal / TENSORS, framework="pt") as file, torch.no_grad():
        expected = {f"{kind}/{name}" for kind in _KINDS for name in layout.names}
        if unlike := expected.symmetric_difference(file.keys()):
            raise CheckpointError(f"{universal}: belongs to another model: {', '.join(sorted(unlike)[:3])}")
        for flat, partition in layout.partitions.items():
            state = _state_of(optimizer, flat)
            for kind in _KINDS:
                target = flat.detach() if kind == "fp32" else state[kind]
                for fragment in partition.fragments:
                    full = file.get_tensor(f"{kind}/{layout.names[fragment.tensor]}").view(-1)
                    here = fragment.of_partition(target)
                    here.copy_(full.narrow(0, fragment.tensor_start, fragment.length).view(here.shape))
            _set_step(state, content["step"])
        _fill_model(layout, stage, lambda name: file.get_tensor(f"fp32/{name}"))
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = content["step"]
    if stage == 3:
        zero.checkpoint_event_epilogue()
    if engine.fp16_enabled():
        vars(zero.loss_scaler).update(content["loss_scaler"])
    for name in _COUNTERS:
        setattr(engine, name, content["counters"][name])


def _state_of(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    """The optimizer state of a partition, created if the optimizer has not stepped yet (torch's; Lamb's exists)."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state |= {kind: torch.zeros_like(flat) for kind in _KINDS[1:]}
    return state


def _set_step(state: dict[str, Any], step: int) -> None:
    if isinstance(state.get("step"), torch.Tensor):
        state["step"].fill_(step)
    elif "step" in state:
        state["step"] = step


def _fill_model(layout: Layout, stage: int, full: Callable[[str], torch.Tensor]) -> None:
    """Fill the weights that the model computes with, rounded from the masters."""
    if stage == 3:
        for flat, partition in layout.partitions.items():
            for fragment in partition.fragments:
                fragment.of_model(layout.tensors[fragment.tensor]).copy_(fragment.of_partition(flat))
        return
    for name, tensor in zip(layout.names, layout.tensors, strict=True):
        tensor.copy_(full(name))
