"""Every file, folder, module, function and class that the documentation names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs import pages
from tests.docs.pages import ROOT

TOP = ("maskvr_ds", "data_pipeline", "cluster", "ds_configs", "docs", "tests")
_IN = re.compile(r"`([A-Za-z_][\w.]*)`(?:,)? in\s+`([\w/]+\.py)`")


@cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes, methods and assigned names of a file: "name", "Class.name"."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
                found.update(prefix + n.id for n in names if isinstance(n, ast.Name))
            elif isinstance(node, ast.ImportFrom):
                found.update(prefix + (alias.asname or alias.name) for alias in node.names)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def module_file(dotted: str) -> Path | None:
    base = ROOT.joinpath(*dotted.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def exists(dotted: str) -> bool:
    """Of "package.module", "package.module.name" and "package.module.Class.name"."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        if (file := module_file(".".join(parts[:cut]))) is not None:
            return cut == len(parts) or ".".join(parts[cut:]) in definitions(file)
    return False


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_paths(page: Path) -> None:
    missing = []
    for span in pages.spans(page):
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", span) and span.split("/")[0] in TOP:
            if not list(ROOT.glob(span.rstrip("/"))):
                missing.append(span)
        elif re.fullmatch(r"test_\w+\.py", span):
            if not list((ROOT / "tests").rglob(span)):
                missing.append(span)
        # Within maskvr_ds, as `runtime/files.py`.
        elif re.fullmatch(r"[a-z_]+/[a-z_]+\.py", span) and not (ROOT / "maskvr_ds" / span).is_file():
            missing.append(span)
    assert not missing


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_dotted_names(page: Path) -> None:
    dotted = [span for span in pages.spans(page) if re.fullmatch(r"(maskvr_ds|data_pipeline|cluster)(\.\w+)+", span)]
    assert [span for span in dotted if not exists(span)] == []


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_names_in_files(page: Path) -> None:
    """`name` in `file.py`"""
    wrong = []
    for symbol, file in _IN.findall(pages.prose(page)):
        path = ROOT / file
        if not path.is_file() or symbol not in definitions(path):
            wrong.append(f"{symbol} in {file}")
    assert not wrong


def test_the_tree_of_the_readme() -> None:
    tree = next(b.text for b in pages.blocks(pages.README) if "data_pipeline/ " in b.text)
    parent, folders = "", 0
    for line in tree.splitlines():
        found = re.match(r"( *)([\w.]+)/", line)
        assert found is not None, line
        if not found[1]:
            parent = found[2]
        folder = ROOT / parent if not found[1] else ROOT / parent / found[2]
        assert folder.is_dir(), line
        folders += 1
        # Folders named behind it lie in it.
        for inner in re.findall(r"\b([a-z]+)/", line[found.end() :]):
            assert (folder / inner).is_dir(), f"{folder.name}/{inner}"
    assert folders <= 20


def test_the_rows_of_contributing_are_those_that_are_tested() -> None:
    from tests.unit.test_structure import ROWS

    lines = pages.section(pages.CONTRIBUTING, "Where things are").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == [f"`{package}`" for package in ROWS]
    for column, package in enumerate(ROWS):
        shown = [set(re.findall(r"`(\w+)`", row[column])) for row in cells[2:]]
        assert [row for row in shown if row] == list(ROWS[package])


QUESTIONS = (
    "Where is the trust ratio completed over ranks?",
    "What decides a row's mask?",
    "What happens at SIGTERM?",
    "Where would I add a strategy?",
    "Where would I add an encoder?",
    "What does --resume auto accept?",
    "Where is the data order decided?",
    "Where are gradients clipped and the norm taken?",
    "What makes a checkpoint complete?",
    "Where are DeepSpeed's parts replaced?",
    "How does a phase start?",
    "Where is MAPNet's target all-reduced?",
)
_ARCHITECTURE = pages.DOCS / "contributing" / "architecture.md"


def test_names_index() -> None:
    found = re.findall(r"^### (.+)$", pages.section(_ARCHITECTURE, "Where is …?"), re.MULTILINE)
    assert set(found) >= set(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_names_index_has_short_answers(question: str) -> None:
    """At most three steps, each a file that exists; the names in them are checked above."""
    text = " ".join(pages.section(_ARCHITECTURE, question).split())
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert files
    assert len(_IN.findall(text)) <= 3
    assert all((ROOT / file).is_file() for file in files)
