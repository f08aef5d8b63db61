"""The page docs/reference/faults.md, made of the faults that the tests run: `python -m tests.unit.faults.page`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.documents import ROOT
from tests.unit.faults import clusters, corpora, runs, settings, texts
from tests.unit.faults.case import Fault

PAGE = ROOT / "docs/reference/faults.md"
SECTIONS: dict[str, list[Fault]] = {
    "Texts, tokenizers and corpora": texts.FAULTS + corpora.FAULTS,
    "Configurations": settings.FAULTS + settings.VOCABULARIES,
    "Runs, checkpoints and exports": runs.FAULTS,
    "Hostfiles and Slurm jobs": clusters.FAULTS,
}
# Faults of one command in a table of their own.
_MANY = 5
_HEAD = """# What goes wrong, and what is said

Bad input and damage, the command that meets them, and what it prints. `…` stands for any text, such as a folder or a
hash. Unless a line says otherwise, the exit status is 1, nothing is written, and no existing file is changed. Every
line is a test (`tests/unit/faults`), and this page is made of the tests' own values:

```bash
python -m tests.unit.faults.page
```

The commands are run in a folder with texts (`texts/`), a tokenizer (`tok`), two corpora of them (`corpus`, `other`) and
a configuration (`run.yaml`) with its finished run (`run`).
"""


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    text = text.replace("\\n", "⏎").replace("\n", "⏎").replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def shell(command: str) -> str:
    program, _, words = command.partition(" ")
    return f"{program} {words}" if program == "maskvr" else f"python -m {program} {words}"


def rows(faults: list[Fault], *, commands: bool) -> Iterator[str]:
    yield "| fault | command | what it prints |\n|---|---|---|" if commands else "| fault | what it prints |\n|---|---|"
    for fault in faults:
        facts = [fault.done, f"status {fault.status}" if fault.status != 1 else ""]
        said = code(fault.said) + "".join(f"; {fact}" for fact in facts if fact)
        yield f"| {fault.what} | {code(shell(fault.command)) + ' | ' if commands else ''}{said} |"


def page() -> str:
    parts = [_HEAD]
    for title, faults in SECTIONS.items():
        parts.append(f"## {title}\n")
        counts = Counter(fault.command for fault in faults)
        for command, count in counts.items():
            if count >= _MANY:
                same = [fault for fault in faults if fault.command == command]
                parts += [f"{code(shell(command))}:\n", *rows(same, commands=False), ""]
        others = [fault for fault in faults if counts[fault.command] < _MANY]
        parts += [*rows(others, commands=True), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(PAGE).write_text(page(), encoding="utf-8")
