"""Output folders: exclusive ownership by one command with one set of arguments, and checks of finished output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files import (
    LOCK,
    CorpusError,
    lock_file,
    locked_folder,
    remove_partials,
    write_json,
)
from data_pipeline.filters.rules import NEWER_RULES
from data_pipeline.manifest import DESCRIPTION, HELD_OUT, MANIFEST, TOKENIZER, Manifest, SourceEntry, read_manifest
from data_pipeline.shards import check_shard
from data_pipeline.sources.inputs import Source

_WORK, _RESULTS, _LOCK = ".build", "results", "lock"
_ARGUMENTS = "build.json"
# Recorded only if they have another value.
_DEFAULTS = {"held_out_by": "document"}
_TASKS = "decontaminate"
# Arguments that earlier versions did not record.
_NEWER_ARGUMENTS = (_TASKS,)


@contextmanager
def claim(output: Path, arguments: dict[str, Any]) -> Iterator[Path]:
    """Lock the output folder for this build and yield its work folder, which does not exist if the output is finished.

    The work folder is removed once the output is finished; if the build fails before any task has finished, everything
    it created is removed. Raises CorpusError if the folder is in use, holds other files, or belongs to a build with
    other arguments; then nothing in it has changed.
    """
    if output.exists() and not output.is_dir():
        raise CorpusError(f"{output}: is a file, the output must be a folder")
    work = output / _WORK
    if (output / MANIFEST).exists() and not (work.exists() and os.access(output, os.W_OK)):
        # Finished, and nothing to clean up: the folder may be on a read-only file system.
        claim_arguments(output, arguments)
        yield work
        return
    # Known without a lock, and a folder of somebody else's is not even locked.
    _check_foreign(output)
    with locked_folder(output) as new:
        lock = _lock_work(output, arguments)
    folders = (output, output / HELD_OUT, work, work / _RESULTS)
    with lock:
        try:
            for folder in folders:
                remove_partials(folder)
            yield work
        except BaseException:
            # Report the original error, not a failure of the clean-up on the same disk.
            with suppress(OSError, CorpusError):
                _clean_up(output, folders, new)
            raise
        if (output / MANIFEST).exists():
            with locked_folder(output):
                shutil.rmtree(work, ignore_errors=True)


def _lock_work(output: Path, arguments: dict[str, Any]) -> BinaryIO:
    """Claim the folder under the lock of `locked_folder`: compare or record the arguments, and lock the work folder
    until the returned file is closed."""
    path = output / _WORK / _LOCK
    try:
        # A running build says that it runs, whatever its arguments are: its folder is not one to remove.
        lock = lock_file(path) if path.exists() else None
        try:
            claim_arguments(output, arguments)
            (output / _WORK / _RESULTS).mkdir(parents=True, exist_ok=True)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return lock or lock_file(path)
    except BlockingIOError:
        raise CorpusError(f"{output}: another build is running in this folder. Wait for it or stop it") from None


def _clean_up(output: Path, folders: Sequence[Path], new: bool) -> None:
    """Remove the temporary files that terminated workers could not remove; if no task has finished, everything. new:
    the folder itself too."""
    for folder in folders:
        remove_partials(folder)
    results = output / _WORK / _RESULTS
    started = any(results.iterdir()) if results.exists() else True
    if started or (output / MANIFEST).exists():
        return
    with locked_folder(output):
        _remove_output(output)
    if new and not any(output.iterdir()):
        output.rmdir()


def _remove_output(output: Path) -> None:
    """Remove the output of a build that finished no task.

    build.json is kept if the folder holds other files, so that the same command can still resume.
    """
    for folder in (output / HELD_OUT, output):
        for pattern in ("tokens-?????.*", "shard-?????.arrow", DESCRIPTION):
            for path in folder.glob(pattern):
                path.unlink()
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    if (output / HELD_OUT).is_dir() and not any((output / HELD_OUT).iterdir()):
        (output / HELD_OUT).rmdir()
    shutil.rmtree(output / _WORK)
    if {path.name for path in output.iterdir()} <= {_ARGUMENTS, LOCK}:
        (output / _ARGUMENTS).unlink(missing_ok=True)


def _check_foreign(output: Path) -> None:
    """Raise CorpusError if the folder holds files that no build wrote."""
    if (output / _ARGUMENTS).exists() or not output.exists():
        return
    # A build killed while writing its first file leaves only that partial file.
    if not all(item.name == LOCK or item.match(f".{_ARGUMENTS}.*.partial") for item in output.iterdir()):
        raise CorpusError(
            f"{output}: output folder is not empty and holds no build. Choose another, or remove it first"
        )


def claim_arguments(output: Path, arguments: dict[str, Any]) -> None:
    """Record the arguments in build.json, or compare them with those recorded there.

    Raises CorpusError if they differ, or if the folder holds files that no build wrote.
    """
    path = output / _ARGUMENTS
    if not path.exists():
        _check_foreign(output)
        write_json(path, arguments)
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error}). Choose another output folder, or remove it") from None
    # Rules of records are recorded only if they are set.
    later = (*NEWER_RULES, *_DEFAULTS)
    for key in (*arguments, *(key for key in later if key in before and key not in arguments)):
        then: Any = before.get(key, _DEFAULTS.get(key))
        now: Any = arguments.get(key, _DEFAULTS.get(key))
        if then == now or (key in _NEWER_ARGUMENTS and key not in before):
            continue
        if _TASKS in before and _TASKS in arguments and _without_task_paths(key, then) == _without_task_paths(key, now):
            continue
        if key == "sources":
            then, now = _only_in(then, now), _only_in(now, then)
        raise CorpusError(
            f"{output}: output folder holds a build with other arguments: {key} was {then}, is now {now}. "
            "Use the same arguments and inputs to resume, choose another folder, or remove this one first"
        )


def _without_task_paths(key: str, value: Any) -> Any:
    """The value of an argument, with task files by their SHA-256: like inputs, they may be moved between runs."""
    if key == _TASKS and isinstance(value, dict):
        return sorted(value.values())
    if key == "description" and isinstance(value, dict) and isinstance(value.get("documents"), dict):
        return value | {"documents": value["documents"] | {_TASKS: None}}
    return value


def _only_in(mine: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The first three sources that only one of two builds has. There may be millions."""
    known = set(map(tuple, other))
    return list(islice((source for source in mine if tuple(source) not in known), 3))


def finished_corpus(output: Path, held_out: bool) -> Manifest:
    """Check that all shards of a finished corpus exist with the right size, and return its manifest.

    held_out: also check the held-out corpus. Raises CorpusError with one line per bad shard.
    """
    faults, sides = [], []
    for folder in (output, *((output / HELD_OUT,) if held_out else ())):
        if not (folder / MANIFEST).exists():
            faults.append(f"{folder / MANIFEST}: missing")
            continue
        sides.append(read_manifest(folder))
        for entry in sides[-1].shards:
            try:
                check_shard(folder, entry, sides[-1], full=False)
            except CorpusError as error:
                faults.append(str(error))
    if faults:
        raise CorpusError("\n".join(f"{fault}: remove the folder {output}, then rerun the command" for fault in faults))
    return sides[0]


def check_inputs(output: Path, entries: Sequence[SourceEntry], sources: Sequence[Source]) -> None:
    """Raise CorpusError if an input differs from the one that a finished output was built from.

    Only files modified since then are read. ctime is checked as well: copies may preserve mtime.
    """
    made = (output / MANIFEST).stat().st_mtime_ns
    sha256 = {entry.name: entry.sha256 for entry in entries}
    for source in sources:
        stat = Path(source.path).stat()
        if max(stat.st_mtime_ns, stat.st_ctime_ns) < made:
            continue
        if source.sha256() != sha256[source.name]:
            raise CorpusError(
                f"{source.path}: modified since {output} was built from it. Restore it, choose another output "
                "folder, or remove this one first"
            )
