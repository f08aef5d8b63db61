"""Small tokenizers, texts and reference implementations for tests of the data pipeline."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_pipeline.shards import Corpus

ROOT = Path(__file__).parents[2]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "with",
    "they",
    "at",
]


def write_tokenizer(folder: Path, extra: Sequence[str] = ()) -> Path:
    """An old-style BERT tokenizer folder (vocab.txt): letters, digits, punctuation and some words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [
        *SPECIAL,
        *letters,
        *(f"##{c}" for c in letters),
        *".,:;!?[]()'-",
        *WORDS[:5],
        *WORDS[6:],
        *extra,
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return folder


def make_documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Random documents of words from WORDS, numbers and names, with line breaks but without blank lines."""
    rng = random.Random(seed)
    pieces = [*WORDS, "Zürich", "naïve", "42", "[SEP]", "[MASK]", "x.", "漢字", "quux,"]
    return [
        "".join(rng.choice(pieces) + rng.choice([" ", " ", " ", "\n"]) for _ in range(rng.randint(1, longest))).strip()
        for _ in range(count)
    ]


def write_text(path: Path, documents: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_pipeline", *map(str, arguments)]


def run_command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command(*arguments), cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, **options
    )


def reference_pack(documents: Sequence[Sequence[int]], length: int) -> tuple[list[list[int]], list[bool]]:
    """Full-sequence packing, token by token."""
    rows: list[list[int]] = []
    ends: list[bool] = []
    row: list[int] = []

    def close(end: bool) -> None:
        rows.append([CLS, *row, SEP] + [PAD] * (length - 2 - len(row)))
        ends.append(end)
        row.clear()

    for document in documents:
        for token in [*document, SEP]:
            if len(row) == length - 2:
                close(end=token == SEP)
                if token == SEP:
                    continue
            row.append(token)
    if row:
        assert row.pop() == SEP
        close(end=True)
    return rows, ends


def unpack(rows: np.ndarray, document_end: np.ndarray) -> Iterator[list[int]]:
    """Documents recovered from rows and document_end bits alone."""
    document: list[int] = []
    for row, end in zip(rows.tolist(), document_end.tolist(), strict=True):
        tokens = [token for token in row if token != PAD]
        assert tokens[0] == CLS
        assert tokens[-1] == SEP
        for token in tokens[1:-1]:
            if token == SEP:
                yield document
                document = []
            else:
                document.append(token)
        if end:
            yield document
            document = []
    assert not document


def corpus_documents(folder: Path) -> list[list[int]]:
    corpus = Corpus(folder)
    shards = range(len(corpus.manifest.shards))
    rows = np.concatenate([corpus.input_ids(i) for i in shards])
    return list(unpack(rows, np.concatenate([corpus.document_end(i) for i in shards])))


def rows_of(folder: Path) -> tuple[Corpus, np.ndarray, dict[str, np.ndarray]]:
    """The corpus, all its rows as read by the trainer, and their columns."""
    corpus = Corpus(folder)
    rows = np.arange(corpus.rows)
    ids = np.empty((corpus.rows, corpus.sequence_length), corpus.dtype)
    corpus.take(rows, out=ids)
    return corpus, ids, {name: corpus.take_column(name, rows) for name in ("document_end", *corpus.manifest.columns)}


def describe_in(folder: Path, sources: list[dict[str, Any]], **others: object) -> Path:
    """Write a corpus description, corpus.yaml."""
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump({"sources": sources, **others}))
    return path
