"""Checkpoints that count only when whole: what is in them, saving, loading. Their folders: manifest.py.

    step-00000100/
        checkpoint.json           written last: step, samples, what the run is, size and SHA-256 of every file
        *.pt                      DeepSpeed's: module, optimizer partitions
        weights.safetensors       fp32 weights, for export and evaluation
        mapnet.safetensors        the mask proposal network, its optimizer and gate (where there is one)
        probe.safetensors         a few rows and the engine's logits on them: what an export is held against
        bert/                     config.json of the model, tokenizer

All of it is written under `checkpoints/.saving-OWNER/`, every rank its own files, which it synchronises and hashes;
then rank 0 describes them in checkpoint.json and renames the folder.
Randomness needs no state of its own: data order, masks and dropout are functions of (seed, step, rank).

Collectives: `distributed.run_collectively` and `barrier` around each phase; what DeepSpeed and `full_fp32_weights` do.
"""

import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file

from maskvr_ds.checkpoint import reshard
from maskvr_ds.checkpoint.async_writer import AsyncCheckpointWriter
from maskvr_ds.config import CheckpointConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.engine.master_weights import full_fp32_weights, not_rounded
from maskvr_ds.run_folder import checkpoints, layout
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import BERT, PROBE, WEIGHTS
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import fsync_path, write_hashed

# Beside tensors: headers, tokenizer, manifest.
_SMALL_FILES = 2 << 20


def save(
    run: Path,
    engine: deepspeed.DeepSpeedEngine,
    state: CheckpointState,
    *,
    probe: MaskedBatch,
    tokenizer: Path,
    keep: CheckpointConfig,
    fence: Fence,
    beside: Mapping[str, tuple[dict[str, torch.Tensor], dict[str, str]]] | None = None,
    background: AsyncCheckpointWriter | None = None,
) -> Path | None:
    """Write a checkpoint of the run, then delete those that `keep` does not keep. Every rank calls.

    probe: a few rows on the device, the same on every rank. tokenizer: folder to copy.
    fence: this job's right to write here.
    beside: file name → (tensors on the CPU, metadata): further safetensors files, those of rank 0.
    background: where to go on with it once everything is in host memory; None is returned then, and `finish` of it has
    the rest, errors too. Returns the checkpoint's folder. Raises, on every rank, CheckpointError (one its own, the
    others RemoteError) where the disk has no room for it or writing failed, FencedError where another job has taken the
    run; nothing of it is left then, and earlier checkpoints are as they were.
    """
    tag = f"step-{state.step:08d}"
    final = run / layout.CHECKPOINTS / tag
    saving = run / layout.CHECKPOINTS / f"{layout.SAVING}-{fence.label}"
    folder = saving / tag
    failed: list[Exception] = []
    # Of this rank: file → its bytes, None where they are on the disk already; and what it has written: size, SHA-256.
    files: dict[Path, memoryview | None] = {}
    written: dict[str, tuple[int, str]] = {}

    def prepare() -> None:
        fence.check()
        checkpoints.remove_from(run, state.step)
        folder.mkdir(parents=True)
        checkpoints.check_space(folder, _expected_size(engine), f"checkpoint {tag}")

    def write() -> None:
        """This rank's files. No collective: it may run beside training."""
        try:
            for path, content in files.items():
                written[path.relative_to(folder).as_posix()] = write_hashed(path, content)
            if distributed.rank() == 0:
                write_rest()
        except Exception as error:
            failed.append(error)

    def write_rest() -> None:
        save_file(weights, folder / WEIGHTS)
        save_file(probed, folder / PROBE)
        for name, (content, metadata) in (beside or {}).items():
            save_file(content, folder / name, metadata)
        engine.module.mlm.config.save_pretrained(folder / BERT)
        for file in tokenizer.iterdir():
            shutil.copyfile(file, folder / BERT / file.name)
        for path in checkpoints.files_of(folder):
            if path.parent != folder or path.name in (WEIGHTS, PROBE, *(beside or {})):
                written[path.relative_to(folder).as_posix()] = write_hashed(path)

    def finish() -> Path:
        try:
            distributed.run_collectively(lambda: _raise_first(failed, folder))
            of_ranks = distributed.gather_objects(written)
            distributed.run_on_rank0(partial(complete, of_ranks))
        except Exception:
            forget()
            raise
        distributed.run_on_rank0(tidy)
        return final

    def complete(of_ranks: list[dict[str, tuple[int, str]]]) -> None:
        try:
            for number, of_rank in enumerate(of_ranks):
                for name, (size, _) in of_rank.items():
                    if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                        raise CheckpointError(
                            f"{folder / name}: rank {number} of {state.world_size} has written it, and it did not "
                            "arrive; output_dir must lie on a file system that all nodes share"
                        )
            checkpoints.write_manifest(folder, vars(state), {k: v for of_rank in of_ranks for k, v in of_rank.items()})
            fence.check()
            folder.rename(final)
            fsync_path(final.parent)
        except OSError as error:
            _raise_first([error], folder)

    def tidy() -> None:
        fence.check()
        checkpoints.point_latest(final)
        shutil.rmtree(saving)
        reshard.remove(run)
        checkpoints.remove_old(run, keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps)

    def forget() -> None:
        if distributed.rank() == 0:
            shutil.rmtree(saving, ignore_errors=True)

    try:
        distributed.run_on_rank0(prepare)
        with _writing(engine, files, failed, in_memory=background is not None):
            engine.save_checkpoint(str(saving), tag=tag, save_latest=False)
        weights = full_fp32_weights(engine)
        differing = not_rounded(engine, weights)
        probed = _probed(engine, probe)
        distributed.run_on_rank0(lambda: _check_rounded(differing))
    except Exception:
        forget()
        raise
    if background is not None:
        background.start(state.step, write, finish)
        return None
    write()
    return finish()


def _check_rounded(differing: list[str]) -> None:
    # What an export shall be worth: the master weights are those that the model computes with.
    if differing:
        raise CheckpointError(f"{', '.join(differing)}: the engine's weights are not its rounded fp32 weights")


def _probed(engine: deepspeed.DeepSpeedEngine, probe: MaskedBatch) -> dict[str, torch.Tensor]:
    """What `read_probe` gives. Every rank calls."""
    logits = probe_logits(engine.module, probe)
    tensors = {"input_ids": probe.input_ids, "positions": probe.positions, "logits": logits.float()}
    if probe.attention_mask is not None:
        tensors["attention_mask"] = probe.attention_mask
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _expected_size(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes: the model's weights in its dtype; fp32 masters and two moments; fp32 weights for export."""
    parameters = list(engine.module.parameters())
    return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 16) for p in parameters) + _SMALL_FILES


@contextmanager
def _writing(
    engine: deepspeed.DeepSpeedEngine, files: dict[Path, memoryview | None], failed: list[Exception], *, in_memory: bool
) -> Iterator[None]:
    """DeepSpeed's files go to the disk, or in `files` as bytes. What is raised in writing them goes in `failed`: raised
    here, the other ranks would wait in DeepSpeed's barriers for a rank whose disk is full."""
    writer = engine.checkpoint_engine
    original = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            if in_memory:
                buffer = io.BytesIO()
                torch.save(state_dict, buffer, _use_new_zipfile_serialization=writer.zipfile_serialization)
                files[Path(path)] = buffer.getbuffer()
            else:
                original(state_dict, path)
                files[Path(path)] = None
        except Exception as error:
            failed.append(error)

    writer.save = save
    # Rank 0 would copy a script beside the checkpoint, with the same fault.
    engine._copy_recovery_script = lambda *_: None
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script


def _raise_first(failed: list[Exception], folder: Path) -> None:
    if failed:
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written, nothing of it is kept: {failed[0]} ({free:,} bytes are "
            "free there); --resume auto goes on from the one before"
        ) from failed[0]


@torch.no_grad()
def probe_logits(module: Any, probe: MaskedBatch) -> torch.Tensor:
    """The module's logits [B, K, V] on the probe, dropout off."""
    training = module.training
    module.eval()
    try:
        return module(probe.input_ids, probe.positions, attention_mask=probe.attention_mask)
    finally:
        module.train(training)
