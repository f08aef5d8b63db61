"""Corpus descriptions: sources and document rules in one YAML file, for example

    sources:
      - name: wiki
        inputs: [extracted/]            # files, folders, globs; relative to this file
        format: wikiextractor
        weight: 2                       # each document is used twice
      - name: books
        inputs: ['books/*.jsonl.zst']
        text_field: body
      - name: hub
        inputs: [saved/]                # Dataset.save_to_disk
        format: dataset
      - name: tables
        inputs: ['tables/*.csv']
        format: builder:csv             # any builder of `datasets` that reads local files
    documents: {bad_bytes: replace, normalize: nfc, duplicates: near, min_characters: 200}
    sentences: punctuation

The order of the sources has no effect: they are sorted by name.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_pipeline.files import CorpusError
from data_pipeline.filters.rules import DocumentRules
from data_pipeline.sources.inputs import BUILDER, Source, find_sources
from data_pipeline.yaml_values import YamlError, parse_yaml

FORMATS = ("auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "wikiextractor", "dataset")
# "auto" goes by the suffix of each file; the other formats accept any file name.
_KINDS = {name: f".{name}" for name in FORMATS} | {"auto": "", "text": ".txt", "wikiextractor": ".wiki"}
MAX_WEIGHT = 1000
# Of the limits of a config: inputs may be a list of files.
_TIMES = 10


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSection(_Section):
    """One source of the mixture."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(description="plain name, unique")
    inputs: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="files, folders and globs")
    format: str = Field(
        default="auto", description=f"{', '.join(FORMATS)} or builder:NAME; auto goes by file name suffixes"
    )
    documents: Literal["blank-line", "line", "file"] = Field(
        default="blank-line", description="unit of a document in .txt and .md files"
    )
    text_field: str = Field(default="text", description="field or column that holds the text")
    split: str | None = Field(default=None, description="split to use, if format is dataset and several were saved")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=MAX_WEIGHT,
        description="number of times each document is used; 0.5: half of them, selected by hash",
    )

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FORMATS and not (value.startswith(BUILDER) and value.removeprefix(BUILDER).isidentifier()):
            raise ValueError(f"{value!r} is not one of {', '.join(FORMATS)}, builder:NAME")
        return value


class Description(_Section):
    """A corpus description."""

    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    documents: DocumentRules = DocumentRules()
    sentences: Literal["punctuation", "line"] | None = Field(
        default=None, description="store sentence starts: after punctuation, or at each line"
    )
    word_starts: bool = Field(default=False, description="store word starts")

    @model_validator(mode="after")
    def _unique(self) -> Description:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"source name {twice[0]!r} is not unique: rename one of the sources")
        return self

    def sorted(self) -> Description:
        return self.model_copy(update={"sources": tuple(sorted(self.sources, key=lambda source: source.name))})


def read_description(path: str | Path) -> Description:
    """Read and validate a YAML file; its paths are made absolute. Raises CorpusError naming the key and the rule."""
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path), times=_TIMES)
    except YamlError as error:
        raise CorpusError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise CorpusError(f"{path}: the key sources is required: a list, such as [{{name: a, inputs: [texts/]}}]")
    try:
        found = Description.model_validate(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A list whose only entry is invalid is also reported as empty.
        real = [
            e
            for e in faults
            if e["type"] != "too_short" or not any(o["loc"][: len(e["loc"])] == e["loc"] for o in faults if o is not e)
        ]
        raise CorpusError("\n".join(f"{path}: {_in_words(e)}" for e in real)) from None
    base = path.resolve().parent
    sources = tuple(
        source.model_copy(update={"inputs": tuple(_below(base, item) for item in source.inputs)})
        for source in found.sources
    )
    patterns = [_below(base, item) for item in found.documents.decontaminate]
    # A pattern without matches is kept, and later reported as a missing file.
    tasks = tuple(path for item in patterns for path in _matches(item))
    documents = found.documents.model_copy(update={"decontaminate": tasks})
    return found.model_copy(update={"sources": sources, "documents": documents}).sorted()


def _below(base: Path, item: str) -> str:
    """Absolute path or pattern of an item, with glob characters in the base folder escaped."""
    # The file is UTF-8, the names of files are bytes, whatever the encoding of the locale.
    item = os.fsdecode(item.encode("utf-8", "surrogateescape"))
    literal = (base / item).exists() or not glob.has_magic(item)
    return str(base / item if literal else Path(glob.escape(str(base))) / item)


def _matches(item: str) -> list[str]:
    if Path(item).exists():
        return [item]
    return sorted(glob.glob(item)) or [item]  # noqa: PTH207


def _in_words(fault: Any) -> str:
    """Format a pydantic error: key, rule, value."""
    where = ".".join(map(str, fault["loc"])) or "description"
    if fault["type"] == "extra_forbidden":
        sections: dict[Any, type[BaseModel]] = {"sources": SourceSection, "documents": DocumentRules}
        section = sections[fault["loc"][0]] if len(fault["loc"]) > 1 else Description
        return f"{where}: unknown key; known here: {', '.join(section.model_fields)}"
    value = fault["input"]
    return f"{where}: {fault['msg']}" + (f", found {value!r}" if isinstance(value, str | int | float) else "")


def description_yaml(description: Description) -> str:
    """The description as YAML without defaults, as saved with the corpus."""
    found = description.model_dump(mode="json", exclude_defaults=True)
    lists = [source["inputs"] for source in found["sources"]] + [found.get("documents", {}).get("decontaminate", [])]
    for paths in lists:
        paths[:] = [os.fsencode(path).decode("utf-8", "surrogateescape") for path in paths]
    return yaml.safe_dump(found, sort_keys=False)


def find_files(description: Description, exclude: Sequence[Path] = ()) -> list[list[Source]]:
    """The files of each source, in the order of the sources.

    Raises CorpusError like `find_sources`, and if a file belongs to two sources.
    """
    groups: list[list[Source]] = []
    seen: dict[Path, str] = {}
    for section in description.sources:
        inputs, kind = list(section.inputs), _KINDS.get(section.format, section.format)
        if section.format == "dataset":
            kind = ".arrow"
            folders = [folder for item in inputs for folder in _matches(item)]
            inputs = [str(file) for folder in folders for file in _dataset_files(Path(folder), section.split)]
        elif section.split is not None:
            raise CorpusError(f"source {section.name}: split requires format dataset, found {section.format}")
        if kind.startswith(BUILDER):
            _check_builder(section.name, kind.removeprefix(BUILDER))
        files = find_sources(inputs, exclude, kind)
        for file in files:
            path = Path(file.path).resolve()
            if (other := seen.setdefault(path, section.name)) != section.name:
                raise CorpusError(f"{file.path}: is in both sources {other} and {section.name}. Remove it from one")
        groups.append(files)
    return groups


def _dataset_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a dataset saved by `datasets`' save_to_disk. Raises CorpusError if it is unusable."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder, and no folder matches it"
        raise CorpusError(f"{folder}: {what}. Format dataset reads folders saved by save_to_disk")
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file())
        if split is None or split not in splits:
            found = f"split {split!r} does not exist" if split else "choose one"
            raise CorpusError(f"{folder}: has the splits {', '.join(splits)}: {found} (split: NAME)")
        folder = folder / split
    elif split is not None:
        raise CorpusError(f"{folder}: has one dataset without splits: remove split {split!r}")
    state = _read_json(folder / "state.json")
    if state.get("_indices_files"):
        raise CorpusError(
            f"{folder}: was saved with an indices mapping (after select, shuffle or filter). "
            "Save dataset.flatten_indices() instead"
        )
    files = state.get("_data_files")
    names = [item.get("filename") for item in files if isinstance(item, dict)] if isinstance(files, list) else []
    if not names or any(not isinstance(name, str) or name == ".." or Path(name).name != name for name in names):
        raise CorpusError(f"{folder}/state.json: lists no data files in this folder. Save the dataset again")
    return [folder / str(name) for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: not a dataset saved by save_to_disk ({error})") from None
    if not isinstance(found, dict):
        raise CorpusError(f"{path}: not a dataset saved by save_to_disk (must be a JSON object)")
    return found


def _check_builder(source: str, name: str) -> None:
    """Raise CorpusError unless `name` is a builder packaged with `datasets`: others would be looked up on the Hub."""
    try:
        from datasets import packaged_modules
    except ImportError:
        raise CorpusError(f"source {source}: format builder:{name} requires the package datasets. Install it") from None
    known = packaged_modules._PACKAGED_DATASETS_MODULES
    if name not in known:
        raise CorpusError(f"source {source}: datasets has no builder {name!r}, only {', '.join(sorted(known))}")
