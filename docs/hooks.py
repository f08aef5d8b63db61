"""Hook of mkdocs: fills the generated parts of reference pages (generate_reference.py)."""

import sys
from pathlib import Path
from typing import Any

# mkdocs loads hooks by path; the repository need not be importable.
for folder in (Path(__file__).parents[1], Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import generate_reference  # noqa: E402


def on_page_markdown(markdown: str, **_: Any) -> str:
    return generate_reference.expand(markdown)
