"""Checkpoint folders: which are complete, intact, newest, kept. Loads no torch. Their files: layout.py."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskvr_ds.run_folder.layout import (
    CHECKPOINTS,
    DELETING,
    JOBS,
    LATEST,
    LOGS,
    MANIFEST,
    ORIGIN,
    OWNER,
    SAVING,
    STOP_REQUEST,
)
from maskvr_ds.run_folder.migration import migrate_checkpoint
from maskvr_ds.runtime.files import PARTIAL, atomic_write, fsync_path, sha256, write_hashed

FORMAT = 4
_NAME = re.compile(r"step-\d+")
# Files hashed in parallel: hashlib releases the GIL.
_THREADS = 8

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, or of another run."""


@dataclass(frozen=True)
class CheckpointState:
    """Everything that checkpoint.json stores besides the list of files.

    step: optimizer steps done. samples: sequences consumed. world_size, zero_stage, partitions: layout in which it was
    written (`engine.master_weights.partition_sizes`). dtype: of the model's computations. identity: settings that must
    be equal to resume. settings: all other settings that affect training, flat; they may differ on resume, and
    differences are logged. phases: what has been trained, one mapping per phase (`training.phases.done`), the last
    one possibly unfinished. guard: `divergence.Guard.state`. auto: `auto_strategy.Chooser.state`.
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
    guard: dict[str, Any] = field(default_factory=dict)
    auto: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified, with its state."""

    folder: Path
    state: CheckpointState


def remove(folder: Path) -> None:
    """Delete a checkpoint. Renamed first, so that an interrupted deletion leaves no partial checkpoint behind."""
    shutil.rmtree(folder.rename(folder.with_name(DELETING + folder.name)))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_manifest(
    folder: Path, content: Mapping[str, Any], hashed: Mapping[str, tuple[int, str]] | None = None
) -> None:
    """Write checkpoint.json: `content`, and the size and SHA-256 of every file; all files are fsynced.

    hashed: name -> result of `write_hashed` for files that were hashed while written; the others are hashed here.
    """
    hashed = dict(hashed or {})
    names = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    missing = [name for name in names if name not in hashed]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed |= zip(missing, pool.map(write_hashed, [names[name] for name in missing]), strict=True)
    files = {name: {"bytes": hashed[name][0], "sha256": hashed[name][1]} for name in names}
    for path in {path.parent for path in names.values()}:
        fsync_path(path)
    rest = json.dumps({"format": FORMAT, **content, "files": files}, indent=1).removeprefix("{") + "\n"
    own = hashlib.sha256(rest.encode()).hexdigest()
    atomic_write(folder / MANIFEST, f'{{"sha256": "{own}",{rest}')


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json. Raises CheckpointError if it is missing, damaged, or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint ({MANIFEST} is missing)")
    text = path.read_bytes()
    try:
        content = json.loads(text)
        written = content.pop("sha256", None)
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path}: damaged (not valid JSON); use an earlier checkpoint") from None
    if (stored := content.get("format")) not in (3, FORMAT):
        raise CheckpointError(f"{path}: format {stored!r}, this version reads 3 and {FORMAT}; update maskvr_ds")
    head = f'{{"sha256": "{written}",'.encode()
    if not text.startswith(head) or hashlib.sha256(text[len(head) :]).hexdigest() != written:
        raise CheckpointError(
            f"{path}: damaged, its content differs from the SHA-256 in its first line; use an earlier checkpoint"
        )
    return migrate_checkpoint(content) if stored == 3 else content


def _state_of(manifest: Mapping[str, Any]) -> CheckpointState:
    return CheckpointState(**{key: value for key, value in manifest.items() if key not in ("format", "files")})


def read_state(folder: Path) -> CheckpointState:
    """The state of a checkpoint. Raises CheckpointError if it is not a complete checkpoint."""
    return _state_of(read_manifest(folder))


def faults(folder: Path) -> list[str]:
    """Every difference between a checkpoint and its checkpoint.json, one sentence each; empty if it is intact."""
    try:
        return _faults(folder, read_manifest(folder))
    except CheckpointError as error:
        return [str(error)]


def _faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    listed = manifest["files"]
    found = []
    to_hash = []
    for name, entry in listed.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append(f"{folder / MANIFEST}: {name!r} lies outside the checkpoint's folder")
        elif not path.is_file():
            found.append(f"{path}: missing; use an earlier checkpoint")
        elif (size := path.stat().st_size) != entry["bytes"]:
            found.append(f"{path}: {entry['bytes']} bytes expected, {size} found; use an earlier checkpoint")
        else:
            to_hash.append((path, entry["sha256"]))
    with ThreadPoolExecutor(_THREADS) as pool:
        for (path, expected), actual in zip(to_hash, pool.map(sha256, [p for p, _ in to_hash]), strict=True):
            if actual != expected:
                found.append(f"{path}: the SHA-256 differs from {MANIFEST}; use an earlier checkpoint")
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        # DeepSpeed opens files by pattern, and unpickles what it opens.
        if (name := path.relative_to(folder).as_posix()) not in listed and name != MANIFEST:
            found.append(f"{path}: not listed in {MANIFEST}; remove it, or use an earlier checkpoint")
    return found


def verify(folder: Path) -> Checkpoint:
    """Compare every file with checkpoint.json. Raises CheckpointError naming the first difference."""
    manifest = read_manifest(folder)
    if found := _faults(folder, manifest):
        raise CheckpointError(found[0])
    return Checkpoint(folder, _state_of(manifest))


def checkpoints(run: Path) -> list[Path]:
    """Folders of the run's checkpoints, complete or not, oldest first; copies under other names are ignored."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(p.name))


def complete_checkpoints(run: Path) -> list[Path]:
    """Folders of the run's complete checkpoints, oldest first."""
    return [folder for folder in checkpoints(run) if (folder / MANIFEST).is_file()]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find(run: Path, resume: str) -> Checkpoint | None:
    """The verified checkpoint to resume from.

    resume: "auto": the run's newest intact checkpoint (damaged ones are logged); if the run has none yet, the
    checkpoint of another run that it was started from; None if there is neither. Otherwise the path of a checkpoint
    or of a run. Such a path must be what "auto" would use, or the run's folder must be empty: the checkpoints of two
    histories must not mix.
    Raises CheckpointError.
    """
    if resume != "auto":
        folder = newest(Path(resume))
        own = complete_checkpoints(run)
        expected = own[-1] if own else origin(run)
        if is_started(run) and (expected is None or folder.resolve() != expected.resolve()):
            raise CheckpointError(
                f"--resume {resume}: output_dir {run} is not empty, and this is not its newest checkpoint; "
                "choose another output_dir"
            )
        return verify(folder)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run)):
        try:
            return verify(folder)
        except CheckpointError as error:
            damaged.append((folder, str(error)))
            logger.info("skipped: %s", error)
    if damaged:
        names = ", ".join(folder.name for folder, _ in reversed(damaged))
        raise CheckpointError(
            f"{run / CHECKPOINTS}: none of {names} is intact ({damaged[0][1]}); "
            "remove the run's folder to start over, or give --resume another checkpoint"
        )
    source = origin(run)
    return None if source is None else verify(source)


def origin(run: Path) -> Path | None:
    """The checkpoint of another run that this run was started from; None if there is none.

    Raises CheckpointError if it no longer exists.
    """
    if not (run / ORIGIN).is_file():
        return None
    entry = json.loads((run / ORIGIN).read_text(encoding="utf-8"))
    folder = Path(entry["checkpoint"])
    if not (folder / MANIFEST).is_file() or sha256(folder / MANIFEST) != entry["sha256"]:
        raise CheckpointError(
            f"{run}: has no checkpoint of its own yet, and {folder}, from which it was started, is missing or has "
            "changed; restore it, or remove the run's folder and choose another checkpoint"
        )
    return folder


def write_origin(run: Path, checkpoint: Path) -> None:
    """Record the checkpoint that a run is resumed from, unless it is the run's own."""
    folder = checkpoint.resolve()
    if not folder.is_relative_to(run.resolve()):
        entry = {"checkpoint": str(folder), "sha256": sha256(folder / MANIFEST)}
        atomic_write(run / ORIGIN, json.dumps(entry) + "\n")


def is_started(run: Path) -> bool:
    """Whether a run's folder holds more than what is there before config.yaml is written: the fencing record, job
    scripts, files of a launcher, remains of an interrupted conversion."""
    if not run.exists():
        return False
    early = (CHECKPOINTS, OWNER, JOBS, LOGS, STOP_REQUEST)
    if any(not p.name.endswith(PARTIAL) and p.name not in early for p in run.iterdir()):
        return True
    return (run / CHECKPOINTS).exists() and any(not p.name.startswith(".") for p in (run / CHECKPOINTS).iterdir())


def newest(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, otherwise a run's newest complete one. Raises CheckpointError if there
    is none."""
    if (folder / MANIFEST).is_file():
        return folder
    if complete := complete_checkpoints(folder):
        return complete[-1]
    raise CheckpointError(f"{folder}: contains no complete checkpoint (nor does its {CHECKPOINTS}/)")


def remove_old(run: Path, *, keep_last: int, keep_every_steps: int) -> None:
    """Delete all complete checkpoints but the newest `keep_last` and those of every n-th step (0: none)."""
    for folder in complete_checkpoints(run)[:-keep_last]:
        if not keep_every_steps or step_of(folder) % keep_every_steps:
            remove(folder)


def remove_from(run: Path, step: int) -> None:
    """Delete remains of interrupted saves, and checkpoints of `step` and later.

    The latter exist if a resume skipped them as damaged; they belong to a history that was abandoned.
    """
    for rest in (run / CHECKPOINTS).glob(f"{SAVING}*"):
        shutil.rmtree(rest, ignore_errors=True)
    for rest in (run / CHECKPOINTS).glob(f"{DELETING}*"):
        shutil.rmtree(rest)
    for folder in checkpoints(run):
        if step_of(folder) >= step:
            remove(folder)


def point_latest(folder: Path) -> None:
    """Write the name of a checkpoint's folder to the file `latest` next to it, atomically."""
    atomic_write(folder.with_name(LATEST), folder.name + "\n")


def size(folder: Path) -> int:
    """Bytes of a complete checkpoint, according to its checkpoint.json."""
    return (folder / MANIFEST).stat().st_size + sum(e["bytes"] for e in read_manifest(folder)["files"].values())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise CheckpointError if the folder's file system has less than `needed` bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder}: {what} needs about {needed:,} bytes, {free:,} are free; free some space and use --resume auto"
        )
