"""The SHA-256 that a manifest carries of itself, so that a changed value is found where nothing contradicts it.

A manifest is a JSON object whose key `sha256` is the hash of the others, in a form that does not depend on white space
or the order of keys. Manifests of earlier versions have no such key and are read without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import CorpusError

KEY = "sha256"


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object's canonical form, without the key `sha256` itself."""
    rest = {key: value for key, value in content.items() if key != KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The object with its hash as the first key."""
    return {KEY: checksum(content), **content}


def without_checksum(content: dict[str, Any], path: Path, remedy: str) -> dict[str, Any]:
    """The object read from `path` without its hash. Raises CorpusError if it has one that does not match."""
    if KEY in content and (found := checksum(content)) != content[KEY]:
        raise CorpusError(
            f"{path}: sha256 {content[KEY]} expected, {found} found: its content was modified or damaged. {remedy}"
        )
    return {key: value for key, value in content.items() if key != KEY}


def is_hashed(path: Path) -> bool:
    """Whether a manifest that has been read carries a hash of itself."""
    return KEY in json.loads(path.read_bytes())


def not_hashed(manifests: Sequence[Path]) -> str:
    """The remark that manifests carry no hash of themselves."""
    names = ", ".join(map(str, manifests))
    return (
        f"{names}: not hashed (written by an earlier version), so a changed special token or vocabulary size would not "
        "be noticed. Run the command that wrote it again, into a new folder, to protect it"
    )
