"""The generated parts of the reference: settings from the configuration classes, help texts from argument parsers.

A page has a marker, `<!-- generated: configuration -->` or `<!-- generated: cli PROGRAM -->`, which `expand` replaces.
Needs neither torch nor mkdocs.
"""

import argparse
import importlib
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin
from unittest import mock

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

MARKER = re.compile(r"<!-- generated: (configuration|cli (\w+)) -->")
# Program → module with its main().
PROGRAMS = {"maskvr": "maskvr_ds.cli.main", "data_pipeline": "data_pipeline.__main__", "cluster": "cluster.__main__"}
_SYMBOLS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "multiple of"}


def expand(markdown: str) -> str:
    """The page with its markers replaced."""
    return MARKER.sub(lambda found: configuration() if found[2] is None else cli(found[2]), markdown)


# Command lines


class _Captured(Exception):  # noqa: N818
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(main: Callable[[list[str]], Any]) -> argparse.ArgumentParser:
    """The parser that a program's main() makes, without running anything."""

    def capture(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Captured(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", capture):
        try:
            main([])
        except _Captured as captured:
            return captured.parser
    raise RuntimeError(f"{main.__module__}.main parses no arguments")


def program(name: str) -> argparse.ArgumentParser:
    return parser_of(importlib.import_module(PROGRAMS[name]).main)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def cli(name: str) -> str:
    """Help texts of a program and of its commands."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        parser = program(name)
        parts = [_help(parser)]
        for command, of_command in subcommands(parser).items():
            parts += [f"### {parser.prog.removeprefix('python -m ')} {command}", _help(of_command)]
    return "\n\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help().strip()}\n```"


# Configuration


class Row(NamedTuple):
    key: str
    type: str
    default: str
    meaning: str


def configuration() -> str:
    """A table for each section of RunConfig, in the order of its fields."""
    from maskvr_ds.config import RunConfig

    parts = ["## Top level", _table(list(_rows(RunConfig, "")))]
    for path, section in _sections(RunConfig, ""):
        parts.append(f"{'##' if '.' not in path else '###'} {path}")
        if text := _docstring(section):
            parts.append(text)
        if rows := list(_rows(section, path)):
            parts.append(_table(rows))
    return "\n\n".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for nested in _models_in(field.annotation):
            path = f"{prefix}.{name}" if prefix else name
            yield path, nested
            yield from _sections(nested, path)


def _rows(model: type[BaseModel], prefix: str) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        nested = list(_models_in(field.annotation))
        if nested and not _is_plain(field):
            if not prefix:
                continue
            path = f"{prefix}.{name}"
            kind = "list of sections" if _is_sequence(field.annotation) else "section"
            yield Row(f"`{name}`", f"{kind}: see [{path}](#{path.replace('.', '')})", _default(field), _meaning(field))
            continue
        yield Row(f"`{name}`", _type(field), _default(field), _meaning(field))


def _is_plain(field: FieldInfo) -> bool:
    return not any(True for _ in _models_in(field.annotation))


def _is_sequence(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        if argument is not annotation:
            yield from _models_in(argument)


def _type(field: FieldInfo) -> str:
    limits = [text for text in map(_limit, field.metadata) if text]
    shown = _shown_type(field.annotation)
    return ", ".join([shown, *limits])


def _shown_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [text for text in map(_limit, arguments[1:]) if text]
        return ", ".join([_shown_type(arguments[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_shown_type(a) for a in arguments if a is not type(None)) + (
            ", or null" if type(None) in arguments else ""
        )
    if origin in (list, tuple):
        if len(arguments) == 2 and arguments[1] is not Ellipsis:
            return f"pair of ({_shown_type(arguments[0])})"
        return f"list of {_shown_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {Path: "path", str: "string", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limit(constraint: Any) -> str:
    if isinstance(constraint, FieldInfo):
        return ", ".join(text for text in map(_limit, constraint.metadata) if text)
    bounds = ((sign, getattr(constraint, key, None)) for key, sign in _SYMBOLS.items())
    parts = [f"{sign} {value:g}" for sign, value in bounds if value is not None]
    if (pattern := getattr(constraint, "pattern", None)) is not None:
        parts.append(f"matching `{pattern}`")
    return ", ".join(parts)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return "`{}`" if value == {} else f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    return _one_line(field.description or "")


def _docstring(section: type[BaseModel]) -> str:
    """The class's own docstring; pydantic's is inherited."""
    return _one_line(section.__dict__.get("__doc__") or "")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(rows: list[Row]) -> str:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
