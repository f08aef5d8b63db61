"""Labelled texts that every Debian machine has: descriptions of packages, labelled with their section.

    apt-cache dumpavail | python docs/experiments/package_sections.py --output sections.jsonl
    apt-cache dumpavail | python docs/experiments/package_sections.py --output topics --split

One package per source package and section, the alphabetically first: others of the same source have nearly the same
description. Equal descriptions are kept once. Archive areas are removed (contrib/net is net). Sections whose members
say nothing of a topic (debug symbols, old libraries, metapackages, tasks, translations) are skipped, as are those
with fewer than --minimum packages.

--split: a folder with train.jsonl and dev.jsonl, every fifth package of a section in the latter, at most --maximum
packages per section.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_SKIPPED = {"debug", "localization", "metapackages", "misc", "oldlibs", "tasks"}


def packages(lines: TextIO) -> Iterator[dict[str, str]]:
    """Fields of the packages of a Debian control file; continuation lines are joined by spaces."""
    fields: dict[str, str] = {}
    last = ""
    for line in lines:
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            text = line.strip()
            fields[last] += "" if text == "." else f" {text}"
        else:
            last, _, value = line.partition(":")
            fields[last] = value.strip()
    if fields:
        yield fields


def descriptions(lines: TextIO, minimum: int) -> dict[str, list[str]]:
    """Section → descriptions, by the names of their packages."""
    chosen: dict[tuple[str, str], tuple[str, str]] = {}
    for fields in packages(lines):
        section = fields.get("Section", "").rpartition("/")[2]
        text = fields.get("Description-en") or fields.get("Description", "")
        if not section or section in _SKIPPED or not text:
            continue
        name = fields["Package"]
        key = section, fields.get("Source", name).split()[0]
        chosen[key] = min(chosen.get(key, (name, text)), (name, text))
    found: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for (section, _), (_, text) in sorted(chosen.items(), key=lambda item: (item[0][0], item[1])):
        if text not in seen:
            seen.add(text)
            found[section].append(text)
    return {section: texts for section, texts in found.items() if len(texts) >= minimum}


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for label, text in rows)
    print(f"{path}: {len(rows):,} descriptions of {len({label for label, _ in rows})} sections")


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="file, or with --split folder")
    parser.add_argument("--minimum", type=int, default=40, metavar="N", help="packages per section (default: 40)")
    parser.add_argument("--split", action="store_true", help="write a training and an evaluation set")
    parser.add_argument("--maximum", type=int, default=250, metavar="N", help="with --split (default: 250)")
    arguments = parser.parse_args()
    found = descriptions(sys.stdin, arguments.minimum)
    if not arguments.split:
        write(arguments.output, [(section, text) for section, texts in found.items() for text in texts])
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, is_dev in (("train", False), ("dev", True)):
        rows = [
            (section, text)
            for section, texts in found.items()
            for i, text in enumerate(texts[: arguments.maximum])
            if (i % 5 == 4) == is_dev
        ]
        write(arguments.output / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
