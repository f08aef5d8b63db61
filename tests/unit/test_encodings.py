"""Text files are opened with an explicit encoding: that of the locale differs between machines.

ruff's PLW1514 does the same where it can infer that an object is a path; this test goes by the names of the methods.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path for package in ("maskvr_ds", "data_pipeline", "cluster") for path in sorted((ROOT / package).rglob("*.py"))
]


def without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("read_text", "write_text", "fdopen", "TextIOWrapper"):
            yield node
        elif name == "open" and not ast.unparse(node.func).startswith("os."):
            modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            strings = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
            # The mode is the last of the strings; files of JSON, Arrow and tensors are binary.
            is_path = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "self"
            if is_path and not any("b" in mode for mode in strings) and (strings or not node.args):
                yield node


def test_finds_what_it_looks_for() -> None:
    lines = [
        "p.read_text()",
        "p.open('w')",
        "p.open()",
        "p.open('rb')",
        "p.open('w', encoding='utf-8')",
        "os.open(p, 1)",
    ]
    assert [node.lineno for node in without_encoding(ast.parse("\n".join(lines)))] == [1, 2, 3]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_opened_with_an_encoding(path: Path) -> None:
    found = [node.lineno for node in without_encoding(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, f"{path}: no encoding in lines {found}"
