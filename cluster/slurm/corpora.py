"""Corpora of a job: whether they are there and fit the run, and what a job that builds one reads and writes.

The training checks more (every shard) at its start; here manifests alone are read, so that what they tell is told
before a job waits in the queue for it.
"""

import argparse
import contextlib
import glob
import io
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.slurm.script import SlurmError
from data_pipeline.__main__ import command_parser
from data_pipeline.files import CorpusError
from data_pipeline.manifest import HELD_OUT, MANIFEST, Manifest, read_manifest
from data_pipeline.outputs import claim_arguments
from data_pipeline.sources.description import read_description
from maskvr_ds.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from data_pipeline.packing.stage import PackOptions


@dataclass(frozen=True)
class Build:
    """A corpus that a job will build. words: arguments of `data_pipeline build`; output: where; reads: files and
    folders; sequence_length, held_out: what it will have."""

    words: tuple[str, ...]
    output: Path
    reads: tuple[Path, ...]
    sequence_length: int
    held_out: bool


def parse_build(text: str) -> Build:
    """The arguments of --build-data. Raises SlurmError for what `data_pipeline build` would not take or not find."""
    said = io.StringIO()
    try:
        words = shlex.split(text)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            arguments = command_parser().parse_args(["build", *words])
    except ValueError as error:
        raise SlurmError(f"--build-data {text!r}: {error}") from None
    except SystemExit:
        raise SlurmError(f"--build-data {text!r}: {said.getvalue().strip().splitlines()[-1]}") from None
    try:
        reads = tuple(_reads(arguments))
        _check_build(arguments)
    except CorpusError as error:
        raise SlurmError(f"--build-data: {error}") from None
    return Build(
        words=tuple(words),
        output=Path(arguments.output).absolute(),
        reads=reads,
        sequence_length=arguments.sequence_length,
        held_out=arguments.held_out > 0,
    )


def _reads(arguments: argparse.Namespace) -> Iterator[Path]:
    """Files and folders, of globs the folder above their patterns. Raises SlurmError where one is not there."""
    items = [arguments.tokenizer, *(arguments.input or ())]
    if arguments.description is not None:
        # Paths in it begin at its own folder.
        description = read_description(arguments.description)
        items += [arguments.description, *(item for source in description.sources for item in source.inputs)]
        items += description.documents.decontaminate
    for item in items:
        path = Path(os.path.abspath(item))  # noqa: PTH100, of ".." in a description too
        if not path.exists() and not glob.glob(str(path), recursive=True):  # noqa: PTH207
            raise SlurmError(f"--build-data: {item}: no such file or folder; correct the path")
        while not path.exists():
            path = path.parent
        yield path


def _check_build(given: argparse.Namespace) -> None:
    """Raise CorpusError where the build itself would refuse its arguments, tokenizer or output folder."""
    # Imported late: most submissions build nothing.
    from data_pipeline import build
    from data_pipeline.tokenization.tokenizer import fingerprint

    build.check_source_arguments(given.workers, given.seed, given.held_out, given.documents, given.work_size)
    options = build.pack_options(
        given.sequence_length,
        given.packing,
        given.bins,
        given.pair_probability,
        given.columns,
        given.seed,
        given.shard_size,
    )
    tokenizer = Path(given.tokenizer)
    digest = fingerprint(tokenizer)
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise CorpusError(
            f"{tokenizer}: no tokenizer there (neither tokenizer.json nor vocab.txt); correct the path, or make one "
            "with `python -m data_pipeline tokenizer`"
        )
    output = Path(given.output)
    if output.exists() and not output.is_dir():
        raise CorpusError(f"{output}: is a file, the output must be a folder; name another")
    # Of an empty folder, or one with hidden leftovers alone, the build decides: asking would claim it.
    if output.is_dir() and not all(item.name.startswith(".") for item in output.iterdir()):
        claim_arguments(output, _claimed(given, options, digest))


def _claimed(given: argparse.Namespace, options: "PackOptions", tokenizer: str) -> dict[str, Any]:
    """What a build.json says of these arguments and inputs, as far as it need not be derived from other things."""
    from data_pipeline import build
    from data_pipeline.tokenization.stage import find_groups

    about, named = build.resolve_description(given.input, given.description, given.documents, given.text_field)
    about = build.with_required_planes(about, given.columns, given.packing)
    groups = find_groups(about, (Path(given.output), Path(given.tokenizer)), named)
    same = ("sequence_length", "seed", "held_out", "documents", "text_field", "shard_size")
    return {
        **{name: getattr(given, name) for name in same},
        "tokenizer": tokenizer,
        "sources": [[source.name, source.bytes] for files in groups for source in files],
        **build.recorded_options(options, about, named),
    }


@dataclass(frozen=True)
class _Corpus:
    """One that a phase reads; manifest: None where it is yet to be built."""

    path: Path
    sequence_length: int
    manifest: Manifest | None


def check_corpora(config: RunConfig, build: Build | None = None) -> None:
    """Raise ConfigError where a corpus that the training opens is not there, its rows are longer than the model takes,
    or its rows or tokenizer do not go with the others'. build: of one that will be there by then."""
    tokenizer: tuple[Path, str] | None = None
    for index in range(max(1, len(config.phases))):
        phase = config.phase(index)
        where = f"phase {config.phases[index].name!r}: " if config.phases else ""
        corpora = [_find(where, path, build) for path in _opened(phase)]
        most, length = phase.model.max_position_embeddings, corpora[0].sequence_length
        for corpus in corpora:
            if corpus.sequence_length > most:
                raise ConfigError(
                    f"{where}{corpus.path}: sequences of {corpus.sequence_length} tokens exceed "
                    f"model.max_position_embeddings {most}"
                )
            if corpus.sequence_length != length:
                raise ConfigError(
                    f"{where}{corpus.path}: sequences of {corpus.sequence_length} tokens, those of {corpora[0].path} "
                    f"have {length}; build the corpora of a phase, held-out ones too, with one sequence length"
                )
            if corpus.manifest is None:
                continue
            theirs = corpus.manifest.tokenizer_sha256
            tokenizer = tokenizer or (corpus.path, theirs)
            if theirs != tokenizer[1]:
                raise ConfigError(
                    f"{where}{corpus.path}: tokenizer {theirs[:12]} differs from {tokenizer[1][:12]} of "
                    f"{tokenizer[0]}; build all corpora of a run with one tokenizer"
                )


def _opened(phase: RunConfig) -> list[Path]:
    """The corpora of a phase, the held-out ones where they are evaluated on."""
    paths = [entry.path for entry in phase.data.corpora]
    held_out = [phase.data.held_out_path] if phase.data.held_out_path else [path / HELD_OUT for path in paths]
    return [path.absolute() for path in (*paths, *(held_out if phase.evaluation.every_steps else ()))]


def _find(where: str, path: Path, build: Build | None) -> _Corpus:
    if build is not None and path.resolve() == build.output.resolve():
        return _Corpus(path, build.sequence_length, None)
    if build is not None and path.resolve() == (build.output / HELD_OUT).resolve():
        if not build.held_out:
            raise ConfigError(
                f"{where}{path}: --build-data makes no held-out corpus; add --held-out to it, set data.held_out_path, "
                "or evaluation.every_steps=0"
            )
        return _Corpus(path, build.sequence_length, None)
    if not (path / MANIFEST).is_file():
        what = "held-out corpus" if path.name == HELD_OUT else "corpus"
        remedy = "build with --held-out, set data.held_out_path, or evaluation.every_steps=0"
        if path.name != HELD_OUT:
            remedy = "correct the path, build it first, or have it built by --build-data"
        raise ConfigError(f"{where}{path}: no {what} there ({MANIFEST} is missing); {remedy}")
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from None
    return _Corpus(path, manifest.sequence_length, manifest)
