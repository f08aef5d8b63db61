"""README, CONTRIBUTING, CHANGELOG and docs/: their code blocks, code spans, links and headings."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
# Written by docs/experiments, not by hand.
_GENERATED = {DOCS / "results" / "lamb_under_zero" / "summary.md"}
PAGES = [README, CONTRIBUTING, *sorted(set(DOCS.rglob("*.md")) - _GENERATED)]
ALL = [*PAGES, ROOT / "CHANGELOG.md"]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block. line: of its first line of text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    text = read(page)
    found = [Block(page, text.count("\n", 0, m.start()) + 2, m[2], m[3]) for m in _FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


@cache
def prose(page: Path) -> str:
    """The page without its code blocks; wrapped lines of a paragraph are joined."""
    text = _FENCE.sub("\n", read(page))
    return re.sub(r"(?<=\S)\n *(?=[^\s|#>*-])", " ", text)


def spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in _SPAN.findall(prose(page))]


def links(page: Path) -> list[str]:
    found = _LINK.findall(_SPAN.sub("`code`", prose(page)))
    return [inline or reference for inline, reference in found]


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)


def section(page: Path, heading: str) -> str:
    """The text under a heading, subsections included."""
    text = read(page)
    # A comment of a shell is no heading.
    plain = _FENCE.sub(lambda block: block[0].replace("\n#", "\n "), text)
    start = re.search(rf"^(#+) {re.escape(heading)}$", plain, re.MULTILINE)
    assert start is not None, f"{name(page)}: no heading {heading!r}"
    end = re.compile(rf"^#{{1,{len(start[1])}}} ", re.MULTILINE).search(plain, start.end())
    return text[start.end() : end.start() if end else None]


def github_slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """The anchor that Python-Markdown's toc extension generates."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


@cache
def generator() -> ModuleType:
    """docs/generate_reference.py."""
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def expanded(page: Path) -> str:
    """The page as the site shows it, generated parts included."""
    return generator().expand(read(page))
