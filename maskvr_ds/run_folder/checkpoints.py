"""Checkpoint folders: which are complete, intact, newest, kept. Loads no torch. Their files: layout.py."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipeline.files import LOCK
from maskvr_ds.run_folder.layout import (
    CHECKPOINTS,
    JOBS,
    LOGS,
    MANIFEST,
    MAPNET_STATE,
    ORIGIN,
    OWNER,
    PROBE,
    ROLLBACKS,
    STOP_REQUEST,
    WEIGHTS,
)
from maskvr_ds.run_folder.migration import migrate_checkpoint
from maskvr_ds.runtime.files import PARTIAL, atomic_write, fsync_path, parse_json, read_json, sha256, write_hashed

FORMAT = 4
# Files whose values must be finite.
_FINITE = (WEIGHTS, PROBE, MAPNET_STATE)
_NAME = re.compile(r"step-[0-9]+")
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
    one possibly unfinished. guard: `divergence.Guard.state`. auto: `auto_strategy.Chooser.state`. held_out: held-out
    figures of this step, `held_out_loss` in nats; not stored if empty. digests: version of the digests in
    metrics.jsonl.
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
    held_out: dict[str, float] = field(default_factory=dict)
    digests: int = 1

    def stored(self) -> dict[str, Any]:
        """The content of checkpoint.json."""
        return {key: value for key, value in vars(self).items() if key != "held_out" or value}


_TYPES = {
    **dict.fromkeys(("step", "samples", "world_size", "zero_stage", "digests"), int),
    "dtype": str,
    **dict.fromkeys(("partitions", "phases"), list),
    **dict.fromkeys(("identity", "settings", "guard", "auto", "held_out"), dict),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified, with its state."""

    folder: Path
    state: CheckpointState


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
    """The content of checkpoint.json. Raises CheckpointError if it is missing, unreadable, damaged, or of another
    format."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        content = parse_json(text)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: not a complete checkpoint ({MANIFEST} is missing)") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use an earlier checkpoint") from error
    except ValueError:
        raise CheckpointError(f"{path}: damaged (not valid JSON); use an earlier checkpoint") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged (not a JSON object); use an earlier checkpoint")
    written = content.pop("sha256", None)
    if (stored := content.get("format")) not in (3, FORMAT):
        raise CheckpointError(f"{path}: format {stored!r}, this version reads 3 and {FORMAT}; update maskvr_ds")
    head = f'{{"sha256": "{written}",'.encode()
    if not text.startswith(head) or hashlib.sha256(text[len(head) :]).hexdigest() != written:
        raise CheckpointError(
            f"{path}: damaged, its content differs from the SHA-256 in its first line; use an earlier checkpoint"
        )
    if not _lists_files(content):
        raise CheckpointError(f"{path}: damaged (its list of files is none); use an earlier checkpoint")
    return migrate_checkpoint(content) if stored == 3 else content


def _lists_files(content: Mapping[str, Any]) -> bool:
    files = content.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def _state_of(folder: Path, manifest: Mapping[str, Any]) -> CheckpointState:
    try:
        state = CheckpointState(**{key: value for key, value in manifest.items() if key not in ("format", "files")})
    except TypeError as error:
        raise CheckpointError(f"{folder / MANIFEST}: not of a checkpoint of this format ({error})") from None
    for key, value in vars(state).items():
        if type(value) is not (expected := _TYPES[key]):
            raise CheckpointError(f"{folder / MANIFEST}: {key} is {value!r}, not {expected.__name__}; damaged")
    return state


def read_state(folder: Path) -> CheckpointState:
    """The state of a checkpoint. Raises CheckpointError if it is not a complete checkpoint."""
    return _state_of(folder, read_manifest(folder))


def faults(folder: Path) -> list[str]:
    """Every difference between a checkpoint and its checkpoint.json, one sentence each; empty if it is intact."""
    try:
        return _faults(folder, read_manifest(folder))
    except CheckpointError as error:
        return [str(error)]


def _faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    listed = manifest["files"]
    found = []
    if _NAME.fullmatch(folder.name) and manifest.get("step") != step_of(folder):
        found.append(f"{folder}: holds step {manifest.get('step')}, another than its name says; remove or rename it")
    with ThreadPoolExecutor(_THREADS) as pool:
        for faults_of_file in pool.map(lambda name: _faults_of_file(folder, name, listed[name]), listed):
            found += faults_of_file
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
            # DeepSpeed opens files by pattern, and unpickles what it opens.
            if (name := path.relative_to(folder).as_posix()) not in listed and name != MANIFEST:
                found.append(f"{path}: not listed in {MANIFEST}; remove it, or use an earlier checkpoint")
    except OSError as error:
        found.append(f"{folder}: cannot be listed ({error}); use an earlier checkpoint")
    return found


def _faults_of_file(folder: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    path = folder / name
    try:
        if not _is_inside(path, folder):
            return [f"{folder / MANIFEST}: {name!r} lies outside the checkpoint's folder"]
        if not path.is_file():
            return [f"{path}: missing; use an earlier checkpoint"]
        if (size := path.stat().st_size) != entry["bytes"]:
            return [f"{path}: {entry['bytes']} bytes expected, {size} found; use an earlier checkpoint"]
        if sha256(path) != entry["sha256"]:
            return [f"{path}: the SHA-256 differs from {MANIFEST}; use an earlier checkpoint"]
        return _nonfinite(path) if name in _FINITE else []
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        return [f"{path}: cannot be read ({error}); use an earlier checkpoint"]


def _is_inside(path: Path, folder: Path) -> bool:
    """Raises OSError if links lead in a circle."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except RuntimeError as error:  # before Python 3.13
        raise OSError(str(error)) from None


def _nonfinite(path: Path) -> list[str]:
    """One sentence if a safetensors file holds NaN or infinity: earlier versions saved that as good."""
    try:
        with safe_open(path, framework="np") as file:
            bad = [name for name in file.keys() if not np.isfinite(file.get_tensor(name)).all()]  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        return [f"{path}: not readable ({error}); use an earlier checkpoint"]
    many = f"{len(bad)} tensors hold" if len(bad) > 1 else "1 tensor holds"
    return [f"{path}: {many} NaN or infinity ({bad[0]}); use an earlier checkpoint"] if bad else []


def verify(folder: Path) -> Checkpoint:
    """Compare every file with checkpoint.json. Raises CheckpointError naming the first difference."""
    manifest = read_manifest(folder)
    if found := _faults(folder, manifest):
        raise CheckpointError(found[0])
    return Checkpoint(folder, _state_of(folder, manifest))


def checkpoints(run: Path) -> list[Path]:
    """Folders of the run's checkpoints, complete or not, oldest first; copies under other names are ignored."""
    return sorted((p for p in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def complete_checkpoints(run: Path) -> list[Path]:
    """Folders of the run's complete checkpoints, oldest first."""
    return [folder for folder in checkpoints(run) if _is_complete(folder)]


def _is_complete(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:
        return False


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find(run: Path, resume: str, refused: Mapping[Path, str] | None = None) -> Checkpoint | None:
    """The verified checkpoint to resume from.

    resume: "auto": the run's newest intact checkpoint (damaged ones are logged); if the run has none yet, the
    checkpoint of another run that it was started from; None if there is neither. Otherwise the path of a checkpoint
    or of a run. Such a path must be what "auto" would use, or the run's folder must be empty: the checkpoints of two
    histories must not mix. refused: folder -> fault of intact ones that could not be loaded. Raises CheckpointError.
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
    damaged = list((refused or {}).values())
    if (found := next(intact(run, damaged, refused or ()), None)) is not None:
        return found
    if damaged:
        names = ", ".join(folder.name for folder in checkpoints(run))
        raise CheckpointError(
            f"{run / CHECKPOINTS}: none of {names} is intact ({damaged[0]}); "
            "remove the run's folder to start over, or start in another output_dir with --resume PATH"
        )
    source = origin(run)
    return None if source is None else verify(source)


def intact(run: Path, skipped: list[str] | None = None, refused: Collection[Path] = ()) -> Iterator[Checkpoint]:
    """The run's intact checkpoints, newest first, without `refused`; others are logged, and added to `skipped`.

    Checkpoints of a history that a rollback has abandoned are skipped too. Each is verified when it is asked for.
    """
    rollbacks = _recorded_rollbacks(run)
    for folder in reversed([folder for folder in checkpoints(run) if folder not in refused]):
        try:
            checkpoint = verify(folder)
            if (to_step := _abandoned_by(checkpoint.state, rollbacks)) is not None:
                raise CheckpointError(f"{folder}: the run has rolled back from it to step {to_step}")
        except CheckpointError as error:
            logger.info("skipped: %s", error)
            if skipped is not None:
                skipped.append(str(error))
        else:
            yield checkpoint


def _abandoned_by(state: CheckpointState, rollbacks: list[Any]) -> int | None:
    """The step of an earlier checkpoint to which the run rolled back after it had saved this one; None if it did not.

    Every checkpoint stores the rollbacks before it, and rollbacks.json is only ever appended to.
    """
    known = state.guard.get("rollbacks")
    later = rollbacks[len(known) :] if isinstance(known, list) else []
    steps = [r["to_step"] for r in later if isinstance(r, dict) and isinstance(r.get("to_step"), int)]
    return next((step for step in steps if step < state.step), None)


def _recorded_rollbacks(run: Path) -> list[Any]:
    """rollbacks.json as it is (training/rollback.py reads and checks it); empty if missing or damaged."""
    try:
        content = read_json(run / ROLLBACKS)
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else []


def origin(run: Path) -> Path | None:
    """The checkpoint of another run that this run was started from; None if there is none.

    Raises CheckpointError if it no longer exists.
    """
    path = run / ORIGIN
    try:
        entry = read_json(path)
        folder, written = Path(entry["checkpoint"]), entry["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); the run has no checkpoint of its own yet: remove its folder to start over"
        ) from None
    try:
        unchanged = sha256(folder / MANIFEST) == written
    except OSError:
        unchanged = False
    if not unchanged:
        raise CheckpointError(
            f"{run}: has no checkpoint of its own yet, and {folder}, from which it was started, is missing or has "
            "changed; restore it, or remove the run's folder and choose another checkpoint"
        )
    return folder


def write_origin(run: Path, checkpoint: Path) -> None:
    """Record the checkpoint that a run is resumed from, unless it is the run's own, also if links lead to it."""
    if checkpoint.parent.resolve() != (run / CHECKPOINTS).resolve():
        entry = {"checkpoint": str(checkpoint.resolve()), "sha256": sha256(checkpoint / MANIFEST)}
        atomic_write(run / ORIGIN, json.dumps(entry) + "\n")


def is_started(run: Path) -> bool:
    """Whether a run's folder holds more than what is there before config.yaml is written: the fencing record, job
    scripts, files of a launcher, remains of an interrupted conversion."""
    if not run.exists():
        return False
    early = (CHECKPOINTS, OWNER, JOBS, LOGS, STOP_REQUEST, LOCK)
    later = any(not p.name.endswith(PARTIAL) and p.name not in early for p in run.iterdir())
    return later or any((run / CHECKPOINTS).glob("[!.]*"))


def newest(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, otherwise a run's newest complete one. Raises CheckpointError."""
    if _is_complete(folder):
        return folder
    if complete := complete_checkpoints(folder):
        return complete[-1]
    what = f"contains no complete checkpoint (nor does its {CHECKPOINTS}/)"
    if not folder.is_dir():
        what = "a file, not a checkpoint or a run" if folder.exists() else "no such folder"
    elif folder.name == CHECKPOINTS and complete_checkpoints(folder.parent):
        what += f"; name its run, {folder.parent}"
    raise CheckpointError(f"{folder}: {what}")


def size(folder: Path) -> int:
    """Bytes of a complete checkpoint, according to its checkpoint.json."""
    return (folder / MANIFEST).stat().st_size + sum(e["bytes"] for e in read_manifest(folder)["files"].values())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise CheckpointError if the folder's file system has less than `needed` bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder}: {what} needs about {needed:,} bytes, {free:,} are free; free some space and use --resume auto"
        )
