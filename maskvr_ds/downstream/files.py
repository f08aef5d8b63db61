"""Reading of task files: as GLUE and SQuAD ship them, CSV, JSON Lines, CoNLL columns, and folders of `datasets`.

A part of a task (train, dev) is STEM.tsv, .csv, .jsonl, .txt, .conll or .parquet, of questions STEM.json, .jsonl or
.parquet, all but the last also compressed with gzip (.gz); or STEM-*.parquet, as on the hub; or the folder STEM written
by `save_to_disk`. UTF-8.
"""

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from maskvr_ds.downstream.examples import Split, TaskData, check
from maskvr_ds.downstream.questions import check_unicode, read_answers, read_published
from maskvr_ds.downstream.tasks import Kind, Task, TaskError

_TEXT = (".tsv", ".csv", ".jsonl", ".txt", ".conll")
_QUESTIONS = (".json", ".jsonl")
_TAG = re.compile(r"O|[BIES]-.+")
_DOCUMENT = "-DOCSTART-"
_COLUMN = re.compile(r"[^ \t]+")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
# Characters; texts may be long. The csv module's own limit is 131,072.
_LONGEST_FIELD = 2**31 - 1
_SHOWN = 5


@dataclass(frozen=True)
class _Table:
    """Rows of a part: column -> value. where: of a row, for messages. names: column -> names of its class indices."""

    path: Path
    rows: list[dict[str, Any]]
    where: list[str]
    names: Mapping[str, Sequence[str]]
    columns: tuple[str, ...]
    skipped: int = 0


def read_task(task: Task, folder: Path) -> TaskData:
    """The training and evaluation sets of a task. Raises TaskError or OSError.

    folder: of the task itself, or one with the task's folder in it (SST-2, sst2, or those in a folder glue).
    """
    home = _home(task, folder)
    parts = {"train": task.train} | dict(task.dev)
    paths = {name: _find(task, home, stems) for name, stems in parts.items()}
    if missing := [name for name, path in paths.items() if path is None]:
        raise TaskError(
            f"{task.name}: {home} has no {' or '.join(parts[missing[0]])} "
            f"({', '.join(_suffixes(task))}, .parquet, or a folder of datasets)"
        )
    splits, skipped = {}, 0
    for name, path in paths.items():
        assert path is not None
        splits[name], damaged = _read_part(task, path)
        skipped += damaged
    train = splits.pop("train")
    data = TaskData(task, train, splits, skipped)
    check(data)
    return data


def read_labelled(task: Task, path: Path) -> Split:
    """The examples of one file: STEM.tsv, .csv, .jsonl (also .gz) or .parquet. Raises TaskError or OSError."""
    suffixes = (".tsv", ".csv", ".jsonl")
    if not path.is_file():
        raise TaskError(f"--data {path}: no such file; expected one labelled file ({', '.join(suffixes)}, .parquet)")
    if Path(path.name.removesuffix(".gz")).suffix not in (*suffixes, ".parquet"):
        raise TaskError(f"--data {path}: expected a name that ends with {', '.join(suffixes)} or .parquet")
    split, _ = _read_part(task, path)
    if not len(split):
        raise TaskError(f"{path}: has no examples")
    return split


def _home(task: Task, folder: Path) -> Path:
    """The folder that has the task's training set."""
    if not folder.is_dir():
        raise TaskError(f"--data {folder}: no such folder")
    names = {task.name, task.folder.lower(), task.folder.lower().replace("-", "")} - {""}
    for parent in (folder, folder / "glue"):
        inner = parent.iterdir() if parent.is_dir() else ()
        found = [path for path in inner if path.name.lower() in names and path.is_dir()]
        # The task's own name first: a folder squad next to squad_v2 is of another task.
        found.sort(key=lambda path: (path.name.lower() != task.name, path.name))
        if found:
            return next((path for path in found if _find(task, path, task.train) is not None), found[0])
    # The task's own folder; not one that merely lies in it and is of another task.
    if task.is_glue and folder.resolve().name.lower() in names and _find(task, folder, task.train) is not None:
        return folder
    if not task.is_glue:
        return folder
    raise TaskError(
        f"{task.name}: {folder} has no folder {task.folder} (or {task.name}) with its files; nothing is downloaded. "
        "Name the tasks that are there with --tasks"
    )


def _suffixes(task: Task) -> tuple[str, ...]:
    return _QUESTIONS if task.kind is Kind.SPAN else _TEXT


def _forms(task: Task, folder: Path, stem: str) -> list[Path]:
    """The files and folders that may be the part STEM; STEM.parquet also stands for STEM-*.parquet."""
    suffixes = [suffix + gz for suffix in _suffixes(task) for gz in ("", ".gz")]
    found = [path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()]
    if (path := folder / stem).is_dir() or (path.is_file() and stem.startswith("eng.")):
        found.append(path)
    shards = sorted(folder.glob(f"{stem}-*.parquet"))
    if (path := folder / f"{stem}.parquet").is_file():
        found += [path, *shards]
    elif shards:
        found.append(path)
    return found


def _find(task: Task, folder: Path, stems: Sequence[str]) -> Path | None:
    """The first of the stems that is there. Raises TaskError where it has several forms, which may differ."""
    for stem in stems:
        if len(found := _forms(task, folder, stem)) > 1:
            raise TaskError(f"{task.name}: {found[0]} and {found[1].name}: remove one; both are {stem}")
        if found:
            return found[0]
    return None


def _read_part(task: Task, path: Path) -> tuple[Split, int]:
    """Examples, and the number of damaged rows."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if task.kind is Kind.TOKENS and suffix not in (".jsonl", ".parquet") and path.is_file():
        if suffix in (".csv", ".tsv"):
            raise TaskError(f"{path}: {task.name} needs CoNLL columns in .txt or .conll, or JSON Lines")
        return _conll(path), 0
    if task.kind is Kind.SPAN and suffix == ".json":
        return read_published(path, _text(path)), 0
    try:
        if suffix == ".parquet" or path.is_dir():
            table = _arrow(path)
        elif suffix == ".jsonl":
            table = _json_lines(path)
        else:
            table = _delimited(path, task, comma=suffix == ".csv")
    except (pa.ArrowException, EOFError, gzip.BadGzipFile) as error:
        raise TaskError(f"{path}: cannot be read ({error})") from None
    return _examples(task, table), table.skipped


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise TaskError(f"{path}: cannot be read ({error}); expected UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their number, from 1; ended by line feeds only: texts may contain other separators of Unicode."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        yield number, line.removesuffix("\r")


def _delimited(path: Path, task: Task, *, comma: bool) -> _Table:
    """TSV without quoting, as in GLUE, or CSV with it."""
    if comma:
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        limit = csv.field_size_limit(_LONGEST_FIELD)
        try:
            lines = [(reader.line_num, fields) for fields in reader if fields]
        except csv.Error as error:
            raise TaskError(f"{path}, line {reader.line_num}: {error}") from None
        finally:
            csv.field_size_limit(limit)
    else:
        lines = [(number, line.split("\t")) for number, line in _lines(path) if line]
    if not lines:
        raise TaskError(f"{path}: is empty")
    header = list(task.header)
    if not header or lines[0][1] == header or _has_columns(task, lines[0][1]):
        header = lines.pop(0)[1]
    wanted = _wanted(task, header, path)
    if repeated := [column for column in wanted if header.count(column) > 1]:
        raise TaskError(f"{path}: has several columns {repeated[0]!r}; rename all but one")
    needed = max(map(header.index, wanted)) + 1
    rows, where, skipped = [], [], 0
    for number, fields in lines:
        if not needed <= len(fields) <= len(header):
            if not task.skip_damaged_rows:
                remedy = f"; a text with a {'comma needs quotes' if comma else 'tab needs .csv or .jsonl'}"
                raise TaskError(
                    f"{path}, line {number}: has {len(fields)} of {len(header)} columns"
                    f"{remedy if len(fields) > len(header) else ''}"
                )
            skipped += 1
            continue
        rows.append(dict(zip(header, fields, strict=False)))
        where.append(f"{path}, line {number}")
    return _Table(path, rows, where, {}, tuple(header), skipped)


def _json_lines(path: Path) -> _Table:
    rows, where = [], []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{path}, line {number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: expected an object with the columns as keys")
        check_unicode(line, row, f"{path}, line {number}")
        rows.append(row)
        where.append(f"{path}, line {number}")
    return _Table(path, rows, where, {}, tuple(rows[0]) if rows else ())


def _arrow(path: Path) -> _Table:
    """Parquet files, or Arrow files in a folder written by `save_to_disk`."""
    if path.is_dir():
        files = sorted(path.glob("*.arrow"))
        if (state := path / "state.json").is_file():
            try:
                content = json.loads(state.read_bytes())
                files = [path / _plain(entry["filename"]) for entry in content["_data_files"]]
            except (ValueError, KeyError, TypeError) as error:
                raise TaskError(f"{state}: is not as save_to_disk of datasets writes it ({error!r})") from None
            if content.get("_indices_files"):
                raise TaskError(f"{path}: was saved with an indices mapping; save dataset.flatten_indices() instead")
        if not files:
            raise TaskError(f"{path}: has no .arrow file; expected a folder written by save_to_disk of datasets")
        tables = [pa.ipc.open_stream(file.read_bytes()).read_all() for file in files]
    else:
        files = [path] if path.is_file() else sorted(path.parent.glob(f"{path.stem}-*.parquet"))
        _check_complete(files)
        tables = [pyarrow.parquet.read_table(file) for file in files]
    table = pa.concat_tables(tables)
    return _Table(
        path,
        table.to_pylist(),
        [f"{path}, example {i}" for i in range(table.num_rows)],
        _class_names(table.schema, path),
        tuple(table.column_names),
    )


def _plain(name: str) -> str:
    """A file's name in its folder. Raises ValueError if it is a path, TypeError if it is no name."""
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not in this folder")
    return name


def _check_complete(files: Sequence[Path]) -> None:
    """Raise TaskError if some of the files STEM-00000-of-00003.parquet, … are missing, or of two sets."""
    numbers = [(int(match[1]), int(match[2])) for file in files if (match := _SHARD.search(file.stem))]
    if numbers and sorted(numbers) != [(i, len(numbers)) for i in range(len(numbers))]:
        raise TaskError(
            f"{files[0].parent}: expected one complete set of files, numbered as {files[0].name}; it has "
            f"{', '.join(file.name for file in files[:_SHOWN])}{', …' * (len(files) > _SHOWN)}"
        )


def _class_names(schema: pa.Schema, path: Path) -> dict[str, Sequence[str]]:
    """Names of the class indices, from the features that `datasets` stores with the columns."""
    found = {}
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for column, feature in stored.get("info", {}).get("features", {}).items():
            inner = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
                found[column] = inner["names"]
    except (ValueError, LookupError, AttributeError) as error:
        raise TaskError(f"{path}: the features of datasets in it are damaged ({error!r})") from None
    return found


def _has_columns(task: Task, header: Sequence[str]) -> bool:
    return all(any(name in header for name in names) for names in (*task.texts, task.label))


def _wanted(task: Task, columns: Sequence[str], path: Path) -> list[str]:
    """The columns of the texts and, last, of the label. Raises TaskError if one is missing."""
    found = []
    for names in (*task.texts, task.label):
        if (column := next((name for name in names if name in columns), None)) is None:
            remedy = "" if task.is_glue else "; name yours with --text-columns and --label-column"
            remedy = "" if task.kind in (Kind.TOKENS, Kind.SPAN) else remedy
            raise TaskError(
                f"{path}: has no column {' or '.join(map(repr, names))}, which {task.name} needs; it has "
                f"{', '.join(map(repr, columns[:12])) or 'none'}{remedy}"
            )
        found.append(column)
    return found


def _examples(task: Task, table: _Table) -> Split:
    if not table.rows:
        return Split((), ())
    *texts, label = _wanted(task, table.columns, table.path)
    parts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for row, where in zip(table.rows, table.where, strict=True):
        values = [row.get(column) for column in texts]
        if task.kind is Kind.SPAN:
            labels.append(read_answers(values[0], values[1], row.get(label), where))
            parts.append((str(values[0]), str(values[1])))
            continue
        if task.kind is Kind.TOKENS:
            tokens, tags = values[0], row.get(label)
            if not _is_strings(tokens) or not isinstance(tags, list) or len(tags) != len(tokens):
                raise TaskError(f"{where}: expected lists of equal length in {texts[0]!r} and {label!r}")
            parts.append(tuple(tokens))
            labels.append(tuple(_tag(_class(task, tag, table.names.get(label), where), where) for tag in tags))
            continue
        if not _is_strings(values):
            raise TaskError(f"{where}: expected text in {', '.join(map(repr, texts))}")
        parts.append(tuple(values))
        found = row.get(label)
        if task.kind is Kind.REGRESSION:
            labels.append(_number(task, found, where))
        else:
            labels.append(_class(task, found, table.names.get(label), where))
    return Split(tuple(parts), tuple(labels))


def _is_strings(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _number(task: Task, value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TaskError(f"{where}: the label {value!r} is not a finite number")
    if task.limits is not None and not task.limits[0] <= number <= task.limits[1]:
        low, high = task.limits
        raise TaskError(f"{where}: the label {value!r} is not between {low:g} and {high:g} (test sets have none)")
    return number


def _class(task: Task, value: Any, names: Sequence[str] | None, where: str) -> str:
    """A class by name. Indices of `datasets` have names of their own, or are those of the task's labels."""
    # Of a table, a missing number is not a number.
    if isinstance(value, bool) or value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise TaskError(f"{where}: the label {value!r} is neither a name nor an index")
    if isinstance(value, int):
        if names is not None and not (task.labels and set(names) != set(task.labels)):
            known: Sequence[str] = names
        else:
            known = task.labels
        if not known:
            return str(value)
        if not 0 <= value < len(known):
            raise TaskError(f"{where}: unknown label {value}; expected 0 to {len(known) - 1} (test sets have none)")
        return known[value]
    name = str(value)
    if task.labels and name not in task.labels:
        raise TaskError(f"{where}: unknown label {name!r}; {task.name} has {', '.join(map(repr, task.labels))}")
    if not name:
        raise TaskError(f"{where}: the label is empty")
    return name


def _tag(tag: str, where: str) -> str:
    if not _TAG.fullmatch(tag):
        raise TaskError(f"{where}: unknown tag {tag!r}; expected O, or B-, I-, E- or S- and a label")
    return tag


def _conll(path: Path) -> Split:
    """Sentences of CoNLL files: one token per line, its tag in the last column, an empty line after each sentence.

    Columns are separated by spaces and tabs; other white space, such as that within a number, is of the token.
    """
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in _lines(path):
        fields = _COLUMN.findall(line)
        if not fields or fields[0] == _DOCUMENT:
            if sentences[-1][0]:
                sentences.append(([], []))
            continue
        if len(fields) < 2:
            raise TaskError(f"{path}, line {number}: expected a token and, in the last column, its tag")
        sentences[-1][0].append(fields[0])
        sentences[-1][1].append(_tag(fields[-1], f"{path}, line {number}"))
    kept = [(tuple(tokens), tuple(tags)) for tokens, tags in sentences if tokens]
    return Split(tuple(tokens for tokens, _ in kept), tuple(tags for _, tags in kept))
