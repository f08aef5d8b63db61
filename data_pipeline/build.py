"""Corpus builds: text to a corpus in two parallel and resumable stages.

1. Tokenization (tokenization/stage.py): each unit of work, a part of the inputs, becomes a token shard.
2. Packing (packing/stage.py): token shards become rows.

`build` runs both, `tokenize` and `pack` one each: tokenize once, pack many times. Rows are in the order of the
documents; the trainer reads them in the order of a keyed permutation.

During a build, the output folder also contains

    build.json         arguments and inputs (names, sizes): a command with others is refused. Kept.
    description.yaml   the corpus description, if one was given. Kept.
    .build/            token shards (`build`), rows, and a result file per finished task, from which a killed build
                       resumes

Rerunning a killed command resumes it and produces the same bytes; the manifest is written last. During a build, inputs
are identified by name, size and mtime, and if only the mtime differs, by the SHA-256 recorded in the manifest; task
files by SHA-256.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.execution.mpi import Team
from data_pipeline.execution.progress import ProgressBar
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError, atomic_file, sha256_file
from data_pipeline.filters.ngrams import task_digests
from data_pipeline.filters.rules import DocumentRules
from data_pipeline.manifest import DESCRIPTION, HELD_OUT, MANIFEST, PACKINGS, SCHEMA_VERSION, TOKENIZER
from data_pipeline.numbers import MAX_LENGTH, MAX_WORKERS
from data_pipeline.outputs import check_inputs, claim, finished_corpus
from data_pipeline.packing.stage import PackOptions, pack_side
from data_pipeline.shards import Manifest
from data_pipeline.sources.description import (
    MAX_WEIGHT,
    Description,
    SourceSection,
    description_yaml,
    read_description,
)
from data_pipeline.sources.documents import DOCUMENTS
from data_pipeline.tokenization.stage import TokenizeOptions, default_work_size, find_groups, tokenize_stage
from data_pipeline.tokenization.token_shards import PLANES, TOKENS_VERSION, TokenManifest, read_tokens
from data_pipeline.tokenization.tokenizer import copy_tokenizer, fingerprint

MIN_SEQUENCE_LENGTH = 8
_MAX_MB = 1e12  # in bits, this is below 2^63


def build(
    inputs: Sequence[str | Path] | None,
    tokenizer: str | Path,
    sequence_length: int,
    output: str | Path,
    *,
    description: str | Path | None = None,
    workers: int = 1,
    seed: int = 0,
    held_out: float = 0.0,
    documents: str = "blank-line",
    text_field: str = "text",
    packing: str = "full_sequences",
    bins: Sequence[int] = (),
    pair_probability: float = 0.5,
    columns: Sequence[str] = (),
    shard_size: float = 128.0,
    work_size: float | None = None,
    progress: bool | None = None,
    team: Team | None = None,
) -> Manifest:
    """Build a corpus with rows of `sequence_length` token ids, and return its manifest.

    inputs: files, folders and globs of .txt, .jsonl (both also .gz, .zst) and .parquet, read in the order of their
    names; None if `description` is the path of a YAML file (sources/description.py). tokenizer: Hugging Face tokenizer
    folder, copied to output/tokenizer. held_out: share of documents, selected by a hash of `seed` and the text, that
    becomes a separate corpus in output/held_out. documents: how .txt files are split ("blank-line", "line", "file");
    text_field: JSON field or Parquet column. packing: "full_sequences", "documents" (with length bins), "nsp" or "sop"
    (with pair_probability). columns: "word_start", "sentence_start" to store. shard_size: MB per shard. work_size: MB
    of text per unit of work, without effect on the output; None: `default_work_size`. progress: show the bar, None: on
    a terminal. team: MPI ranks, with this process as rank 0 (execution/mpi.py).

    `output` must be new, empty, or contain an unfinished or finished build with the same arguments and inputs.
    With `workers` > 1, call under `if __name__ == "__main__":`, as usual with multiprocessing.
    Raises CorpusError for invalid inputs, arguments or output folder, and for a full disk; finished tasks are kept for
    the next run, and no incomplete file appears under its final name.
    """
    output = Path(output)
    check_source_arguments(workers, seed, held_out, documents, work_size)
    packed = pack_options(sequence_length, packing, bins, pair_probability, columns, seed, shard_size)
    about, named = resolve_description(inputs, description, documents, text_field)
    about = with_required_planes(about, columns, packing)
    packed = replace(packed, weights=tuple(section.weight for section in about.sources))
    # Skip vocab.txt of the tokenizer, and of its copy in an output folder below the inputs.
    groups = find_groups(about, (output, Path(tokenizer)), named)
    work_size = work_size or default_work_size(groups)
    options = TokenizeOptions(about, groups, output / TOKENIZER, named, named, held_out, seed, work_size)
    arguments = (
        {
            "schema_version": SCHEMA_VERSION,
            "sequence_length": sequence_length,
            "seed": seed,
            "held_out": held_out,
            "documents": documents,
            "text_field": text_field,
            "shard_size": shard_size,
            "work_size": work_size,
            "tokenizer": fingerprint(tokenizer),
            "sources": [[source.name, source.bytes] for source in options.files],
        }
        | recorded_options(packed, about, named)
        | _task_arguments(about)
    )
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            shutil.rmtree(work)
            manifest = finished_corpus(output, held_out > 0)
            check_inputs(output, manifest.sources, options.files)
            return manifest
        copy_tokenizer(tokenizer, output / TOKENIZER)
        total = sum(source.bytes for source in options.files)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers, team) as pool:
            tokens = tokenize_stage(work, work, options, pool, bar)
            if named:
                _save_description(output, about)
            manifest = _pack_sides(work, tokens, output, output / TOKENIZER, work, packed, pool, bar)
        shutil.rmtree(work)
    return manifest


def tokenize(
    inputs: Sequence[str | Path] | None,
    tokenizer: str | Path,
    output: str | Path,
    *,
    description: str | Path | None = None,
    workers: int = 1,
    seed: int = 0,
    held_out: float = 0.0,
    documents: str = "blank-line",
    text_field: str = "text",
    work_size: float | None = None,
    progress: bool | None = None,
    team: Team | None = None,
) -> TokenManifest:
    """Write token shards of all documents to `output`, for `pack`. Arguments, resuming and errors as in `build`.

    Word starts are stored, and sentence starts as set in the description (default "punctuation"). work_size: MB of text
    per token shard, None: `default_work_size`; it has no effect on the packed corpora.
    """
    output = Path(output)
    check_source_arguments(workers, seed, held_out, documents, work_size)
    about, named = resolve_description(inputs, description, documents, text_field)
    about = about.model_copy(update={"word_starts": True, "sentences": about.sentences or "punctuation"})
    groups = find_groups(about, (output, Path(tokenizer)), named)
    work_size = work_size or default_work_size(groups)
    options = TokenizeOptions(about, groups, output / TOKENIZER, named, True, held_out, seed, work_size)
    arguments = {
        "tokens_version": TOKENS_VERSION,
        "seed": seed,
        "held_out": held_out,
        "work_size": work_size,
        "description": about.model_dump(mode="json", exclude={"sources": {"__all__": {"inputs"}}}),
        "tokenizer": fingerprint(tokenizer),
        "sources": [[source.name, source.bytes] for source in options.files],
    } | _task_arguments(about)
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            shutil.rmtree(work)
            manifest = read_tokens(output)
            check_inputs(output, manifest.sources, options.files)
            return manifest
        copy_tokenizer(tokenizer, output / TOKENIZER)
        total = sum(source.bytes for source in options.files)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers, team) as pool:
            if named:
                _save_description(output, about)
            manifest = tokenize_stage(output, work, options, pool, bar)
        shutil.rmtree(work)
    return manifest


def pack(
    tokens: str | Path,
    sequence_length: int,
    output: str | Path,
    *,
    workers: int = 1,
    packing: str = "full_sequences",
    bins: Sequence[int] = (),
    pair_probability: float = 0.5,
    columns: Sequence[str] = (),
    weights: dict[str, float] | None = None,
    shard_size: float = 128.0,
    progress: bool | None = None,
    team: Team | None = None,
) -> Manifest:
    """Pack a folder of token shards into a corpus, with held-out documents in output/held_out; returns its manifest.

    weights: by source name, overriding those of the description. Other arguments, resuming and errors as in `build`;
    also raises CorpusError if the token shards are incomplete or lack a plane that the packing needs.
    """
    tokens, output = Path(tokens), Path(output)
    _check_rules(((1 <= workers <= MAX_WORKERS, "workers", workers, f"from 1 to {MAX_WORKERS:,}"),))
    manifest = read_tokens(tokens)
    options = pack_options(sequence_length, packing, bins, pair_probability, columns, manifest.seed, shard_size)
    needed = {*columns, *(("sentence_start",) if packing in ("nsp", "sop") else ())}
    if missing := sorted(needed - set(manifest.planes)):
        raise CorpusError(f"{tokens}: has no {missing[0]}. Run the command tokenize, or pack without it")
    for name, weight in (weights or {}).items():
        if name not in manifest.names:
            raise CorpusError(f"weight of {name!r}: unknown source, {tokens} has {', '.join(manifest.names)}")
        _check_rules(((0 < weight <= MAX_WEIGHT, f"weight of {name!r}", weight, f"above 0 and at most {MAX_WEIGHT}"),))
    given = zip(manifest.names, manifest.weights, strict=True)
    options = replace(options, weights=tuple((weights or {}).get(name, weight) for name, weight in given))
    arguments = {
        "schema_version": SCHEMA_VERSION,
        "sequence_length": sequence_length,
        "shard_size": shard_size,
        "weights": list(options.weights),
        "tokens": sha256_file(tokens / MANIFEST),
    } | recorded_options(options, None, False)
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            shutil.rmtree(work)
            return finished_corpus(output, HELD_OUT in manifest.sides)
        copy_tokenizer(tokens / TOKENIZER, output / TOKENIZER)
        if (tokens / DESCRIPTION).exists() and not (output / DESCRIPTION).exists():
            with atomic_file(output / DESCRIPTION) as file:
                file.write((tokens / DESCRIPTION).read_bytes())
        with ProgressBar(0, "pack", progress) as bar, Pool(workers, team) as pool:
            result = _pack_sides(tokens, manifest, output, tokens / TOKENIZER, work, options, pool, bar)
        shutil.rmtree(work)
    return result


def _pack_sides(
    tokens: Path,
    manifest: TokenManifest,
    output: Path,
    tokenizer: Path,
    work: Path,
    options: PackOptions,
    pool: Pool,
    bar: ProgressBar,
) -> Manifest:
    total = sum(shard.sides[side].length for shard in manifest.shards for side in manifest.sides)
    bar.phase("pack", manifest.dtype.itemsize * total)
    # The training side comes last: its manifest marks the entire corpus as complete.
    for side in reversed(manifest.sides):
        folder = output if side == "train" else output / HELD_OUT
        result = pack_side(tokens, manifest, side, folder, work, tokenizer, options, pool, bar)
    return result


def resolve_description(
    inputs: Sequence[str | Path] | None, description: str | Path | None, documents: str, text_field: str
) -> tuple[Description, bool]:
    """The description, read from its file or made from `inputs`, and whether its sources have names (the former).

    Raises CorpusError unless exactly one of the two is given, and if the file is invalid.
    """
    if (inputs is None) == (description is None):
        raise CorpusError("give either inputs or a description")
    if description is not None:
        return read_description(description), True
    section = SourceSection.model_construct(
        name="input",
        inputs=tuple(map(str, inputs or ())),
        format="auto",
        documents=documents,
        text_field=text_field,
        split=None,
        weight=1.0,
    )
    return Description.model_construct(
        sources=(section,), documents=DocumentRules(), sentences=None, word_starts=False
    ), False


def with_required_planes(about: Description, columns: Collection[str], packing: str) -> Description:
    """The description, with word and sentence starts enabled if columns or packing need them."""
    required: dict[str, Any] = {"word_starts": True} if "word_start" in columns else {}
    if about.sentences is None and ("sentence_start" in columns or packing in ("nsp", "sop")):
        required["sentences"] = "punctuation"
    return about.model_copy(update=required)


def _save_description(output: Path, about: Description) -> None:
    with atomic_file(output / DESCRIPTION) as file:
        file.write(description_yaml(about).encode())


def recorded_options(options: PackOptions, about: Description | None, named: bool) -> dict[str, Any]:
    """Packing options and description, as recorded in build.json."""
    record: dict[str, Any] = {"packing": options.packing, "columns": list(options.columns)}
    record["bins"] = list(options.bins[:-1])
    if options.packing in ("nsp", "sop"):
        record["pair_probability"] = options.probability
    if about is not None and named:
        # Without the paths: input files may be moved between runs, but must be the same files.
        record["description"] = about.model_dump(mode="json", exclude={"sources": {"__all__": {"inputs"}}})
    return record


def _task_arguments(about: Description) -> dict[str, Any]:
    tasks = about.documents.decontaminate
    return {"decontaminate": task_digests(tasks)} if tasks else {}


def pack_options(
    sequence_length: int,
    packing: str,
    bins: Sequence[int],
    probability: float,
    columns: Sequence[str],
    seed: int,
    shard_size: float,
) -> PackOptions:
    """Validated packing options, without weights. Raises CorpusError naming the argument and the rule."""
    least, pairs = MIN_SEQUENCE_LENGTH, packing in ("nsp", "sop")
    bins = (*bins, sequence_length)
    rising = all(a < b for a, b in itertools.pairwise(bins))
    _check_rules(
        (
            (
                least <= sequence_length <= MAX_LENGTH,
                "sequence length",
                sequence_length,
                f"from {least} to {MAX_LENGTH:,}",
            ),
            (sequence_length < 2**16 or not pairs, "sequence length", sequence_length, "below 65,536 for pairs"),
            (packing in PACKINGS, "packing", packing, f"one of {', '.join(PACKINGS)}"),
            (len(bins) == 1 or packing == "documents", "bins", bins[:-1], "omitted: only packing documents uses them"),
            (
                rising and bins[0] >= least,
                "bins",
                bins[:-1],
                f"ascending, from {least} to below the sequence length",
            ),
            (0 < probability < 1, "pair probability", probability, "above 0 and below 1"),
            (set(columns) <= set(PLANES), "columns", ", ".join(columns), f"of {', '.join(PLANES)}"),
            (0 < shard_size <= _MAX_MB, "shard size", shard_size, f"above 0 and at most {_MAX_MB:g} (MB)"),
        )
    )
    ordered = tuple(plane for plane in PLANES if plane in columns)
    return PackOptions(sequence_length, packing, bins, probability, ordered, (), seed, shard_size)


def check_source_arguments(workers: int, seed: int, held_out: float, documents: str, work_size: float | None) -> None:
    """Raise CorpusError for an argument out of range, naming it and the rule."""
    _check_rules(
        (
            (1 <= workers <= MAX_WORKERS, "workers", workers, f"from 1 to {MAX_WORKERS:,}"),
            (0 <= seed < 2**63, "seed", seed, "from 0 to 2^63 - 1"),
            (0 <= held_out < 1, "held-out share", held_out, "from 0 to below 1"),
            (documents in DOCUMENTS, "documents", documents, f"one of {', '.join(DOCUMENTS)}"),
            (
                work_size is None or 0 < work_size <= _MAX_MB,
                "work size",
                work_size,
                f"above 0 and at most {_MAX_MB:g} (MB)",
            ),
        )
    )


def _check_rules(rules: Sequence[tuple[bool, str, Any, str]]) -> None:
    for holds, name, value, rule in rules:
        if not holds:
            raise CorpusError(f"{name} {value!r}: must be {rule}")
