"""Relative links, their anchors, and the form of the pages."""

import re
from pathlib import Path

import pytest

from tests.docs import pages

IDS = {"ids": pages.name}


@pytest.mark.parametrize("page", pages.ALL, **IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(pages.ROOT), f"{link}: leads out of the repository"
        assert target.exists(), f"{link}: no such file"
        if page.is_relative_to(pages.DOCS):
            assert target.is_relative_to(pages.DOCS), f"{link}: not part of the site; write a code span instead"
            assert target.is_file(), f"{link}: the site has no pages for folders"
        if anchor:
            found = pages.headings(pages.expanded(target))
            assert anchor in map(pages.site_slug, found), f"{link}: no such heading"
            of_text = pages.headings(pages.read(target))
            assert anchor in map(pages.github_slug, of_text), f"{link}: GitHub calls the heading otherwise"


@pytest.mark.parametrize("page", pages.ALL, **IDS)
def test_images_have_a_description(page: Path) -> None:
    assert not re.search(r"!\[\s*\]\(", pages.read(page))


@pytest.mark.parametrize("page", pages.ALL, **IDS)
def test_lines_fit(page: Path) -> None:
    for number, line in enumerate(pages.read(page).splitlines(), 1):
        # Rows of tables cannot be cut, nor can a link.
        if len(line) > 120 and not line.lstrip().startswith("|"):
            assert re.search(r"\S{90,}", line), f"{pages.name(page)}:{number}: {len(line)} characters"


def test_the_readme_is_short() -> None:
    text = pages.read(pages.README)
    assert len(text.splitlines()) <= 170
    assert len(text.split()) <= 1000


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs is not needed for the tests, and its file has a tag that YAML does not know: a list of names will do."""
    listed = re.findall(r"(\S+\.md)$", (pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = {page.relative_to(pages.DOCS).as_posix() for page in pages.PAGES if page.is_relative_to(pages.DOCS)}
    assert there <= set(listed)
    assert all((pages.DOCS / page).is_file() for page in listed)


# Left column of the word list in docs/contributing/style.md.
AVOIDED = re.compile(
    r"\b(is told|are told|told once|goe?s? on|going on|began|begins?|begun|left out|leaves? out|passe[sd] over|"
    r"pass over|roll-back|alike|beside|of late|heeds?|stands? in|stand there|fares|the least|the greatest|"
    r"least to greatest|a line a step|by itself|any more)\b",
    re.IGNORECASE,
)
ALLOWED = {
    pages.DOCS / "contributing" / "style.md": {"*"},
    pages.CONTRIBUTING: {"*"},
    # Tokens begin words; a pass over a corpus is a noun.
    pages.DOCS / "reference" / "corpus-format.md": {"begins"},
    pages.DOCS / "how-to" / "build-a-corpus.md": {"pass over"},
}


@pytest.mark.parametrize("page", pages.PAGES, **IDS)
def test_plain_words(page: Path) -> None:
    allowed = ALLOWED.get(page, set())
    if "*" not in allowed:
        assert set(AVOIDED.findall(pages.prose(page))) <= allowed
