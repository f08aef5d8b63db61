"""Raw text to a corpus, in two stages, each on any number of processes and each resumable.

1. tokenise: every unit of work (a part of the inputs, see `sources`) becomes token files (`units`);
2. pack: the layout of all rows is found from the documents' lengths, then every shard is written by itself.

Rows are in the order of the documents on disk; the trainer reads them in the order of a keyed permutation.

While it works, an output folder also holds

    build.json      the arguments and the inputs (names, sizes): another command on this folder is refused. It
    stays. .build/         token files, and a result file for every finished task: what a killed build goes on
    from

The same command again goes on where a killed one stopped and ends with the same bytes. The manifest comes
last. An input is known by name, size and modification time during the build; its SHA-256 goes into the
manifest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.documents import DOCUMENTS
from data_pipeline.files import CorpusError, remove_partials, sha256_file, write_json
from data_pipeline.packing import ShardLayout, pack_rows
from data_pipeline.progress import ProgressBar
from data_pipeline.shards import (
    HELD_OUT,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    Manifest,
    ShardEntry,
    SourceEntry,
    read_manifest,
    write_manifest,
    write_shard,
)
from data_pipeline.sources import Piece, Progress, Source, Unit, cut_units, find_sources
from data_pipeline.tokenizer import copy_tokenizer, fingerprint
from data_pipeline.units import Job, load_encoder, tokenize_unit
from data_pipeline.workers import Pool, Task

MIN_SEQUENCE_LENGTH = 8
_WORK = ".build"
_ARGUMENTS = "build.json"


def build(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    sequence_length: int,
    output: str | Path,
    *,
    workers: int = 1,
    seed: int = 0,
    held_out: float = 0.0,
    documents: str = "blank-line",
    text_field: str = "text",
    shard_size: float = 128.0,
    work_size: float = 32.0,
    progress: bool | None = None,
) -> Manifest:
    """Build a corpus of rows of `sequence_length` token ids, and return its manifest.

    inputs: files, folders and globs of .txt, .jsonl (also .gz, .zst) and .parquet, taken in the order of
    their names; tokenizer: a Hugging Face tokenizer folder, copied to output/tokenizer; documents: how .txt
    files hold them ("blank-line", "line", "file"); text_field: JSON field or parquet column; workers:
    processes. held_out: this share of the documents, chosen by a hash of `seed` and the text, goes to a
    corpus of its own in output/held_out. shard_size: MB a shard; work_size: MB of text a unit of work (it
    does not change the output). progress: True or False shows or hides the bar, None shows it on a terminal.

    `output` must be new, empty, or hold an unfinished (or finished) build of the same arguments and inputs.
    With `workers` > 1 call it from under `if __name__ == "__main__":`, as always with multiprocessing.
    Raises CorpusError for faulty input, arguments, folder, or a full disk: what is finished then stays for
    the next run, and nothing half-written stands under a final name.
    """
    output = Path(output)
    _check_arguments(sequence_length, workers, seed, held_out, documents, shard_size, work_size)
    # A tokenizer's vocab.txt is no text, nor is the copy of it in an output folder among the inputs.
    sources = find_sources(inputs, exclude=(output, Path(tokenizer)))
    arguments = {
        "schema_version": SCHEMA_VERSION,
        "sequence_length": sequence_length,
        "seed": seed,
        "held_out": held_out,
        "documents": documents,
        "text_field": text_field,
        "shard_size": shard_size,
        "work_size": work_size,
        "tokenizer": fingerprint(tokenizer),
        "sources": [[source.name, source.bytes] for source in sources],
    }
    with _claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            shutil.rmtree(work)
            return read_manifest(output)
        copy_tokenizer(tokenizer, output / TOKENIZER)
        folder = output / TOKENIZER
        encoder = load_encoder(str(folder), sha256_file(folder / "tokenizer.json"))
        job = Job(
            work=str(work),
            tokenizer=str(folder),
            tokenizer_sha256=encoder.sha256,
            vocab_size=encoder.vocab_size,
            special_tokens=encoder.special_tokens,
            sequence_length=sequence_length,
            documents=documents,
            text_field=text_field,
            held_out=held_out,
            seed=seed,
        )
        units = _plan(work, sources, documents, text_field, int(work_size * 1e6))
        total = sum(source.bytes for source in sources)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers) as pool:
            tasks = _tokenize_tasks(job, sources, units)
            results = pool.run(tasks, work / "results", bar.update)
            _check_not_empty(job, work, sources, results)
            bar.phase("pack", job.dtype.itemsize * sum(r[side]["length"] for r in results for side in job.sides))
            # The corpus itself comes last: its manifest says that all of this is complete.
            for side in reversed(job.sides):
                folder = output if side == "train" else output / HELD_OUT
                folder.mkdir(exist_ok=True)
                layout = _lay_out(job, side, results, _rows_per_shard(job, shard_size))
                tasks = _pack_tasks(job, side, folder, layout, [result[side]["length"] for result in results])
                shards = pool.run(tasks, work / "results", bar.update)
                copy_tokenizer(output / TOKENIZER, folder / TOKENIZER)
                manifest = Manifest(
                    schema_version=SCHEMA_VERSION,
                    tokenizer_sha256=encoder.sha256,
                    vocab_size=encoder.vocab_size,
                    special_tokens=encoder.special_tokens,
                    sequence_length=sequence_length,
                    seed=seed,
                    packing="full_sequences",
                    rows=layout.rows,
                    tokens=layout.rows * sequence_length - layout.padding,
                    documents=sum(result[side]["documents"] for result in results),
                    sources=_source_entries(sources, results),
                    shards=tuple(ShardEntry(**shard) for shard in shards),
                )
                write_manifest(folder, manifest)
        shutil.rmtree(work)
    return manifest


def _check_arguments(
    sequence_length: int,
    workers: int,
    seed: int,
    held_out: float,
    documents: str,
    shard_size: float,
    work_size: float,
) -> None:
    rules = (
        (
            sequence_length >= MIN_SEQUENCE_LENGTH,
            "sequence length",
            sequence_length,
            f"at least {MIN_SEQUENCE_LENGTH}",
        ),
        (workers >= 1, "workers", workers, "at least 1"),
        (0 <= seed < 2**63, "seed", seed, "from 0 to 2^63 - 1"),
        (0 <= held_out < 1, "held-out share", held_out, "from 0 to below 1"),
        (documents in DOCUMENTS, "documents", documents, f"one of {', '.join(DOCUMENTS)}"),
        (shard_size > 0, "shard size", shard_size, "above 0 (MB)"),
        (work_size > 0, "work size", work_size, "above 0 (MB)"),
    )
    for holds, name, value, rule in rules:
        if not holds:
            raise CorpusError(f"{name} {value!r}: must be {rule}")


@contextmanager
def _claim(output: Path, arguments: dict[str, Any]) -> Iterator[Path]:
    """Make sure that the output folder is this build's alone, and yield its work folder.

    Where the build fails before any task is finished, what it made here goes again.
    """
    if output.exists() and not output.is_dir():
        raise CorpusError(f"{output}: is a file, the output must be a folder")
    new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    _claim_arguments(output, arguments)
    work = output / _WORK
    results = work / "results"
    results.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{output}: another build is at work in this folder. Wait for it or stop it") from None
        except OSError as error:
            # Some network file systems have no locks. Two builds at once then waste work, but do no harm:
            # they write the same bytes, each under temporary names of its own.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        folders = (output, output / HELD_OUT, work, results)
        try:
            for folder in folders:
                remove_partials(folder)
            yield work
        except BaseException:
            # Workers that were stopped had no chance to do it.
            for folder in folders:
                remove_partials(folder)
            begun = any(results.iterdir()) if results.exists() else True
            if not begun and not (output / MANIFEST).exists():
                shutil.rmtree(work)
                shutil.rmtree(output / TOKENIZER, ignore_errors=True)
                (output / _ARGUMENTS).unlink()
                if new:
                    output.rmdir()
            raise


def _claim_arguments(output: Path, arguments: dict[str, Any]) -> None:
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
        if before.get(key) == arguments[key]:
            continue
        then, now = before.get(key), arguments[key]
        if key == "sources":
            then, now = ([s for s in mine if s not in other][:3] for mine, other in ((then, now), (now, then)))
        raise CorpusError(
            f"{output}: output folder holds a build of another command: {key} {then} then, {now} now. "
            "Give the same arguments and inputs to go on, choose another folder, or remove this one first"
        )


def _plan(work: Path, sources: Sequence[Source], documents: str, text_field: str, unit_bytes: int) -> list[Unit]:
    """The units of work, and the state of the inputs when the build began: kept in a file, so that they
    stay."""
    path = work / "plan.json"
    if not path.exists():
        units = cut_units(sources, documents, text_field, max(unit_bytes, 1))
        mtimes = [source.mtime_ns for source in sources]
        pieces = [[[piece.source, piece.start, piece.stop] for piece in unit] for unit in units]
        write_json(path, {"mtime_ns": mtimes, "units": pieces})
    plan = json.loads(path.read_bytes())
    for source, mtime in zip(sources, plan["mtime_ns"], strict=True):
        if source.mtime_ns != mtime:
            raise CorpusError(
                f"{source.path}: was written to since the build began. Choose another output folder, or "
                "remove "
                f"{work.parent} first"
            )
    return [tuple(Piece(*piece) for piece in unit) for unit in plan["units"]]


def _tokenize_tasks(job: Job, sources: Sequence[Source], units: Sequence[Unit]) -> list[Task]:
    tasks = []
    for i, unit in enumerate(units):
        pieces = [(sources[piece.source], piece) for piece in unit]
        first, last = pieces[0], pieces[-1]
        what = f"unit {i} ({first[0].path} from {first[1].start:,} to {last[0].path} {last[1].stop:,})"
        size = sum(piece.stop - piece.start for source, piece in pieces if source.format != ".parquet")
        tasks.append(Task(f"unit-{i:05}", what, tokenize_unit, (job, i, pieces), size))
    return tasks


def _check_not_empty(job: Job, work: Path, sources: Sequence[Source], results: Sequence[Any]) -> None:
    for side in job.sides:
        if any(result[side]["documents"] for result in results):
            continue
        # Nothing to go on from: the folder shall be free for the next try.
        shutil.rmtree(work / "results")
        (work / "results").mkdir()
        if job.held_out == 0:
            raise CorpusError(f"the corpus is empty: no text in {', '.join(s.path for s in sources[:3])}. Add text")
        raise CorpusError(
            f"held-out share {job.held_out}: no document falls on the side {side}. Give another share, or more text"
        )


def _rows_per_shard(job: Job, shard_size: float) -> int:
    bits = 8 * job.sequence_length * job.dtype.itemsize + 1
    return max(int(shard_size * 1e6) * 8 // bits, 1)


def _lay_out(job: Job, side: str, results: Sequence[Any], rows_per_shard: int) -> ShardLayout:
    """Find the stream position of every shard's first row; of the documents' ends, a block is in memory."""
    layout = ShardLayout(job.sequence_length - 2, rows_per_shard)
    offset = 0
    for unit, result in enumerate(results):
        if result[side]["documents"]:
            ends = np.memmap(job.ends_path(unit, side), np.int64, mode="r")
            for i in range(0, len(ends), 1 << 20):
                layout.add(ends[i : i + (1 << 20)] + offset)
        offset += result[side]["length"]
    layout.finish()
    return layout


def _pack_tasks(job: Job, side: str, folder: Path, layout: ShardLayout, lengths: Sequence[int]) -> list[Task]:
    """A task a shard, with the parts of the units' streams that it is made of: (unit, start, stop)."""
    offsets = [0, *accumulate(lengths)]
    stops = [*layout.starts[1:], offsets[-1]]
    tasks = []
    unit = 0
    for k, (start, stop) in enumerate(zip(layout.starts, stops, strict=True)):
        while offsets[unit + 1] <= start:
            unit += 1
        parts = []
        last = unit
        while last < len(lengths) and offsets[last] < stop:
            begin, end = max(start, offsets[last]), min(stop, offsets[last + 1])
            parts.append((last, begin - offsets[last], end - offsets[last]))
            last += 1
        name = f"shard-{k:05}"
        arguments = (job, side, str(folder), f"{name}.arrow", parts, k == len(stops) - 1)
        size = (stop - start) * job.dtype.itemsize
        tasks.append(Task(f"{side}.{name}", f"{folder / name}.arrow", pack_shard, arguments, size))
    return tasks


def pack_shard(
    job: Job,
    side: str,
    folder: str,
    file_name: str,
    parts: Sequence[tuple[int, int, int]],
    last: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write one shard from its parts of the units' token files; returns its manifest entry as a dict."""
    stream, ends = [], []
    position = 0
    for unit, start, stop in parts:
        path = job.stream_path(unit, side)
        stream.append(np.fromfile(path, job.dtype, stop - start, offset=start * job.dtype.itemsize))
        if job.ends_path(unit, side).stat().st_size:
            # Searched in the map: the file of a large unit is longer than what a shard needs.
            found = np.memmap(job.ends_path(unit, side), np.int64, mode="r")
            first, behind = np.searchsorted(found, (start, stop))
            ends.append(found[first:behind] + (position - start))
        position += stop - start
    tokens = job.special_tokens
    input_ids, document_end = pack_rows(
        np.concatenate(stream),
        np.concatenate([np.empty(0, np.int64), *ends]),
        job.sequence_length,
        cls=tokens.cls,
        sep=tokens.sep,
        pad=tokens.pad,
        last=last,
    )
    entry = write_shard(folder, file_name, input_ids, document_end)
    progress(position * job.dtype.itemsize, 0)
    return entry.model_dump()


def _source_entries(sources: Sequence[Source], results: Sequence[Any]) -> tuple[SourceEntry, ...]:
    sha256 = {name: digest for result in results for name, digest in result["sha256"].items()}
    return tuple(SourceEntry(name=s.name, bytes=s.bytes, sha256=sha256[s.name]) for s in sources)
