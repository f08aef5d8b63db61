"""Checks of a job's corpora before submission, and of a job that builds one.

Reads manifests only, so that their errors are reported before the job waits in the queue; the training verifies every
shard when it starts.
"""

import argparse
import contextlib
import glob
import io
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.phases import phases_ahead
from cluster.slurm.script import SlurmError
from data_pipeline.__main__ import command_parser
from data_pipeline.files import CorpusError
from data_pipeline.hub import TOKENIZER_FILES, local_folder
from data_pipeline.manifest import HELD_OUT, MANIFEST, Manifest, read_manifest
from data_pipeline.outputs import claim_arguments
from data_pipeline.sources.description import read_description
from maskvr_ds.config import ConfigError, ModelConfig, RunConfig
from maskvr_ds.data.vocabulary import token_ids
from maskvr_ds.models.initial_folder import weights_files

if TYPE_CHECKING:
    from data_pipeline.packing.parts import PackOptions


@dataclass(frozen=True)
class Build:
    """A corpus that a job will build.

    words: arguments of `data_pipeline build`. output: folder of the corpus. inputs: files and folders that the build
    reads, the tokenizer first. held_out: whether it creates a held-out split.
    """

    words: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]
    sequence_length: int
    held_out: bool


def parse_build(text: str) -> Build:
    """Parse the value of --build-data; a tokenizer named on a hub becomes its folder. Raises SlurmError for arguments
    and inputs that the build would reject."""
    output = io.StringIO()
    try:
        words = shlex.split(text)
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            arguments = command_parser().parse_args(["build", *words])
    except ValueError as error:
        raise SlurmError(f"--build-data {text!r}: {error}") from None
    except SystemExit:
        raise SlurmError(f"--build-data {text!r}: {output.getvalue().strip().splitlines()[-1]}") from None
    try:
        # The job is given the folder: its node may have no access to the hub.
        tokenizer = str(local_folder(arguments.tokenizer, TOKENIZER_FILES, "--tokenizer"))
        if tokenizer != arguments.tokenizer:
            arguments.tokenizer = tokenizer
            words += ["--tokenizer", tokenizer]  # the last one counts
        inputs = tuple(_input_paths(arguments))
        _check_build(arguments)
    except CorpusError as error:
        raise SlurmError(f"--build-data: {error}") from None
    return Build(
        words=tuple(words),
        output=Path(arguments.output).absolute(),
        inputs=inputs,
        sequence_length=arguments.sequence_length,
        held_out=arguments.held_out > 0,
    )


def _input_paths(arguments: argparse.Namespace) -> Iterator[Path]:
    """Inputs of a build; of a glob, the folder above the pattern. Raises SlurmError if one is missing."""
    items = [arguments.tokenizer, *(arguments.input or ())]
    if arguments.description is not None:
        # Its paths are relative to its own folder.
        description = read_description(arguments.description)
        items += [arguments.description, *(item for source in description.sources for item in source.inputs)]
        items += description.documents.decontaminate
    for item in items:
        path = Path(os.path.abspath(item))  # noqa: PTH100, removes ".." without resolving links
        if not path.exists() and not glob.glob(str(path), recursive=True):  # noqa: PTH207
            raise SlurmError(f"--build-data: {item}: no such file or folder; correct the path")
        while not path.exists():
            path = path.parent
        yield path


def _check_build(given: argparse.Namespace) -> None:
    """Raise CorpusError if the build would reject its arguments, tokenizer or output folder."""
    # Imported here: most submissions build nothing.
    from data_pipeline import build
    from data_pipeline.tokenization.tokenizer import fingerprint

    build.Safeguards(given.max_record, given.max_expansion, given.max_unknown).limits()
    build.check_source_arguments(
        given.workers, given.seed, given.held_out, given.documents, given.work_size, given.held_out_by
    )
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
            f"{tokenizer}: no tokenizer there (neither tokenizer.json nor vocab.txt); correct the path, or train one "
            "with `python -m data_pipeline tokenizer`"
        )
    output = Path(given.output)
    if output.exists() and not output.is_dir():
        raise CorpusError(f"{output}: is a file, the output must be a folder; choose another")
    # An empty folder, or one with hidden files only, is accepted by the build; `claim_arguments` would write to it.
    if output.is_dir() and not all(item.name.startswith(".") for item in output.iterdir()):
        claim_arguments(output, _claimed(given, options, digest))


def _claimed(given: argparse.Namespace, options: "PackOptions", tokenizer: str) -> dict[str, Any]:
    """The content of build.json for these arguments and inputs, except what the build derives from other data."""
    from data_pipeline import build
    from data_pipeline.tokenization.stage import find_groups

    about, named = build.resolve_description(
        given.input, given.description, given.documents, given.text_field, given.no_text, given.bad_records
    )
    about = build.with_required_planes(about, given.columns, given.packing)
    groups = find_groups(about, (Path(given.output), Path(given.tokenizer)), named)
    same = ("sequence_length", "seed", "held_out", "documents", "text_field", "shard_size")
    return {
        **{name: getattr(given, name) for name in same},
        "tokenizer": tokenizer,
        "sources": [[source.name, source.bytes] for files in groups for source in files],
        **build.recorded_options(options, about, named),
        **build.recorded_split(given.held_out_by),
    }


@dataclass(frozen=True)
class _Corpus:
    """A corpus that a phase reads. manifest: None if it will be built. pad: id of the padding token, None if so."""

    path: Path
    sequence_length: int
    manifest: Manifest | None

    @property
    def pad(self) -> int | None:
        return None if self.manifest is None else self.manifest.special_tokens.pad


def check_corpora(config: RunConfig, build: Build | None = None, runs: Sequence[Path] = ()) -> None:
    """Raise ConfigError if a corpus of the training is missing, exceeds the model's maximum sequence length, or has
    another sequence length or tokenizer than the others. build: a corpus that will exist when the training starts.
    runs: as for `phases_ahead`."""
    tokenizer: tuple[Path, str] | None = None
    for where, phase in phases_ahead(config, runs):
        corpora = [_find(where, path, build) for path in _opened(phase)]
        length = corpora[0].sequence_length
        for corpus in corpora:
            if fault := phase.model.row_fault(corpus.sequence_length, corpus.pad):
                raise ConfigError(f"{where}{corpus.path}: {fault}")
            if corpus.sequence_length != length:
                raise ConfigError(
                    f"{where}{corpus.path}: sequences of {corpus.sequence_length} tokens, those of {corpora[0].path} "
                    f"have {length}; build all corpora of a phase, including held-out ones, with one sequence length"
                )
            if corpus.manifest is None:
                continue
            digest = corpus.manifest.tokenizer_sha256
            tokenizer = tokenizer or (corpus.path, digest)
            if digest != tokenizer[1]:
                raise ConfigError(
                    f"{where}{corpus.path}: tokenizer {digest[:12]} differs from {tokenizer[1][:12]} of "
                    f"{tokenizer[0]}; build all corpora of a run with one tokenizer"
                )


def check_initial_model(model: ModelConfig, build: Build) -> None:
    """Raise ConfigError if the model of initialize_from is missing, or its tokens are not those of the corpus that will
    be built; `file_faults` compares those of a corpus that exists."""
    folder = model.initialize_from
    if folder is None:
        return
    weights_files(folder)
    ours, theirs = token_ids(build.inputs[0]), token_ids(folder)
    if model.vocabulary == "same" and None not in (ours, theirs) and ours != theirs:
        raise ConfigError(
            f"--build-data: the token ids of {build.inputs[0]} differ from those of model.initialize_from {folder}; "
            f"build the corpus with --tokenizer {folder}, or set model.vocabulary to extend or match"
        )


def _opened(phase: RunConfig) -> list[Path]:
    """Corpora of a phase, including held-out ones if the phase evaluates."""
    paths = [entry.path for entry in phase.data.corpora]
    held_out = [phase.data.held_out_path] if phase.data.held_out_path else [path / HELD_OUT for path in paths]
    return [path.absolute() for path in (*paths, *(held_out if phase.evaluation.every_steps else ()))]


def _find(where: str, path: Path, build: Build | None) -> _Corpus:
    if build is not None and path.resolve() == build.output.resolve():
        return _Corpus(path, build.sequence_length, None)
    if build is not None and path.resolve() == (build.output / HELD_OUT).resolve():
        if not build.held_out:
            raise ConfigError(
                f"{where}{path}: --build-data creates no held-out corpus; add --held-out to it, set "
                "data.held_out_path, or evaluation.every_steps=0"
            )
        return _Corpus(path, build.sequence_length, None)
    if not (path / MANIFEST).is_file():
        what = "held-out corpus" if path.name == HELD_OUT else "corpus"
        remedy = "build it with --held-out, set data.held_out_path, or evaluation.every_steps=0"
        if path.name != HELD_OUT:
            remedy = "correct the path, build it first, or build it with --build-data"
        raise ConfigError(f"{where}{path}: no {what} there ({MANIFEST} is missing); {remedy}")
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from None
    return _Corpus(path, manifest.sequence_length, manifest)
