"""The first stage: files of text to token shards, on any number of processes, resumable."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.execution.progress import ProgressBar
from data_pipeline.execution.tasks import Task
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError, atomic_file, sha256_file, write_json
from data_pipeline.filters.minhash import PLACES, check_library, exact_duplicates, near_duplicates
from data_pipeline.filters.ngrams import task_ngrams
from data_pipeline.filters.rules import DIGEST
from data_pipeline.manifest import SourceEntry
from data_pipeline.sources.description import Description, find_files
from data_pipeline.sources.inputs import Piece, Progress, Source, cut_units
from data_pipeline.tokenization.token_shards import (
    DROPS,
    TOKENS_VERSION,
    TokenFile,
    TokenManifest,
    TokenShard,
    TokenSide,
    token_path,
    write_tokens,
)
from data_pipeline.tokenization.units import PASSING, Job, load_encoder, tokenize_unit

Unit = tuple[int, tuple[Piece, ...]]
"""Source (index in the description), and the pieces of its files; their indices are those of all files."""


# Enough to keep many workers busy to the end, and none so small that its files cost more than its text.
_UNITS, _LEAST, _MOST = 64, 1.0, 32.0


def default_work_size(groups: Sequence[Sequence[Source]]) -> float:
    """MB of text a unit of work: a 64th of the text, from 1 to 32. A function of the inputs alone."""
    return min(max(sum(file.text_bytes for files in groups for file in files) / 1e6 / _UNITS, _LEAST), _MOST)


def find_groups(description: Description, exclude: Sequence[Path], named: bool) -> list[list[Source]]:
    """The files of each source; where sources are `named`, the files' names begin with the source's."""
    groups = find_files(description, exclude)
    if not named:
        return groups
    return [
        [replace(file, name=f"{section.name}/{file.name}") for file in files]
        for section, files in zip(description.sources, groups, strict=True)
    ]


def tokenize_stage(
    folder: Path,
    work: Path,
    tokenizer: Path,
    description: Description,
    groups: Sequence[Sequence[Source]],
    *,
    named: bool,
    keys: bool,
    held_out: float,
    seed: int,
    work_size: float,
    pool: Pool,
    bar: ProgressBar,
) -> TokenManifest:
    """Write token shards into `folder`, resuming from `work`; returns their manifest, which is written last.

    tokenizer: the copied tokenizer folder. Raises CorpusError for faulty input, and where a side would be empty.
    """
    rules = description.documents
    if rules.duplicates == "near":
        check_library()
    encoder = load_encoder(str(tokenizer), sha256_file(tokenizer / "tokenizer.json"))
    ngrams = work / "ngrams.npy"
    if rules.decontaminate and not ngrams.exists():
        found = task_ngrams(rules.decontaminate, rules.decontaminate_words)
        with atomic_file(ngrams) as file:
            np.lib.format.write_array(file, found, allow_pickle=False)
    job = Job(
        work=str(folder),
        tokenizer=str(tokenizer),
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        special_tokens=encoder.special_tokens,
        documents=tuple(section.documents for section in description.sources),
        text_fields=tuple(section.text_field for section in description.sources),
        rules=rules,
        sentences=description.sentences,
        words=description.word_starts,
        keys=keys,
        ngrams=str(ngrams) if rules.decontaminate else "",
        held_out=held_out,
        seed=seed,
    )
    sources = [source for group in groups for source in group]
    units = _plan(work, groups, job, int(work_size * 1e6))
    results = pool.run(_tokenize_tasks(job, sources, units), work / "results", bar.update)
    shards = [{side: TokenSide(**entry) for side, entry in result["sides"].items()} for result in results]
    of_units = [Counter(result["dropped"]) for result in results]
    lost = dict.fromkeys(job.sides, 0)
    if "late" in job.of_documents or rules.duplicates != "keep":
        counts = [[entry[side].documents for side in job.sides] for entry in shards]
        bar.phase("duplicates", 0)
        task = Task("drops", "the search for duplicates", find_drops, (job, counts))
        (found,) = pool.run([task], work / "results", bar.update)
        for unit, late in found["dropped"]:
            of_units[unit] += Counter(late)
        lost = found["sides"]
        for unit, side, file in found["files"]:
            shards[unit][side].files["drop"] = TokenFile(**file)
    for entry in shards:
        for side in job.sides:
            for name in PASSING:
                entry[side].files.pop(name, None)
    manifest = TokenManifest(
        kind="tokens",
        version=TOKENS_VERSION,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        special_tokens=encoder.special_tokens,
        seed=seed,
        held_out=held_out,
        planes=job.planes,
        names=tuple(section.name for section in description.sources) if named else ("",),
        weights=tuple(section.weight for section in description.sources),
        dropped=dict(sorted(sum(of_units, Counter()).items())),
        replaced=sum(result["replaced"] for result in results),
        sources=_source_entries(sources, results),
        shards=tuple(
            TokenShard(source=group, sides=entry, dropped=dict(sorted(found.items())))
            for (group, _), entry, found in zip(units, shards, of_units, strict=True)
        ),
    )
    _check_not_empty(job, work, sources, manifest, lost)
    for unit in range(len(units)):
        for side in job.sides:
            for name in PASSING:
                token_path(folder, unit, side, name).unlink(missing_ok=True)
    write_tokens(folder, manifest)
    return manifest


def _plan(work: Path, groups: Sequence[Sequence[Source]], job: Job, unit_bytes: int) -> list[Unit]:
    """The units of work, and the state of the inputs when the build began: kept in a file, so that they
    stay."""
    path = work / "plan.json"
    mtimes = [source.mtime_ns for files in groups for source in files]

    def cut() -> list[Any]:
        found: list[Any] = []
        first = 0
        for group, files in enumerate(groups):
            for unit in cut_units(files, job.documents[group], job.text_fields[group], max(unit_bytes, 1)):
                found.append([group, [[first + piece.source, piece.start, piece.stop] for piece in unit]])
            first += len(files)
        return found

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
    """Raise CorpusError where an input of another time is, or may be, another than what finished units are made of.

    units: of the plan; now: what the inputs would be cut into today.
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
        good = sha256_file(Path(sources[i].path)) == known if known else same and i not in used
        if not good:
            raise CorpusError(
                f"{sources[i].path}: was written to since the build began. Choose another output folder, or "
                f"remove {work.parent} first"
            )


def _tokenize_tasks(job: Job, sources: Sequence[Source], units: Sequence[Unit]) -> list[Task]:
    tasks = []
    for i, (group, unit) in enumerate(units):
        pieces = [(sources[piece.source], piece) for piece in unit]
        first, last = pieces[0], pieces[-1]
        what = f"unit {i} ({first[0].path} from {first[1].start:,} to {last[0].path} {last[1].stop:,})"
        # Row groups and record batches are no bytes: for these the bar only moves while they are read.
        size = sum(p.stop - p.start for source, p in pieces if source.format not in (".parquet", ".arrow"))
        tasks.append(Task(f"unit-{i:05}", what, tokenize_unit, (job, i, group, pieces), size))
    return tasks


def find_drops(job: Job, counts: Sequence[Sequence[int]], progress: Progress) -> dict[str, Any]:
    """Decide which documents are left out, and write a file of reasons where some are.

    counts: documents of each unit and side. The first of equal or similar documents stays, those held out before the
    others, so that nothing trained on resembles what is held out. Returns {"dropped": [[unit, {reason: documents}]],
    "sides": {side: documents}, "files": [[unit, side, TokenFile as a dict]]}.
    """
    # Sides in this order, units in theirs: documents are numbered along it.
    parts = [
        (unit, side, found[job.sides.index(side)]) for side in reversed(job.sides) for unit, found in enumerate(counts)
    ]
    parts = [part for part in parts if part[2]]

    def read(name: str, dtype: Any, width: int) -> list[NDArray[Any]]:
        return [
            np.memmap(token_path(job.work, unit, side, name), dtype, mode="r", shape=(count, width))
            for unit, side, count in parts
        ]

    codes = np.zeros(sum(count for _, _, count in parts), np.uint8)
    if "late" in job.of_documents and parts:
        codes[:] = np.concatenate(read("late", np.uint8, 1))[:, 0]
    # What came late has been counted by the units.
    late = codes > 0
    if job.rules.duplicates != "keep" and parts:
        left = np.flatnonzero(codes == 0)
        digests = np.concatenate(read("digests", np.uint8, DIGEST))
        codes[left[exact_duplicates(digests[left])]] = DROPS.index("duplicate") + 1
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
            with atomic_file(token_path(job.work, unit, side, "drop")) as file:
                file.write(mine.data)
            files.append([unit, side, {"bytes": file.bytes, "sha256": file.sha256()}])
    return {"dropped": dropped, "sides": sides, "files": files}


def _check_not_empty(
    job: Job, work: Path, sources: Sequence[Source], manifest: TokenManifest, lost: dict[str, int]
) -> None:
    for side in job.sides:
        found = sum(shard.sides[side].documents for shard in manifest.shards)
        if found > lost[side]:
            continue
        # Nothing to go on from: the folder shall be free for the next try.
        shutil.rmtree(work / "results")
        (work / "results").mkdir()
        for path in Path(job.work).glob("tokens-*"):
            path.unlink()
        if job.held_out == 0:
            dropped = ", ".join(f"{reason} {count:,}" for reason, count in manifest.dropped.items())
            why = f"every document was dropped ({dropped}). Relax the rules" if dropped else "no text in "
            why += "" if dropped else f"{', '.join(s.path for s in sources[:3])}. Add text"
            raise CorpusError(f"the corpus is empty: {why}")
        raise CorpusError(
            f"held-out share {job.held_out}: no document falls on the side {side}. Give another share, or more text"
        )


def _source_entries(sources: Sequence[Source], results: Sequence[Any]) -> tuple[SourceEntry, ...]:
    sha256 = {name: digest for result in results for name, digest in result["sha256"].items()}
    return tuple(SourceEntry(name=s.name, bytes=s.bytes, sha256=sha256[s.name]) for s in sources)
