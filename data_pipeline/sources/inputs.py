"""Input files: what they are, and how they are found."""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.files import CorpusError, reading_input, sha256_file

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
# A plain .json file is usually one object or array; compressed ones, as of C4, are JSON lines.
SUFFIXES = (
    *(f"{kind}{compression}" for kind in (".txt", ".jsonl") for compression in ("", *_COMPRESSIONS)),
    *(f".json{compression}" for compression in _COMPRESSIONS),
    ".parquet",
)
# Read if they are named, or match a glob; in a folder they often hold something else, such as its README.
NAMED_SUFFIXES = (*(f"{kind}{end}" for kind in (".md", ".csv", ".tsv") for end in ("", *_COMPRESSIONS)), ".json")
SUPPORTED = f".txt, .jsonl, .parquet; .txt, .jsonl and .json also compressed ({', '.join(_COMPRESSIONS)})"
NAMED = "by name or glob also .md, .csv, .tsv and .json"
# What to do with files that cannot be read as they are.
_REMEDIES = {
    ".html": "extract their text, for example with trafilatura",
    ".htm": "extract their text, for example with trafilatura",
    ".pdf": "extract their text, for example with pdftotext",
    ".docx": "convert them to text, for example with pandoc",
    ".xml": "extract their text; of Wikipedia, with WikiExtractor, and set format wikiextractor in a description",
    ".arrow": "name the folder that save_to_disk wrote in a description, with format dataset",
    ".zip": "unpack them",
    ".tar": "unpack them",
    ".tgz": "unpack them",
    ".gz": "unpack them, or add the format to the name, as in a.txt.gz",
    "without suffix": "rename them, or set their format in a description: text, jsonl, csv, wikiextractor",
}
# Approximate compression ratio of text, so that units of compressed files take about as long as others.
_EXPANSION = 4

# A line of only white space ends a document. The same rule for bytes and text: units are cut where the reader splits.
BLANK_LINE = r"\n[ \t\r\f\v]*\n"
# WikiExtractor's end of an article; it cannot occur in the text, where "<" is escaped.
WIKI_END = r"</doc>[ \t\r]*(?:\n|$)"
BUILDER = "builder:"
_KINDS = ((stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))

Progress = Callable[[int, int], object]
"""Progress callback, called with (bytes read from disk, tokens produced) since the last call."""

_logger = logging.getLogger(__name__)


class Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


@dataclass(frozen=True)
class Source:
    """An input file. name: relative to the common parent folder of all inputs; bytes: size; kind: format, if it is not
    given by the file name suffix."""

    path: str
    name: str
    bytes: int
    mtime_ns: int
    kind: str = ""

    @property
    def compression(self) -> str | None:
        return None if self.kind.startswith(BUILDER) else _COMPRESSIONS.get(Path(self.path).suffix.lower())

    @property
    def format(self) -> str:
        """One of ".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".wiki", ".arrow", "builder:NAME"."""
        if self.kind:
            return self.kind
        path = Path(self.path)
        suffix = Path(path.stem if self.compression else path.name).suffix.lower()
        if suffix == ".json":
            return ".jsonl" if self.compression else ".json"
        return ".txt" if suffix == ".md" else suffix

    @property
    def text_bytes(self) -> int:
        """Approximate number of bytes of text in the file."""
        return self.bytes * (_EXPANSION if self.compression else 1)

    def sha256(self) -> str:
        """SHA-256 of the file as it is now. Raises CorpusError if it cannot be read."""
        with reading_input(self.path):
            return sha256_file(Path(self.path))

    def check_unchanged(self) -> None:
        """Raise CorpusError if the file has been modified or removed since the build started, or cannot be read."""
        with reading_input(self.path):
            try:
                found = Path(self.path).stat()
            except FileNotFoundError:
                raise CorpusError(f"{self.path}: disappeared during the build. Restore it and rerun") from None
        if (found.st_size, found.st_mtime_ns) != (self.bytes, self.mtime_ns):
            raise CorpusError(
                f"{self.path}: changed since the build started ({self.bytes:,} bytes then, {found.st_size:,} now). "
                "Restore it, or choose another output folder"
            )


@dataclass(frozen=True)
class Piece:
    """Part of a source: bytes, Parquet row groups or Arrow record batches [start, stop) of the file."""

    source: int
    start: int
    stop: int


Unit = tuple[Piece, ...]


def find_sources(inputs: Sequence[str | Path], exclude: Sequence[Path] = (), kind: str = "") -> list[Source]:
    """List the files that match `inputs` (files, folders, globs), sorted by name.

    Folders are searched recursively, except those in `exclude`, skipping hidden files and files without a suffix in
    SUFFIXES; matches of a glob in folders of `exclude` are skipped too, unless the glob names that folder.
    Files that are named, or match a glob, must have one of these or of NAMED_SUFFIXES. kind: format of all
    non-hidden files, whatever their names.
    The number of files skipped for their suffix is printed to stderr.
    Raises CorpusError if an input is missing, no file is found, a file is found twice, a name is not UTF-8, or a file
    is a dead link, a pipe, a socket or a device.
    """
    paths: list[Path] = []
    others: Counter[str] = Counter()
    excluded = {os.path.realpath(folder) for folder in exclude}
    for item in map(str, inputs):
        if os.path.lexists(item):
            matches = [item]
        else:
            # Path.glob() takes no absolute patterns.
            globbed = sorted(glob.glob(item, recursive=True))  # noqa: PTH207
            matches = [match for match in globbed if not _is_excluded(Path(match), item, excluded)]
        if not matches:
            raise CorpusError(f"{item}: no such file or folder, and no file matches it")
        # "**" matches folders and also what is in them.
        listed = {path for path in map(Path, matches) if not path.is_dir()}
        for match in map(Path, matches):
            if match.is_dir():
                paths += _walk(match, excluded, "" if kind else SUFFIXES, others, listed)
            elif kind or match.name.lower().endswith((*SUFFIXES, *NAMED_SUFFIXES)):
                paths.append(match)
            else:
                raise CorpusError(
                    f"{match}: unknown file type. Supported: {SUPPORTED}; {NAMED}. "
                    "For a file of another name, set its format in a description"
                )
    if not paths:
        rule = "no file in it" if kind else f"no file of a supported type ({SUPPORTED}; {NAMED})"
        hints = "" if kind else remedies(inputs, others)
        raise CorpusError(f"{', '.join(map(str, inputs))}: the corpus is empty: {rule}{hints}")
    seen: dict[Path, Path] = {}
    stats = [_stat(path) for path in paths]
    for path in paths:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise CorpusError(f"{path}: is listed twice (same file as {other}). List every input once")
    # Symbolic links keep their names: the names of the blobs they may point to mean nothing.
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100
    common = os.path.commonpath([path.parent for path in absolute])
    sources = []
    for path, found in zip(absolute, stats, strict=True):
        try:
            # Names are stored in the manifest, which is UTF-8, whatever the encoding of the locale.
            name = os.fsencode(path.relative_to(common).as_posix()).decode()
        except UnicodeDecodeError:
            raise CorpusError(f"{str(path)!a}: file name is not UTF-8; rename it") from None
        sources.append(Source(str(path), name, found.st_size, found.st_mtime_ns, kind))
    if others:
        counts = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(others.items()))
        named = any(suffix in NAMED_SUFFIXES for suffix in others)
        hint = f" (of these, {NAMED})" if named else ""
        _logger.warning("skipped %s files: %s%s", f"{others.total():,}", counts, hint)
    return sorted(sources, key=lambda source: source.name)


def remedies(inputs: Sequence[str | Path], others: Counter[str]) -> str:
    """How the most frequent kinds of skipped files could be read, a sentence each; empty if there are none.

    others: suffix -> number of files.
    """
    sentences = []
    folder = next((str(item) for item in inputs if Path(item).is_dir()), ".").rstrip("/")
    for suffix, count in others.most_common(3):
        remedy = _REMEDIES.get(suffix, "convert them to text, or set their format in a description")
        if suffix in NAMED_SUFFIXES:
            remedy = f"name them, or use a glob: '{folder}/**/*{suffix}'"
        sentences.append(f". Files {suffix} ({count:,}): {remedy}")
    return "".join(sentences)


def where_text_may_be(sources: Sequence[Source]) -> str:
    """A hint at another format or field; empty if there is none to give."""
    if any(source.format not in (".txt", ".wiki") for source in sources):
        return ", or set --text-field to the field or column that holds it"
    return ", or if these files are not plain text, set their format in a description"


def _stat(path: Path) -> os.stat_result:
    """Status of a regular file. Raises CorpusError for a dead link, and for what would be read without end."""
    try:
        found = path.stat()
    except OSError as error:
        if not path.is_symlink():
            raise CorpusError(
                f"{path}: cannot be read ({error.strerror}). Correct its permissions, or remove it"
            ) from None
        raise CorpusError(
            f"{path}: is a link to {path.readlink()}, which cannot be read ({error.strerror}). "
            "Restore the file, or remove the link"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for check, name in _KINDS if check(found.st_mode)), "folder")
        what = f"is a link to a {kind}" if path.is_symlink() else f"is a {kind}"
        raise CorpusError(f"{path}: {what}, not a file: its end is unknown. Save its content to a file, or remove it")
    return found


def _is_excluded(match: Path, pattern: str, excluded: set[str]) -> bool:
    """Whether a match of a glob is, or lies in, a folder of `excluded` that the pattern does not name: the tokenizer
    and the output, whose vocab.txt is no text."""
    parts = Path(pattern).parts
    named = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folders = (match, *match.parents)[: len(match.parts) - named]
    return any(os.path.realpath(folder) in excluded for folder in folders)


def _walk(
    folder: Path, exclude: set[str], suffixes: str | tuple[str, ...], others: Counter[str], listed: set[Path]
) -> Iterator[Path]:
    """Files below a folder that are not in `listed`, and are added to it; counts the suffixes of skipped files, except
    hidden ones, in `others`."""
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in exclude
        ]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or path in listed:
                continue
            listed.add(path)
            if name.lower().endswith(suffixes):
                yield path
            else:
                others[ascii(Path(name).suffix.lower())[1:-1] or "without suffix"] += 1


def _raise(error: OSError) -> None:
    raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})") from error
