"""Checkpoint folders and what they say of themselves: which are complete, whole, newest, to be kept. Loads no torch.

RUN/checkpoints/
    step-00000100/            complete once it has its checkpoint.json, which is written last
        checkpoint.json       state, size and SHA-256 of all other files; in line one the SHA-256 of the rest
    latest                    the newest one's name: for people and scripts; a resume looks at the folders
    .saving*, .deleting-*     on the way; a kill may leave them, the next save removes them
    .universal, .converting   elastic.py
RUN/origin.json               of another run's checkpoint that this run went on from: where it lay, and its SHA-256
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
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
from maskvr_ds.runtime.files import fsync_path, sha256, write_hashed

FORMAT = 3
_NAME = re.compile(r"step-\d+")
# What is hashed at once: hashlib lets other threads run.
_THREADS = 8


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, or of another run."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of itself beside its tensors.

    step: updates done. samples: sequences consumed. world_size, zero_stage, partitions: how it was written
    (engine.partition_sizes).
    dtype: what the model computed in. identity: what must be equal for a run to go on from it. settings: the rest of
    the configuration that bears on training, flat; it may change, and a change is told. phases: what has been trained,
    a mapping a phase (phases.done), the last one perhaps in part. guard: divergence.Guard.state. auto:
    auto.Chooser.state, where it chooses the masks.
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


def remove(folder: Path) -> None:
    """Delete a checkpoint. Hidden first: a deletion cut short must not leave half of it under its name."""
    shutil.rmtree(folder.rename(folder.with_name(DELETING + folder.name)))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_manifest(
    folder: Path, content: Mapping[str, Any], hashed: Mapping[str, tuple[int, str]] | None = None
) -> None:
    """Write checkpoint.json with `content` and every file's size and SHA-256, all of it synchronised.

    hashed: what `write_hashed` said of files, by name; the others are hashed now.
    """
    hashed = dict(hashed or {})
    names = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    left = [name for name in names if name not in hashed]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed |= zip(left, pool.map(write_hashed, [names[name] for name in left]), strict=True)
    files = {name: {"bytes": hashed[name][0], "sha256": hashed[name][1]} for name in names}
    for path in {path.parent for path in names.values()}:
        fsync_path(path)
    rest = json.dumps({"format": FORMAT, **content, "files": files}, indent=1).removeprefix("{") + "\n"
    own = hashlib.sha256(rest.encode()).hexdigest()
    temporary = folder / f".{MANIFEST}.partial"
    temporary.write_text(f'{{"sha256": "{own}",{rest}', encoding="utf-8")
    fsync_path(temporary)
    temporary.rename(folder / MANIFEST)
    fsync_path(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json. Raises CheckpointError where it is missing, damaged, or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint ({MANIFEST} is missing)")
    text = path.read_bytes()
    try:
        content = json.loads(text)
        written = content.pop("sha256", None)
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path}: damaged, not JSON any more; take an earlier checkpoint") from None
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}")
    head = f'{{"sha256": "{written}",'.encode()
    if not text.startswith(head) or hashlib.sha256(text[len(head) :]).hexdigest() != written:
        raise CheckpointError(f"{path}: damaged, it differs from the SHA-256 in its first line; take an earlier one")
    return content


def read_state(folder: Path) -> CheckpointState:
    """What a checkpoint says of itself. Raises CheckpointError where it is not a complete checkpoint."""
    return CheckpointState(**{k: v for k, v in read_manifest(folder).items() if k not in ("format", "files")})


def faults(folder: Path) -> list[str]:
    """Everything about a checkpoint's files that is not as written, a sentence each; none where it is whole."""
    try:
        listed = read_manifest(folder)["files"]
    except CheckpointError as error:
        return [str(error)]
    found = []
    to_hash = []
    for name, entry in listed.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append(f"{folder / MANIFEST}: {name!r} leaves the checkpoint's folder")
        elif not path.is_file():
            found.append(f"{path}: missing; take an earlier checkpoint")
        elif (size := path.stat().st_size) != entry["bytes"]:
            found.append(f"{path}: {entry['bytes']} bytes expected, {size} found; take an earlier checkpoint")
        else:
            to_hash.append((path, entry["sha256"]))
    with ThreadPoolExecutor(_THREADS) as pool:
        for (path, expected), actual in zip(to_hash, pool.map(sha256, [p for p, _ in to_hash]), strict=True):
            if actual != expected:
                found.append(f"{path}: the SHA-256 differs from {MANIFEST}; take an earlier checkpoint")
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        # DeepSpeed opens by pattern, and unpickles what it opens.
        if (name := path.relative_to(folder).as_posix()) not in listed and name != MANIFEST:
            found.append(f"{path}: not in {MANIFEST}; remove it, or take an earlier checkpoint")
    return found


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError naming the first that is not as written."""
    if found := faults(folder):
        raise CheckpointError(found[0])


def checkpoints(run: Path) -> list[Path]:
    """Folders of the run's checkpoints, whole or not, oldest first. A copy under another name is none of them."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(p.name))


def complete_checkpoints(run: Path) -> list[Path]:
    """Of the run's `checkpoints` those that are complete."""
    return [folder for folder in checkpoints(run) if (folder / MANIFEST).is_file()]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find(run: Path, resume: str, tell: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to go on from, verified.

    "auto": the run's newest whole one, the others told; where it has not written any yet the one of another run that it
    had gone on from; None where there is neither. Otherwise the path of a checkpoint or of a run's folder, which must
    hold a complete one; it must be what "auto" would take, or this run's folder must be empty: else older and newer
    states of two histories would stand side by side.
    Raises CheckpointError.
    """
    if resume != "auto":
        own = complete_checkpoints(run)
        found = newest(Path(resume))
        going_on = own[-1] if own else origin(run)
        if begun(run) and (going_on is None or found.resolve() != going_on.resolve()):
            raise CheckpointError(
                f"--resume {resume}: output_dir {run} is not empty, and this is not its newest checkpoint; "
                "name another output_dir"
            )
        verify(found)
        return found
    broken = []
    for folder in reversed(checkpoints(run)):
        if not (wrong := faults(folder)):
            return folder
        broken.append((folder, wrong[0]))
        tell(f"passed over: {wrong[0]}")
    if broken:
        names = ", ".join(folder.name for folder, _ in reversed(broken))
        raise CheckpointError(
            f"{run / CHECKPOINTS}: none of {names} is whole ({broken[0][1]}); "
            "remove the run's folder to begin anew, or give --resume another checkpoint"
        )
    if (found_origin := origin(run)) is not None:
        verify(found_origin)
    return found_origin


def origin(run: Path) -> Path | None:
    """The checkpoint of another run that this one went on from; None where it had none.

    Raises CheckpointError where it is not there any more.
    """
    if not (run / ORIGIN).is_file():
        return None
    entry = json.loads((run / ORIGIN).read_text(encoding="utf-8"))
    folder = Path(entry["checkpoint"])
    if not (folder / MANIFEST).is_file() or sha256(folder / MANIFEST) != entry["sha256"]:
        raise CheckpointError(
            f"{run}: has no checkpoint of its own yet, and {folder}, which it had gone on from, is gone or another one "
            "now; put it back, or remove the run's folder and name another checkpoint"
        )
    return folder


def write_origin(run: Path, latest: Path) -> None:
    """Remember a checkpoint that a run goes on from, unless it is the run's own."""
    folder = latest.resolve()
    if folder.is_relative_to(run.resolve()):
        return
    temporary = run / f".{ORIGIN}.partial"
    temporary.write_text(
        json.dumps({"checkpoint": str(folder), "sha256": sha256(folder / MANIFEST)}) + "\n", encoding="utf-8"
    )
    fsync_path(temporary)
    temporary.replace(run / ORIGIN)


def begun(run: Path) -> bool:
    """Whether a run's folder holds more than what stands there before config.yaml does: who took it, its job script,
    what a launcher puts there first, and what a kill during a conversion leaves."""
    if not run.exists():
        return False
    early = (CHECKPOINTS, OWNER, JOBS, LOGS, STOP_REQUEST)
    if any(not p.name.endswith(".partial") and p.name not in early for p in run.iterdir()):
        return True
    return (run / CHECKPOINTS).exists() and any(not p.name.startswith(".") for p in (run / CHECKPOINTS).iterdir())


def newest(folder: Path) -> Path:
    """A checkpoint's own folder, or the newest complete one of a run. Raises CheckpointError where there is none."""
    if (folder / MANIFEST).is_file():
        return folder
    if complete := complete_checkpoints(folder):
        return complete[-1]
    raise CheckpointError(f"{folder}: no complete checkpoint there (nor in its {CHECKPOINTS}/)")


def remove_old(run: Path, *, keep_last: int, keep_every_steps: int) -> None:
    """Delete all complete checkpoints but the newest `keep_last` and those of every n-th step (0: none)."""
    for folder in complete_checkpoints(run)[:-keep_last]:
        if not keep_every_steps or step_of(folder) % keep_every_steps:
            remove(folder)


def remove_from(run: Path, step: int) -> None:
    """Delete what is left of saves that were cut short, and checkpoints of `step` and later.

    Such are there where a resume has passed them over; their history is not the one that goes on.
    """
    for rest in (run / CHECKPOINTS).glob(f"{SAVING}*"):
        shutil.rmtree(rest, ignore_errors=True)
    for rest in (run / CHECKPOINTS).glob(f"{DELETING}*"):
        shutil.rmtree(rest)
    for folder in checkpoints(run):
        if step_of(folder) >= step:
            remove(folder)


def point_latest(folder: Path) -> None:
    """Have the file `latest` beside a checkpoint's folder name it, whole at every moment."""
    temporary = folder.with_name(f".{LATEST}.partial")
    temporary.write_text(folder.name + "\n", encoding="utf-8")
    fsync_path(temporary)
    temporary.replace(folder.with_name(LATEST))


def size(folder: Path) -> int:
    """Bytes of a complete checkpoint, by its manifest."""
    return (folder / MANIFEST).stat().st_size + sum(e["bytes"] for e in read_manifest(folder)["files"].values())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise CheckpointError where the folder's file system has less than `needed` bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder}: {what} takes about {needed:,} bytes, {free:,} are free; make space and go on with --resume auto"
        )
