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

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.arguments import (
    PAIR_PROBABILITY,
    SAFEGUARDS,
    Safeguards,
    check_rules,
    check_source_arguments,
    pack_options,
    recorded_description,
    recorded_options,
    resolve_description,
    with_required_planes,
)
from data_pipeline.checksums import is_hashed, not_hashed
from data_pipeline.execution.file_checks import check_files
from data_pipeline.execution.mpi import Team
from data_pipeline.execution.progress import ProgressBar
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError, atomic_file, sha256_file
from data_pipeline.filters.ngrams import task_digests
from data_pipeline.hub import TOKENIZER_FILES, local_folder
from data_pipeline.manifest import DESCRIPTION, HELD_OUT, MANIFEST, SCHEMA_VERSION, TOKENIZER
from data_pipeline.numbers import MAX_WORKERS
from data_pipeline.outputs import check_inputs, claim, finished_corpus
from data_pipeline.packing.parts import PackOptions
from data_pipeline.packing.stage import pack_side
from data_pipeline.shards import Manifest
from data_pipeline.sources.description import MAX_WEIGHT, Description, description_yaml
from data_pipeline.tokenization.documents import describe_documents, warn_of_paragraphs
from data_pipeline.tokenization.stage import REBUILD, TokenizeOptions, default_work_size, find_groups, tokenize_stage
from data_pipeline.tokenization.token_shards import (
    TOKENS_REMEDY,
    TOKENS_VERSION,
    TokenManifest,
    read_tokens,
    token_hashes,
)
from data_pipeline.tokenization.tokenizer import copy_tokenizer, fingerprint, pair_separators
from data_pipeline.tokenization.unknown import describe_unknown

_logger = logging.getLogger(__name__)


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
    held_out_by: str = "document",
    documents: str = "blank-line",
    text_field: str = "text",
    no_text: str = "error",
    bad_records: str = "error",
    packing: str = "full_sequences",
    bins: Sequence[int] = (),
    pair_probability: float = PAIR_PROBABILITY,
    columns: Sequence[str] = (),
    shard_size: float = 128.0,
    work_size: float | None = None,
    safeguards: Safeguards = SAFEGUARDS,
    report: Callable[[str], object] | None = None,
    progress: bool | None = None,
    team: Team | None = None,
) -> Manifest:
    """Build a corpus with rows of `sequence_length` token ids, and return its manifest.

    inputs: files, folders and globs (types: sources/inputs.py), read in the order of their names; None if
    `description` is the path of a YAML file (sources/description.py). tokenizer: Hugging Face tokenizer folder, or
    a name on a hub (hub.py), copied to output/tokenizer. held_out: share of documents, selected by a hash of `seed`
    and the text, that becomes a separate corpus in output/held_out; with held_out_by "file", share of the files (at
    least one), selected by a hash of `seed` and the name, with all their documents. documents: how .txt and .md
    files are split ("blank-line", "line", "file"); text_field: field or column; no_text, bad_records: "error", or
    "skip" such records of `inputs` and count them. packing: "full_sequences", "documents" (with length bins), "nsp"
    or "sop" (with pair_probability). columns: "word_start", "sentence_start" to store. shard_size: MB per shard.
    work_size: MB of text per unit of work, without effect on the output; None: `default_work_size`. report: called
    with what was taken, and with the share of unknown tokens, in words. progress: show the bar, None: on a
    terminal. team: MPI ranks, with this process as rank 0 (execution/mpi.py).

    `output` must be new, empty, or contain an unfinished or finished build with the same arguments and inputs.
    With `workers` > 1, call under `if __name__ == "__main__":`, as usual with multiprocessing.
    Raises CorpusError for invalid inputs, arguments or output folder, and for a full disk; finished tasks are kept for
    the next run, and no incomplete file appears under its final name.
    """
    output, limits = Path(output), safeguards.limits()
    check_source_arguments(workers, seed, held_out, documents, work_size, held_out_by)
    tokenizer = local_folder(tokenizer, TOKENIZER_FILES, "tokenizer")
    packed = pack_options(sequence_length, packing, bins, pair_probability, columns, seed, shard_size)
    about, named = resolve_description(inputs, description, documents, text_field, no_text, bad_records)
    about = with_required_planes(about, columns, packing)
    packed = replace(packed, weights=tuple(section.weight for section in about.sources))
    # Skip vocab.txt of the tokenizer, and of its copy in an output folder below the inputs.
    groups = find_groups(about, (output, Path(tokenizer)), named)
    work_size = work_size or default_work_size(groups)
    options = TokenizeOptions(
        about, groups, output / TOKENIZER, named, named, held_out, seed, work_size, limits, safeguards.max_unknown
    )
    options = replace(options, held_out_by=held_out_by)
    arguments = _build_arguments(options, packed, documents, text_field, tokenizer)
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            manifest = finished_corpus(output, held_out > 0)
            check_inputs(output, manifest.sources, options.files)
            return manifest
        copy_tokenizer(tokenizer, output / TOKENIZER)
        if packing in ("nsp", "sop"):
            pair_separators(output / TOKENIZER)  # refuse before tokenization
        total = sum(source.bytes for source in options.files)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers, team) as pool:
            tokens = tokenize_stage(work, work, options, pool, bar)
            if report:
                report(f"{describe_documents(tokens)}, {describe_unknown(tokens)}")
            warn_of_paragraphs(about, groups, tokens, held_out_by)
            if named:
                _save_description(output, about)
            _check_tokens(work, tokens, output / TOKENIZER, work, pool, bar, REBUILD)
            manifest = _pack_sides(work, tokens, output, output / TOKENIZER, work, packed, pool, bar)
    return manifest


def _build_arguments(
    options: TokenizeOptions, packed: PackOptions, documents: str, text_field: str, tokenizer: str | Path
) -> dict[str, Any]:
    """The arguments of `build`, as recorded in build.json."""
    return (
        {
            "schema_version": SCHEMA_VERSION,
            "sequence_length": packed.sequence_length,
            "seed": options.seed,
            "held_out": options.held_out,
            "documents": documents,
            "text_field": text_field,
            "shard_size": packed.shard_size,
            "work_size": options.work_size,
            "tokenizer": fingerprint(tokenizer),
            "sources": [[source.name, source.bytes] for source in options.files],
        }
        | recorded_options(packed, options.description, options.named)
        | recorded_split(options.held_out_by)
        | _task_arguments(options.description)
    )


def tokenize(
    inputs: Sequence[str | Path] | None,
    tokenizer: str | Path,
    output: str | Path,
    *,
    description: str | Path | None = None,
    workers: int = 1,
    seed: int = 0,
    held_out: float = 0.0,
    held_out_by: str = "document",
    documents: str = "blank-line",
    text_field: str = "text",
    no_text: str = "error",
    bad_records: str = "error",
    work_size: float | None = None,
    safeguards: Safeguards = SAFEGUARDS,
    progress: bool | None = None,
    team: Team | None = None,
) -> TokenManifest:
    """Write token shards of all documents to `output`, for `pack`. Arguments, resuming and errors as in `build`.

    Word starts are stored, and sentence starts as set in the description (default "punctuation"). work_size: MB of text
    per token shard, None: `default_work_size`; it has no effect on the packed corpora.
    """
    output, limits = Path(output), safeguards.limits()
    check_source_arguments(workers, seed, held_out, documents, work_size, held_out_by)
    tokenizer = local_folder(tokenizer, TOKENIZER_FILES, "tokenizer")
    about, named = resolve_description(inputs, description, documents, text_field, no_text, bad_records)
    about = about.model_copy(update={"word_starts": True, "sentences": about.sentences or "punctuation"})
    groups = find_groups(about, (output, Path(tokenizer)), named)
    work_size = work_size or default_work_size(groups)
    options = TokenizeOptions(
        about, groups, output / TOKENIZER, named, True, held_out, seed, work_size, limits, safeguards.max_unknown
    )
    options = replace(options, held_out_by=held_out_by)
    arguments = (
        {
            "tokens_version": TOKENS_VERSION,
            "seed": seed,
            "held_out": held_out,
            "work_size": work_size,
            "description": recorded_description(about),
            "tokenizer": fingerprint(tokenizer),
            "sources": [[source.name, source.bytes] for source in options.files],
        }
        | recorded_split(held_out_by)
        | _task_arguments(about)
    )
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            manifest = read_tokens(output)
            check_inputs(output, manifest.sources, options.files)
            return manifest
        copy_tokenizer(tokenizer, output / TOKENIZER)
        total = sum(source.bytes for source in options.files)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers, team) as pool:
            if named:
                _save_description(output, about)
            manifest = tokenize_stage(output, work, options, pool, bar)
            warn_of_paragraphs(about, groups, manifest, held_out_by)
    return manifest


def pack(
    tokens: str | Path,
    sequence_length: int,
    output: str | Path,
    *,
    workers: int = 1,
    packing: str = "full_sequences",
    bins: Sequence[int] = (),
    pair_probability: float = PAIR_PROBABILITY,
    columns: Sequence[str] = (),
    weights: dict[str, float] | None = None,
    shard_size: float = 128.0,
    report: Callable[[str], object] | None = None,
    progress: bool | None = None,
    team: Team | None = None,
) -> Manifest:
    """Pack a folder of token shards into a corpus, with held-out documents in output/held_out; returns its manifest.

    weights: by source name, overriding those of the description. Other arguments, resuming and errors as in `build`;
    also raises CorpusError if the token shards are incomplete or lack a plane that the packing needs.
    """
    tokens, output = Path(tokens), Path(output)
    check_rules(((1 <= workers <= MAX_WORKERS, "workers", workers, f"from 1 to {MAX_WORKERS:,}"),))
    manifest = read_tokens(tokens)
    if not is_hashed(tokens / MANIFEST):
        _logger.warning("%s", not_hashed([tokens / MANIFEST]))
    options = pack_options(sequence_length, packing, bins, pair_probability, columns, manifest.seed, shard_size)
    needed = {*columns, *(("sentence_start",) if packing in ("nsp", "sop") else ())}
    if missing := sorted(needed - set(manifest.planes)):
        raise CorpusError(f"{tokens}: has no {missing[0]}. Run the command tokenize, or pack without it")
    for name, weight in (weights or {}).items():
        if name not in manifest.names:
            named = ", ".join(manifest.names) or "none with a name (only those of a description have names)"
            raise CorpusError(f"weight of {name!r}: unknown source, {tokens} has {named}")
        check_rules(((0 < weight <= MAX_WEIGHT, f"weight of {name!r}", weight, f"above 0 and at most {MAX_WEIGHT}"),))
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
            return finished_corpus(output, HELD_OUT in manifest.sides)
        if report:
            report(describe_unknown(manifest))
        copy_tokenizer(tokens / TOKENIZER, output / TOKENIZER, built=True)
        if (tokens / DESCRIPTION).exists() and not (output / DESCRIPTION).exists():
            with atomic_file(output / DESCRIPTION) as file:
                file.write((tokens / DESCRIPTION).read_bytes())
        with ProgressBar(0, "pack", progress) as bar, Pool(workers, team) as pool:
            _check_tokens(tokens, manifest, tokens / TOKENIZER, work, pool, bar, TOKENS_REMEDY)
            result = _pack_sides(tokens, manifest, output, tokens / TOKENIZER, work, options, pool, bar)
    return result


def _check_tokens(
    folder: Path, manifest: TokenManifest, tokenizer: Path, work: Path, pool: Pool, bar: ProgressBar, remedy: str
) -> None:
    """Compare tokenizer and token shards with their SHA-256 before packing. Raises CorpusError naming every bad
    file."""
    bar.phase("verify", manifest.bytes)
    sides = [shard.sides for shard in manifest.shards]
    hashes = [{str(tokenizer / "tokenizer.json"): manifest.tokenizer_sha256}, *token_hashes(folder, sides)]
    check_files(hashes, work, pool, bar.update, remedy)


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


def _save_description(output: Path, about: Description) -> None:
    with atomic_file(output / DESCRIPTION) as file:
        file.write(description_yaml(about).encode())


def recorded_split(held_out_by: str) -> dict[str, Any]:
    """Recorded only if set, so that what earlier versions started can be resumed."""
    return {} if held_out_by == "document" else {"held_out_by": held_out_by}


def _task_arguments(about: Description) -> dict[str, Any]:
    tasks = about.documents.decontaminate
    return {"decontaminate": task_digests(tasks)} if tasks else {}
