"""Writing checkpoints that count only when complete. Files of a checkpoint: run_folder/layout.py.

Nothing is written unless weights, moments and the probe's logits are finite. Everything is written under
`checkpoints/.saving-OWNER/`: every rank writes, fsyncs, reads back and hashes its own files; then rank 0 lists them in
checkpoint.json and renames the folder. Only then are older checkpoints deleted. There is no random state to save: data
order and masks are functions of (seed, epoch, sample), dropout of (seed, step, rank).

Collectives: `distributed.run_on_rank0` and `run_collectively` around each stage; those of DeepSpeed's save_checkpoint,
of `nonfinite` and of `full_fp32_weights`.
"""

import errno
import itertools
import shutil
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from maskvr_ds.checkpoint import reshard
from maskvr_ds.checkpoint.async_writer import AsyncCheckpointWriter
from maskvr_ds.checkpoint.probe import probe_logits
from maskvr_ds.config import CheckpointConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.engine.deepspeed_patches import capture_saved_files
from maskvr_ds.engine.finite import nonfinite
from maskvr_ds.engine.master_weights import full_fp32_weights, not_rounded
from maskvr_ds.run_folder import checkpoints, retention
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import BERT, BEST, CHECKPOINTS, LATEST, PROBE, SAVING, WEIGHTS
from maskvr_ds.runtime import distributed, files

# Headers, tokenizer and checkpoint.json: what a checkpoint takes besides tensors.
_SMALL_FILES = 2 << 20
# File name -> (tensors on the CPU, metadata) of a further safetensors file.
ExtraFiles = Mapping[str, tuple[dict[str, torch.Tensor], dict[str, str]]]


_attempts = itertools.count()


class NotFiniteError(ArithmeticError):
    """What would be saved is not finite. Raised on all ranks, before anything is written."""


def save(
    run: Path,
    engine: deepspeed.DeepSpeedEngine,
    state: CheckpointState,
    *,
    probe: MaskedBatch,
    tokenizer: Path,
    keep: CheckpointConfig,
    fence: Fence,
    extra: ExtraFiles | None = None,
    background: AsyncCheckpointWriter | None = None,
) -> Path | None:
    """Write a checkpoint of the run, then delete those that `keep` does not retain. Collective: call on all ranks.

    Args:
        probe: a few rows on the device, the same on all ranks; their logits are stored.
        tokenizer: folder to copy.
        fence: this job's right to write to the run.
        extra: further safetensors files, written by rank 0.
        background: if given, only host copies are made here; writing continues in its thread, and its `finish`
            completes the checkpoint and raises its errors.

    Returns the checkpoint's folder; None with `background`. Raises, on all ranks, CheckpointError (RemoteError on the
    others) if the disk lacks room or writing failed, FencedError if another job owns the run, NotFiniteError if
    something is not finite; then nothing is left of the new checkpoint and earlier ones are unchanged.
    """
    writer = CheckpointWriter(run, state, keep=keep, fence=fence)
    writer.collect(engine, probe, tokenizer, extra or {}, in_memory=background is not None)
    if background is not None:
        background.start(state.step, writer.write, writer.commit)
        return None
    writer.write()
    return writer.commit()


class CheckpointWriter:
    """One checkpoint on its way to disk: `collect`, `write`, `commit`, in this order."""

    def __init__(self, run: Path, state: CheckpointState, *, keep: CheckpointConfig, fence: Fence) -> None:
        self._run, self._state, self._keep, self._fence = run, state, keep, fence
        tag = f"step-{state.step:08d}"
        self._final = run / CHECKPOINTS / tag
        # Numbered, identically on all ranks: what an earlier attempt left, and could not be deleted, must not count.
        self._saving = run / CHECKPOINTS / f"{SAVING}-{fence.label}-{next(_attempts)}"
        self._folder = self._saving / tag
        self._tokenizer = Path()
        self._failed: list[Exception] = []
        # Files of this rank: path -> content; None if it is on disk already.
        self._files: dict[Path, memoryview | None] = {}
        # Safetensors files of rank 0.
        self._tensors: ExtraFiles = {}
        self._model_config: Any = None
        # Name -> (bytes, SHA-256) of what this rank has written.
        self._written: dict[str, tuple[int, str]] = {}

    def collect(
        self,
        engine: deepspeed.DeepSpeedEngine,
        probe: MaskedBatch,
        tokenizer: Path,
        extra: ExtraFiles,
        *,
        in_memory: bool,
    ) -> None:
        """Bring all content to the host: DeepSpeed's files (to disk, unless `in_memory`), fp32 weights, the probe's
        logits. Collective: call on all ranks. Raises NotFiniteError."""
        probed = _probed(engine, probe)
        _check_finite(engine, probed, extra)
        try:
            distributed.run_on_rank0(partial(self._prepare, _expected_size(engine)))
            with capture_saved_files(engine, self._files, self._failed, in_memory=in_memory):
                engine.save_checkpoint(str(self._saving), tag=self._final.name, save_latest=False)
            weights = full_fp32_weights(engine)
            differing = not_rounded(engine, weights)
            distributed.run_on_rank0(lambda: _check_rounded(differing))
        except Exception:
            self._discard()
            raise
        self._tokenizer, self._model_config = tokenizer, engine.module.mlm.config
        self._tensors = {WEIGHTS: (weights, {}), PROBE: (probed, {}), **extra}

    def write(self) -> None:
        """Write this rank's files. No collective, raises nothing: it may run in a thread during training; `commit`
        raises what failed."""
        try:
            for path, content in self._files.items():
                self._written[path.relative_to(self._folder).as_posix()] = files.write_hashed(path, content)
                if content is None:
                    _check_checksums(path)
            if distributed.rank() == 0:
                self._write_rank0()
        except Exception as error:
            self._failed.append(error)

    def commit(self) -> Path:
        """List all files in checkpoint.json, rename the folder, delete old checkpoints. Collective: call on all
        ranks."""
        try:
            distributed.run_collectively(lambda: _raise_first(self._failed, self._folder))
            of_ranks = distributed.gather_objects(self._written)
            distributed.run_on_rank0(partial(self._complete, of_ranks))
        except Exception:
            self._discard()
            raise
        distributed.run_on_rank0(self._tidy)
        return self._final

    def _prepare(self, expected_size: int) -> None:
        self._fence.check()
        retention.remove_remains(self._run)
        self._folder.mkdir(parents=True)
        checkpoints.check_space(self._folder, expected_size, f"checkpoint {self._final.name}")

    def _write_rank0(self) -> None:
        for name, (tensors, metadata) in self._tensors.items():
            save_file(tensors, self._folder / name, metadata or None)
        self._model_config.save_pretrained(self._folder / BERT)
        for file in self._tokenizer.iterdir():
            shutil.copyfile(file, self._folder / BERT / file.name)
        for path in checkpoints.files_of(self._folder):
            if path.parent != self._folder or path.name in self._tensors:
                self._written[path.relative_to(self._folder).as_posix()] = files.write_hashed(path)
        for name, (tensors, _) in self._tensors.items():
            _check_equal(self._folder / name, tensors)

    def _complete(self, of_ranks: list[dict[str, tuple[int, str]]]) -> None:
        try:
            for number, of_rank in enumerate(of_ranks):
                for name, (size, _) in of_rank.items():
                    path = self._folder / name
                    if not path.is_file() or path.stat().st_size != size:
                        raise CheckpointError(
                            f"{path}: written by rank {number} of {self._state.world_size}, but not visible to rank 0; "
                            "output_dir must lie on a file system that all nodes share"
                        )
            hashed = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
            checkpoints.write_manifest(self._folder, self._state.stored(), hashed)
            checkpoints.read_manifest(self._folder)
            self._fence.check()
            retention.make_way(self._final)
            self._folder.rename(self._final)
            files.fsync_path(self._final.parent)
        except OSError as error:
            _raise_first([error], self._folder)

    def _tidy(self) -> None:
        self._fence.check()
        retention.point_to(self._final, LATEST)
        retention.remove_remains(self._run)
        reshard.remove(self._run)
        keep = self._keep
        best = retention.best_of_phases(self._run, self._final) if keep.keep_best else []
        if best:
            retention.point_to(best[-1], BEST)
        retention.remove_old(
            self._run, self._final, keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps, keep=best
        )

    def _discard(self) -> None:
        if distributed.rank() == 0:
            files.discard(self._saving)


def _check_finite(engine: deepspeed.DeepSpeedEngine, probed: dict[str, torch.Tensor], extra: ExtraFiles) -> None:
    further = {f"{name} of {file}": tensor for file, (tensors, _) in extra.items() for name, tensor in tensors.items()}
    found = nonfinite(engine, {**further, "logits of the probe": probed["logits"]})
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise NotFiniteError(f"not finite: {', '.join(found[:3])}{more}")


def _check_checksums(path: Path) -> None:
    """Raise OSError if a file that torch.save has written does not agree with the checksums in it."""
    with path.open("rb") as opened:
        if opened.read(4) != b"PK\3\4":
            return  # torch's earlier format, which has none
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        damaged = str(error)
    if damaged is not None:
        raise OSError(errno.EIO, f"other bytes are read back than were written ({damaged})", str(path))


def _check_equal(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raise OSError if a safetensors file holds other tensors than were to be written."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise OSError(errno.EIO, f"other values are read back than were written ({name})", str(path))


def _check_rounded(differing: list[str]) -> None:
    # An export is worth something only if its fp32 weights are those that the model computes with.
    if differing:
        raise CheckpointError(f"{', '.join(differing)}: the engine's weights are not its rounded fp32 weights")


def _probed(engine: deepspeed.DeepSpeedEngine, probe: MaskedBatch) -> dict[str, torch.Tensor]:
    """Content of probe.safetensors, see `load.read_probe`. Collective: call on all ranks."""
    tensors = {"input_ids": probe.input_ids, "positions": probe.positions}
    if probe.attention_mask is not None:
        tensors["attention_mask"] = probe.attention_mask
    if probe.segment_starts is not None:
        tensors["segment_starts"] = probe.segment_starts
    logits, pair_logits = probe_logits(engine.module, tensors)
    tensors["logits"] = logits.float()
    if pair_logits is not None:
        tensors["pair_logits"] = pair_logits.float()
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _expected_size(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes: the model's weights in its dtype; fp32 masters and two moments; fp32 weights for export."""
    parameters = list(engine.module.parameters())
    return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 16) for p in parameters) + _SMALL_FILES


def _raise_first(failed: list[Exception], folder: Path) -> None:
    if failed:
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written and was discarded: {failed[0]} ({free:,} bytes are free "
            "there); --resume auto continues from the previous one"
        ) from failed[0]
