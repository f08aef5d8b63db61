"""Raw text to a corpus, in two stages, each on any number of processes and each resumable.

1. `tokenizing`: every unit of work (a part of the inputs, see `sources`) becomes a token shard (`tokens`);
2. `pack`: token shards become rows.

`build` does both, `tokenize` and `pack` one each: tokenise once, pack many. Rows are in the order of the documents on
disk; the trainer reads them in the order of a keyed permutation.

While it works, an output folder also holds

    build.json         the arguments and the inputs (names, sizes): another command on this folder is refused. It stays.
    description.yaml   what the corpus is made of, where that was given. It stays.
    .build/            token shards (`build`), rows, and a result file for every finished task: what a killed build goes
                       on from

The same command again goes on where a killed one stopped and ends with the same bytes. The manifest comes last. An
input is known by name, size and modification time during the build, and where only the time is another, by the SHA-256
that goes into the manifest; a task file by its SHA-256.
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
from data_pipeline.tokenization.stage import default_work_size, find_groups, tokenize_stage
from data_pipeline.tokenization.token_shards import PLANES, TOKENS_VERSION, TokenManifest, read_tokens
from data_pipeline.tokenization.tokenizer import copy_tokenizer, fingerprint

MIN_SEQUENCE_LENGTH = 8
_MOST_MB = 1e12  # as bits still below 2^63


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
    """Build a corpus of rows of `sequence_length` token ids, and return its manifest.

    inputs: files, folders and globs of .txt, .jsonl (also .gz, .zst) and .parquet, taken in the order of
    their names, or None where `description` names a YAML file (`description`); tokenizer: a Hugging Face tokenizer
    folder, copied to output/tokenizer; documents: how .txt
    files hold them ("blank-line", "line", "file"); text_field: JSON field or parquet column; workers:
    processes. held_out: this share of the documents, chosen by a hash of `seed` and the text, goes to a
    corpus of its own in output/held_out. packing: "full_sequences", "documents" (with length bins), "nsp", "sop" (with
    pair_probability); columns: "word_start", "sentence_start" to store. shard_size: MB a shard; work_size: MB of text
    a unit of work (it does not change the output), None: `default_work_size`. progress: True or False shows or hides
    the bar, None shows it on a terminal.

    team: the ranks of an mpirun, of which this is rank 0 (`mpi`).

    `output` must be new, empty, or hold an unfinished (or finished) build of the same arguments and inputs.
    With `workers` > 1 call it from under `if __name__ == "__main__":`, as always with multiprocessing.
    Raises CorpusError for faulty input, arguments, folder, or a full disk: what is finished then stays for
    the next run, and nothing half-written stands under a final name.
    """
    output = Path(output)
    check_source_arguments(workers, seed, held_out, documents, work_size)
    options = pack_options(sequence_length, packing, bins, pair_probability, columns, seed, shard_size)
    about, named = described(inputs, description, documents, text_field)
    about = with_needs(about, columns, packing)
    # A tokenizer's vocab.txt is no text, nor is the copy of it in an output folder among the inputs.
    groups = find_groups(about, (output, Path(tokenizer)), named)
    work_size = work_size or default_work_size(groups)
    options = _with_weights(options, tuple(section.weight for section in about.sources))
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
            "sources": [[source.name, source.bytes] for files in groups for source in files],
        }
        | new_arguments(options, about, named)
        | _task_arguments(about)
    )
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            shutil.rmtree(work)
            manifest = finished_corpus(output, held_out > 0)
            check_inputs(output, manifest.sources, list(itertools.chain(*groups)))
            return manifest
        copy_tokenizer(tokenizer, output / TOKENIZER)
        total = sum(source.bytes for files in groups for source in files)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers, team) as pool:
            tokens = tokenize_stage(
                work,
                work,
                output / TOKENIZER,
                about,
                groups,
                named=named,
                keys=named,
                held_out=held_out,
                seed=seed,
                work_size=work_size,
                pool=pool,
                bar=bar,
            )
            if named:
                _save_description(output, about)
            manifest = _pack_sides(work, tokens, output, output / TOKENIZER, work, options, pool, bar)
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
    """Write token shards of all documents into `output`, for `pack`. Arguments, resuming and errors as `build`.

    Word starts are stored, and sentences as the description says ("punctuation" where it does not). `work_size`: MB
    of text a token shard, None: `default_work_size`; corpora packed of them do not depend on it.
    """
    output = Path(output)
    check_source_arguments(workers, seed, held_out, documents, work_size)
    about, named = described(inputs, description, documents, text_field)
    about = about.model_copy(update={"word_starts": True, "sentences": about.sentences or "punctuation"})
    groups = find_groups(about, (output, Path(tokenizer)), named)
    work_size = work_size or default_work_size(groups)
    arguments = {
        "tokens_version": TOKENS_VERSION,
        "seed": seed,
        "held_out": held_out,
        "work_size": work_size,
        "description": about.model_dump(mode="json", exclude={"sources": {"__all__": {"inputs"}}}),
        "tokenizer": fingerprint(tokenizer),
        "sources": [[source.name, source.bytes] for files in groups for source in files],
    } | _task_arguments(about)
    with claim(output, arguments) as work:
        if (output / MANIFEST).exists():
            shutil.rmtree(work)
            manifest = read_tokens(output)
            check_inputs(output, manifest.sources, list(itertools.chain(*groups)))
            return manifest
        copy_tokenizer(tokenizer, output / TOKENIZER)
        total = sum(source.bytes for files in groups for source in files)
        with ProgressBar(total, "tokenise", progress) as bar, Pool(workers, team) as pool:
            if named:
                _save_description(output, about)
            manifest = tokenize_stage(
                output,
                work,
                output / TOKENIZER,
                about,
                groups,
                named=named,
                keys=True,
                held_out=held_out,
                seed=seed,
                work_size=work_size,
                pool=pool,
                bar=bar,
            )
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
    """Pack a folder of token shards to a corpus, and return its manifest; what was held out goes to output/held_out.

    weights: of sources, by name, instead of the description's. Other arguments, resuming and errors as `build`, and
    CorpusError where the token shards are not whole or lack what the packing needs.
    """
    tokens, output = Path(tokens), Path(output)
    _check_rules(((workers >= 1, "workers", workers, "at least 1"),))
    manifest = read_tokens(tokens)
    options = pack_options(sequence_length, packing, bins, pair_probability, columns, manifest.seed, shard_size)
    needed = {*columns, *(("sentence_start",) if packing in ("nsp", "sop") else ())}
    if missing := sorted(needed - set(manifest.planes)):
        raise CorpusError(f"{tokens}: has no {missing[0]}. Tokenise with the command tokenize, or pack without it")
    for name, weight in (weights or {}).items():
        if name not in manifest.names:
            raise CorpusError(f"weight of {name!r}: {tokens} has the sources {', '.join(manifest.names)}")
        _check_rules(((0 < weight <= MAX_WEIGHT, f"weight of {name!r}", weight, f"above 0 and at most {MAX_WEIGHT}"),))
    given = zip(manifest.names, manifest.weights, strict=True)
    options = _with_weights(options, tuple((weights or {}).get(name, weight) for name, weight in given))
    arguments = {
        "schema_version": SCHEMA_VERSION,
        "sequence_length": sequence_length,
        "shard_size": shard_size,
        "weights": list(options.weights),
        "tokens": sha256_file(tokens / MANIFEST),
    } | new_arguments(options, None, False)
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
    # The corpus itself comes last: its manifest says that all of this is complete.
    for side in reversed(manifest.sides):
        folder = output if side == "train" else output / HELD_OUT
        result = pack_side(tokens, manifest, side, folder, work, tokenizer, options, pool, bar)
    return result


def described(
    inputs: Sequence[str | Path] | None, description: str | Path | None, documents: str, text_field: str
) -> tuple[Description, bool]:
    """The description, and whether it was given (its sources then have names)."""
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


def with_needs(about: Description, columns: Collection[str], packing: str) -> Description:
    """The description with what columns and packing need of the tokens."""
    needs: dict[str, Any] = {"word_starts": True} if "word_start" in columns else {}
    if about.sentences is None and ("sentence_start" in columns or packing in ("nsp", "sop")):
        needs["sentences"] = "punctuation"
    return about.model_copy(update=needs)


def _save_description(output: Path, about: Description) -> None:
    with atomic_file(output / DESCRIPTION) as file:
        file.write(description_yaml(about).encode())


def new_arguments(options: PackOptions, about: Description | None, named: bool) -> dict[str, Any]:
    """What a plain build does not have, left out of its build.json."""
    found: dict[str, Any] = {"packing": options.packing, "columns": list(options.columns)}
    found["bins"] = list(options.bins[:-1])
    if options.packing in ("nsp", "sop"):
        found["pair_probability"] = options.probability
    if about is not None and named:
        # Where the files lie may change between two runs, which they are may not.
        found["description"] = about.model_dump(mode="json", exclude={"sources": {"__all__": {"inputs"}}})
    return found


def _task_arguments(about: Description) -> dict[str, Any]:
    tasks = about.documents.decontaminate
    return {"decontaminate": task_digests(tasks)} if tasks else {}


def _with_weights(options: PackOptions, weights: tuple[float, ...]) -> PackOptions:
    return replace(options, weights=weights)


def pack_options(
    sequence_length: int,
    packing: str,
    bins: Sequence[int],
    probability: float,
    columns: Sequence[str],
    seed: int,
    shard_size: float,
) -> PackOptions:
    least, pairs = MIN_SEQUENCE_LENGTH, packing in ("nsp", "sop")
    bins = (*bins, sequence_length)
    rises = all(a < b for a, b in itertools.pairwise(bins))
    _check_rules(
        (
            (sequence_length >= least, "sequence length", sequence_length, f"at least {least}"),
            (sequence_length < 2**16 or not pairs, "sequence length", sequence_length, "below 65,536 for pairs"),
            (packing in PACKINGS, "packing", packing, f"one of {', '.join(PACKINGS)}"),
            (len(bins) == 1 or packing == "documents", "bins", bins[:-1], "left out: only packing documents has them"),
            (rises and bins[0] >= least, "bins", bins[:-1], f"ascending, from {least} to below the sequence length"),
            (0 < probability < 1, "pair probability", probability, "above 0 and below 1"),
            (set(columns) <= set(PLANES), "columns", ", ".join(columns), f"of {', '.join(PLANES)}"),
            (0 < shard_size <= _MOST_MB, "shard size", shard_size, f"above 0 and at most {_MOST_MB:g} (MB)"),
        )
    )
    ordered = tuple(plane for plane in PLANES if plane in columns)
    return PackOptions(sequence_length, packing, bins, probability, ordered, (), seed, shard_size)


def check_source_arguments(workers: int, seed: int, held_out: float, documents: str, work_size: float | None) -> None:
    _check_rules(
        (
            (workers >= 1, "workers", workers, "at least 1"),
            (0 <= seed < 2**63, "seed", seed, "from 0 to 2^63 - 1"),
            (0 <= held_out < 1, "held-out share", held_out, "from 0 to below 1"),
            (documents in DOCUMENTS, "documents", documents, f"one of {', '.join(DOCUMENTS)}"),
            (
                work_size is None or 0 < work_size <= _MOST_MB,
                "work size",
                work_size,
                f"above 0 and at most {_MOST_MB:g} (MB)",
            ),
        )
    )


def _check_rules(rules: Sequence[tuple[bool, str, Any, str]]) -> None:
    for holds, name, value, rule in rules:
        if not holds:
            raise CorpusError(f"{name} {value!r}: must be {rule}")
