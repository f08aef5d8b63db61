"""Tokenization stage: text files to token shards, parallel and resumable."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.execution.file_checks import check_files
from data_pipeline.execution.progress import ProgressBar
from data_pipeline.execution.tasks import Task
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError, atomic_file, fsync_path, sha256_file, write_json
from data_pipeline.filters.minhash import PLACES, MappedParts, check_library, exact_duplicates, near_duplicates
from data_pipeline.filters.ngrams import task_ngrams
from data_pipeline.filters.rules import DIGEST
from data_pipeline.manifest import SourceEntry
from data_pipeline.numbers import counted
from data_pipeline.sources.cuts import cut_units
from data_pipeline.sources.description import Description, find_files
from data_pipeline.sources.inputs import Piece, Progress, Source, where_text_may_be
from data_pipeline.sources.reading import LIMITS, Limits
from data_pipeline.tokenization.token_shards import (
    DROPS,
    TOKENS_VERSION,
    TokenFile,
    TokenManifest,
    TokenShard,
    TokenSide,
    token_hashes,
    token_path,
    write_tokens,
)
from data_pipeline.tokenization.units import TEMPORARY, Job, files_to_hold_out, load_encoder, tokenize_unit
from data_pipeline.tokenization.unknown import check_unknown

Unit = tuple[int, tuple[Piece, ...]]
"""Index of the source in the description, and pieces of its files; piece.source is an index into the list of all
files."""

# Enough units to keep many workers busy to the end, but none so small that file overhead dominates.
_UNITS, _MIN_MB, _MAX_MB = 64, 1.0, 32.0
# Remedy for damaged files of a build that was killed.
REBUILD = "Remove the output folder, then rerun the command"


def default_work_size(groups: Sequence[Sequence[Source]]) -> float:
    """MB of text per unit of work: 1/64 of the text, between 1 and 32. Depends only on the inputs."""
    return min(max(sum(file.text_bytes for files in groups for file in files) / 1e6 / _UNITS, _MIN_MB), _MAX_MB)


def find_groups(description: Description, exclude: Sequence[Path], named: bool) -> list[list[Source]]:
    """The files of each source; if sources are `named`, file names are prefixed with the name of the source."""
    groups = find_files(description, exclude)
    if not named:
        return groups
    return [
        [replace(file, name=f"{section.name}/{file.name}") for file in files]
        for section, files in zip(description.sources, groups, strict=True)
    ]


@dataclass(frozen=True)
class TokenizeOptions:
    """Input of the tokenization stage: text files and how to tokenize them.

    groups: files of each source; tokenizer: the copied tokenizer folder; named: whether sources have names; keys: store
    a hash of each document; held_out: share of held-out documents, or with held_out_by "file" of the files; work_size:
    MB of text per unit of work; limits: of the readers; max_unknown: maximum share of unknown tokens.
    """

    description: Description
    groups: Sequence[Sequence[Source]]
    tokenizer: Path
    named: bool
    keys: bool
    held_out: float
    seed: int
    work_size: float
    limits: Limits = LIMITS
    max_unknown: float = 1.0
    held_out_by: str = "document"

    @property
    def files(self) -> list[Source]:
        return [file for files in self.groups for file in files]


def tokenize_stage(folder: Path, work: Path, options: TokenizeOptions, pool: Pool, bar: ProgressBar) -> TokenManifest:
    """Write token shards to `folder`, resuming from `work`; returns their manifest, which is written last.

    Raises CorpusError for invalid input, and if a side would have no documents or too many unknown tokens.
    """
    job = _make_job(folder, work, options)
    units = _plan(work, options.groups, job, int(options.work_size * 1e6))
    results = pool.run(_tokenize_tasks(job, options.files, units), work / "results", bar.update)
    shards = [{side: TokenSide(**entry) for side, entry in result["sides"].items()} for result in results]
    dropped = [Counter(result["dropped"]) for result in results]
    dropped_of_side = dict.fromkeys(job.sides, 0)
    if "late" in job.of_documents or job.rules.duplicates != "keep":
        bar.phase("duplicates", 0)
        dropped_of_side = _drop(job, work, shards, dropped, pool, bar)
    for entry in shards:
        for side in job.sides:
            for name in TEMPORARY:
                entry[side].files.pop(name, None)
    manifest = _make_manifest(job, options, units, results, shards, dropped)
    _check_not_empty(job, work, options.files, manifest, dropped_of_side)
    check_unknown(manifest, options.max_unknown)
    for unit in range(len(units)):
        for side in job.sides:
            for name in TEMPORARY:
                token_path(folder, unit, side, name).unlink(missing_ok=True)
    write_tokens(folder, manifest)
    return manifest


def _make_job(folder: Path, work: Path, options: TokenizeOptions) -> Job:
    description, rules = options.description, options.description.documents
    if rules.duplicates == "near":
        check_library()
    encoder = load_encoder(str(options.tokenizer), sha256_file(options.tokenizer / "tokenizer.json"))
    held_files = None
    if options.held_out and options.held_out_by == "file":
        names = [file.name for file in options.files]
        held_files = files_to_hold_out(names, options.held_out, options.seed)
        if len(held_files) == len(names):
            raise CorpusError(
                f"held-out share {options.held_out} by file: {len(names)} files leave none to train on. Give more "
                "files, or hold out documents (--held-out-by document)"
            )
    ngrams = work / "ngrams.npy"
    if rules.decontaminate and not ngrams.exists():
        hashes = task_ngrams(rules.decontaminate, rules.decontaminate_words)
        with atomic_file(ngrams) as file:
            np.lib.format.write_array(file, hashes, allow_pickle=False)
    return Job(
        work=str(folder),
        tokenizer=str(options.tokenizer),
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        special_tokens=encoder.special_tokens,
        documents=tuple(section.documents for section in description.sources),
        text_fields=tuple(section.text_field for section in description.sources),
        rules=rules,
        sentences=description.sentences,
        words=description.word_starts,
        keys=options.keys,
        ngrams=str(ngrams) if rules.decontaminate else "",
        held_out=options.held_out,
        seed=options.seed,
        limits=options.limits,
        held_out_files=held_files,
    )


def _drop(
    job: Job,
    work: Path,
    shards: Sequence[dict[str, TokenSide]],
    dropped: list[Counter[str]],
    pool: Pool,
    bar: ProgressBar,
) -> dict[str, int]:
    """Run `find_drops`, and add its counts to `dropped` and its files to `shards`; returns the drops of each side."""
    counts = [[entry[side].documents for side in job.sides] for entry in shards]
    if not (work / "results" / "drops.json").exists():
        hashes = token_hashes(job.work, shards)
        suffixes = tuple(f".{name}" for name in TEMPORARY)
        read = [{path: h for path, h in files.items() if path.endswith(suffixes)} for files in hashes]
        check_files(read, work, pool, lambda *_: None, REBUILD)
    task = Task("drops", "the search for duplicates", find_drops, (job, counts))
    (found,) = pool.run([task], work / "results", bar.update)
    for unit, reasons in found["dropped"]:
        dropped[unit] += Counter(reasons)
    for unit, side, file in found["files"]:
        shards[unit][side].files["drop"] = TokenFile(**file)
    sides: dict[str, int] = found["sides"]
    return sides


def _make_manifest(
    job: Job,
    options: TokenizeOptions,
    units: Sequence[Unit],
    results: Sequence[Any],
    shards: Sequence[dict[str, TokenSide]],
    dropped: Sequence[Counter[str]],
) -> TokenManifest:
    sections = options.description.sources
    return TokenManifest(
        kind="tokens",
        version=TOKENS_VERSION,
        tokenizer_sha256=job.tokenizer_sha256,
        vocab_size=job.vocab_size,
        special_tokens=job.special_tokens,
        seed=job.seed,
        held_out=job.held_out,
        planes=job.planes,
        names=tuple(section.name for section in sections) if options.named else ("",),
        weights=tuple(section.weight for section in sections),
        dropped=dict(sorted(sum(dropped, Counter()).items())),
        replaced=sum(result["replaced"] for result in results),
        sources=_source_entries(options.files, results),
        shards=tuple(
            TokenShard(source=group, sides=entry, dropped=dict(sorted(reasons.items())))
            for (group, _), entry, reasons in zip(units, shards, dropped, strict=True)
        ),
    )


def _plan(work: Path, groups: Sequence[Sequence[Source]], job: Job, unit_bytes: int) -> list[Unit]:
    """Units of work. They are stored with the mtimes of the inputs in plan.json, so that a resumed build has the same.

    Raises CorpusError if an input was modified since the build started.
    """
    path = work / "plan.json"
    mtimes = [source.mtime_ns for files in groups for source in files]

    def cut() -> list[Any]:
        units: list[Any] = []
        first = 0
        for group, files in enumerate(groups):
            for unit in cut_units(files, job.documents[group], job.text_fields[group], max(unit_bytes, 1)):
                units.append([group, [[first + piece.source, piece.start, piece.stop] for piece in unit]])
            first += len(files)
        return units

    if not path.exists():
        write_json(path, {"mtime_ns": mtimes, "units": cut()})
    plan = json.loads(path.read_bytes())
    units = [(group, tuple(Piece(*piece) for piece in unit)) for group, unit in plan["units"]]
    if mtimes != plan["mtime_ns"]:
        touched = [i for i, (now, then) in enumerate(zip(mtimes, plan["mtime_ns"], strict=True)) if now != then]
        _check_touched(work, [source for files in groups for source in files], touched, units, cut())
        write_json(path, plan | {"mtime_ns": mtimes})
    return units


def _check_touched(
    work: Path, sources: Sequence[Source], touched: Sequence[int], units: Sequence[Unit], now: Sequence[Any]
) -> None:
    """Raise CorpusError if an input with a new mtime differs, or may differ, from the input of finished units.

    touched: indices of such inputs; units: as planned; now: the units that the inputs would be cut into now.
    """
    same = [[group, [[p.source, p.start, p.stop] for p in unit]] for group, unit in units] == now
    sha256: dict[str, str] = {}
    used: set[int] = set()
    for i, (_, unit) in enumerate(units):
        if (path := work / "results" / f"unit-{i:05}.json").exists():
            sha256 |= json.loads(path.read_bytes())["sha256"]
            used |= {piece.source for piece in unit}
    for i in touched:
        known = sha256.get(sources[i].name)
        unchanged = sources[i].sha256() == known if known else same and i not in used
        if not unchanged:
            raise CorpusError(
                f"{sources[i].path}: modified since the build started. Choose another output folder, or "
                f"remove {work.parent} first"
            )


def _tokenize_tasks(job: Job, sources: Sequence[Source], units: Sequence[Unit]) -> list[Task]:
    tasks = []
    for i, (group, unit) in enumerate(units):
        pieces = [(sources[piece.source], piece) for piece in unit]
        first, last = pieces[0], pieces[-1]
        what = f"unit {i} ({first[0].path} from {first[1].start:,} to {last[0].path} {last[1].stop:,})"
        # Pieces of Parquet and Arrow files are not in bytes: the bar advances only while these are read.
        size = sum(p.stop - p.start for source, p in pieces if source.format not in (".parquet", ".arrow"))
        mine = job
        if job.held_out_files is not None:
            # Sending all names with each task would be quadratic in the number of files.
            mine = replace(job, held_out_files=job.held_out_files & {source.name for source, _ in pieces})
        tasks.append(Task(f"unit-{i:05}", what, tokenize_unit, (mine, i, group, pieces), size))
    return tasks


def find_drops(job: Job, counts: Sequence[Sequence[int]], progress: Progress) -> dict[str, Any]:
    """Decide which documents to drop, and write the `drop` files of the token shards that are affected.

    counts: documents of each unit and side. The first of equal or similar documents is kept; held-out documents come
    before the others, so that no training document resembles a held-out one. Returns {"dropped": [[unit, {reason:
    documents}]], "sides": {side: documents}, "files": [[unit, side, TokenFile as a dict]]}.
    """
    # Documents are numbered in this order.
    parts = [
        (unit, side, sizes[job.sides.index(side)]) for side in reversed(job.sides) for unit, sizes in enumerate(counts)
    ]
    parts = [part for part in parts if part[2]]

    def read(name: str, dtype: Any, width: int) -> MappedParts:
        files = [(token_path(job.work, unit, side, name), count) for unit, side, count in parts]
        return MappedParts(files, np.dtype(dtype), width)

    codes = np.zeros(sum(count for _, _, count in parts), np.uint8)
    if "late" in job.of_documents and parts:
        codes[:] = read("late", np.uint8, 1).joined()[:, 0]
    # These have been counted by their units already.
    late = codes > 0
    if job.rules.duplicates != "keep" and parts:
        kept = np.flatnonzero(codes == 0)
        digests = read("digests", np.uint8, DIGEST).joined()
        codes[kept[exact_duplicates(digests[kept])]] = DROPS.index("duplicate") + 1
        del digests
    if job.rules.duplicates == "near" and parts:
        signatures = read("signatures", np.uint32, PLACES)
        codes[near_duplicates(signatures, codes == 0, job.rules.similarity)] = DROPS.index("near_duplicate") + 1
    files: list[Any] = []
    dropped: list[Any] = []
    first = 0
    sides = dict.fromkeys(job.sides, 0)
    for unit, side, count in parts:
        mine = codes[first : first + count]
        new = np.bincount(mine[~late[first : first + count]], minlength=len(DROPS) + 1)[1:]
        dropped.append([unit, {name: n for name, n in zip(DROPS, new.tolist(), strict=True) if n}])
        first += count
        if mine.any():
            sides[side] += int((mine > 0).sum())
            with atomic_file(token_path(job.work, unit, side, "drop"), fsync_folder=False) as file:
                file.write(mine.data)
            files.append([unit, side, {"bytes": file.bytes, "sha256": file.sha256()}])
    fsync_path(Path(job.work))
    return {"dropped": dropped, "sides": sides, "files": files}


def _check_not_empty(
    job: Job, work: Path, sources: Sequence[Source], manifest: TokenManifest, dropped_of_side: dict[str, int]
) -> None:
    documents = {side: sum(shard.sides[side].documents for shard in manifest.shards) for side in job.sides}
    for side in job.sides:
        if documents[side] > dropped_of_side[side]:
            continue
        # Nothing can be resumed: leave the folder free for the next attempt.
        shutil.rmtree(work / "results")
        (work / "results").mkdir()
        for path in Path(job.work).glob("tokens-*"):
            path.unlink()
        if sum(documents.values()) == sum(dropped_of_side.values()):
            dropped = ", ".join(f"{reason} {count:,}" for reason, count in manifest.dropped.items())
            why = f"every document was dropped ({dropped}). Relax the rules" if dropped else "no text in "
            why += "" if dropped else f"{', '.join(s.path for s in sources[:3])}. Add text{where_text_may_be(sources)}"
            raise CorpusError(f"the corpus is empty: {why}")
        total = sum(documents.values())
        split = "held-out split" if side == "held_out" else "training split"
        raise CorpusError(
            f"held-out share {job.held_out}: the {split} gets none of {counted(total, 'document')}. "
            f"{_better_share(job, total)}"
        )


def _better_share(job: Job, documents: int) -> str:
    """What to do if a side has no documents of so many."""
    if job.held_out_files is not None:
        return "The files that were selected have no text: choose another --held-out or --seed"
    # With five expected documents, fewer than one corpus in a hundred has none.
    share = 5 / max(documents, 1)
    if share > 0.25:
        return (
            "These are too few documents: add text, split it into more documents (--documents), of several files "
            "hold out a complete one (--held-out-by file), or use --held-out 0"
        )
    return f"Use --held-out {math.ceil(share * 100) / 100:g}, or add text"


def _source_entries(sources: Sequence[Source], results: Sequence[Any]) -> tuple[SourceEntry, ...]:
    sha256 = {name: digest for result in results for name, digest in result["sha256"].items()}
    return tuple(SourceEntry(name=s.name, bytes=s.bytes, sha256=sha256[s.name]) for s in sources)
