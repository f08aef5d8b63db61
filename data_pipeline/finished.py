"""What is checked where a command finds its work done already: that it is whole, and that its inputs are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.files import CorpusError, sha256_file
from data_pipeline.manifest import HELD_OUT, MANIFEST, Manifest, SourceEntry, read_manifest
from data_pipeline.shards import check_shard
from data_pipeline.sources.inputs import Source


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
