"""An output folder belongs to one command at a time, and to one set of arguments."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.files import CorpusError, remove_partials, sha256_file, write_json
from data_pipeline.manifest import DESCRIPTION, HELD_OUT, MANIFEST, TOKENIZER, Manifest, SourceEntry, read_manifest
from data_pipeline.shards import check_shard
from data_pipeline.sources.inputs import Source

_WORK = ".build"
_ARGUMENTS = "build.json"
# Folders of earlier versions do not say these.
_LATER = ("decontaminate",)


@contextmanager
def claim(output: Path, arguments: dict[str, Any]) -> Iterator[Path]:
    """Make sure that the output folder is this build's alone, and yield its work folder.

    Where the build fails before any task is finished, what it made here goes again.
    """
    if output.exists() and not output.is_dir():
        raise CorpusError(f"{output}: is a file, the output must be a folder")
    new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    claim_arguments(output, arguments)
    work = output / _WORK
    results = work / "results"
    results.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{output}: another build is at work in this folder. Wait for it or stop it") from None
        except OSError as error:
            # Some network file systems have no locks, or none beyond a node. Two builds at once in one folder are not
            # noticed there, and fail over the files that each takes from the other.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        folders = (output, output / HELD_OUT, work, results)
        try:
            for folder in folders:
                remove_partials(folder)
            yield work
        except BaseException:
            # What went wrong is told, not what the cleaning up meets on the same disk.
            with suppress(OSError):
                # Workers that were stopped had no chance to do it.
                for folder in folders:
                    remove_partials(folder)
                begun = any(results.iterdir()) if results.exists() else True
                if not begun and not (output / MANIFEST).exists():
                    _remove_output(output, new)
            raise


def _remove_output(output: Path, new: bool) -> None:
    """Remove what a build has made of which no task is finished; new: the folder too.

    Where something else lies there, build.json stays: the same command may still go on.
    """
    shutil.rmtree(output / _WORK)
    for folder in (output / HELD_OUT, output):
        for pattern in ("tokens-?????.*", "shard-?????.arrow", DESCRIPTION):
            for path in folder.glob(pattern):
                path.unlink()
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    if (output / HELD_OUT).is_dir() and not any((output / HELD_OUT).iterdir()):
        (output / HELD_OUT).rmdir()
    if {path.name for path in output.iterdir()} == {_ARGUMENTS}:
        (output / _ARGUMENTS).unlink()
        if new:
            output.rmdir()


def claim_arguments(output: Path, arguments: dict[str, Any]) -> None:
    path = output / _ARGUMENTS
    if not path.exists():
        # A build killed while it wrote its very first file leaves that; whatever else is there is not ours.
        if not all(item.match(f".{_ARGUMENTS}.*.partial") for item in output.iterdir()):
            raise CorpusError(
                f"{output}: output folder is not empty, and no build began it. Choose another, or remove it first"
            )
        write_json(path, arguments)
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error}). Choose another output folder, or remove it") from None
    for key in arguments:
        if before.get(key) == arguments[key] or (key in _LATER and key not in before):
            continue
        then, now = before.get(key), arguments[key]
        if key == "sources":
            then, now = ([s for s in mine if s not in other][:3] for mine, other in ((then, now), (now, then)))
        raise CorpusError(
            f"{output}: output folder holds a build of another command: {key} {then} then, {now} now. "
            "Give the same arguments and inputs to go on, choose another folder, or remove this one first"
        )


def finished_corpus(output: Path, held_out: bool) -> Manifest:
    """The manifest of a finished corpus, whose shards are all there and of the right size; held_out: it has that side.

    Raises CorpusError with a line for each shard that is not.
    """
    faults, sides = [], []
    for folder in (output, *((output / HELD_OUT,) if held_out else ())):
        if not (folder / MANIFEST).exists():
            faults.append(f"{folder / MANIFEST}: is missing")
            continue
        sides.append(read_manifest(folder))
        for entry in sides[-1].shards:
            try:
                check_shard(folder, entry, sides[-1], full=False)
            except CorpusError as error:
                faults.append(str(error))
    if faults:
        raise CorpusError("\n".join(f"{fault}: remove the folder {output}, then run this again" for fault in faults))
    return sides[0]


def check_inputs(output: Path, entries: Sequence[SourceEntry], sources: Sequence[Source]) -> None:
    """Raise CorpusError where an input is not the one that a finished output was made of.

    Only what was touched since is read. The time of the last change tells it too where a copy keeps the time of the
    last modification.
    """
    made = (output / MANIFEST).stat().st_mtime_ns
    sha256 = {entry.name: entry.sha256 for entry in entries}
    for source in sources:
        stat = Path(source.path).stat()
        if max(stat.st_mtime_ns, stat.st_ctime_ns) < made:
            continue
        if sha256_file(Path(source.path)) != sha256[source.name]:
            raise CorpusError(
                f"{source.path}: was written to since {output} was built of it. Restore it, choose another output "
                "folder, or remove this one first"
            )
