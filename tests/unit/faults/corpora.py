"""Faults of finished corpora and token shards, met by `data_pipeline`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.build import tokenize
from tests.support.corpora import change_manifest
from tests.unit.faults.case import Fault, Prepare, changes, cuts, flips, removes


def manifest(change: Callable[[dict[str, Any]], object]) -> Prepare:
    """Change the corpus's manifest, with a hash that agrees."""
    return lambda folder: change_manifest(folder / "corpus", change)


def other_mask(folder: Path) -> None:
    change_manifest(folder / "corpus", lambda content: content["special_tokens"].update(mask=14), hashed=False)


def flipped_tokens(folder: Path) -> None:
    tokenize([folder / "texts"], folder / "tok", folder / "tokens", progress=False)
    flips("tokens/tokens-00000.train.ids")(folder)


FAULTS = [
    Fault(
        "verify: a flipped bit in a shard",
        "data_pipeline verify corpus",
        "corpus/shard-00000.arrow: sha256 … expected, … found: the file was modified or damaged. Copy it "
        "again or build the corpus again",
        prepare=flips("corpus/shard-00000.arrow"),
    ),
    Fault(
        "verify: a shard that is cut",
        "data_pipeline verify corpus",
        "corpus/shard-00000.arrow: 12,410 bytes expected, 12,409 found. Copy it again or build the corpus again",
        prepare=cuts("corpus/shard-00000.arrow"),
    ),
    Fault(
        "verify: a shard that is gone",
        "data_pipeline verify corpus",
        "corpus/shard-00000.arrow: shard is missing. Copy it again or build the corpus again",
        prepare=removes("corpus/shard-00000.arrow"),
    ),
    Fault(
        "verify: a changed tokenizer",
        "data_pipeline verify corpus",
        "corpus/tokenizer/tokenizer.json: sha256 … found, but the corpus was built with the tokenizer …: "
        "ids would have another meaning. Restore that tokenizer or build again",
        prepare=changes("corpus/tokenizer/tokenizer.json", "the", "teh"),
    ),
    Fault(
        "verify: another mask id",
        "data_pipeline verify corpus",
        "corpus/manifest.json: sha256 … expected, … found: its content was modified or damaged. Restore it from a copy "
        "or build the corpus again",
        prepare=changes("corpus/manifest.json", '"mask": 4', '"mask": 14'),
    ),
    Fault(
        "verify: another mask id in a manifest of an earlier version, without a hash",
        "data_pipeline verify corpus",
        "corpus/manifest.json: special_tokens.mask is 14, 4 in the tokenizer. Restore the manifest or build the corpus "
        "again",
        prepare=other_mask,
    ),
    Fault(
        "verify: a count that the shards contradict",
        "data_pipeline verify corpus",
        "corpus/manifest.json: manifest: Value error, rows is 1363, but the shards have 363 rows in total",
        prepare=manifest(lambda content: content.update(rows=content["rows"] + 1000)),
    ),
    Fault(
        "verify: an id beyond the vocabulary",
        "data_pipeline verify corpus",
        "corpus/shard-00000.arrow: row 0 has id …, must be below the vocabulary size 50. Build the corpus again",
        prepare=manifest(lambda content: content.update(vocab_size=50)),
    ),
    Fault(
        "pack: a flipped bit in a token shard",
        "data_pipeline pack tokens --sequence-length 16 --output out",
        "tokens/tokens-00000.train.ids: sha256 … expected, … found: it was modified or damaged after it was written. "
        "Copy it again or tokenise again",
        prepare=flipped_tokens,
    ),
    Fault(
        "verify: a shard outside of the folder",
        "data_pipeline verify corpus",
        "corpus/manifest.json: shards.0.file: Value error, '../corpus/shard-00000.arrow' is not a plain "
        "file name: shards must be in the corpus folder",
        prepare=manifest(lambda content: content["shards"][0].update(file="../corpus/shard-00000.arrow")),
    ),
    Fault(
        "verify: no corpus",
        "data_pipeline verify texts",
        "texts/manifest.json: not found. This is not a corpus, or its build has not finished: rerun the build command",
    ),
    Fault(
        "verify: a manifest of a later version",
        "data_pipeline verify corpus",
        "corpus/manifest.json: schema_version is 91, this version reads 1 and 2. Build the corpus again",
        prepare=changes("corpus/manifest.json", '"schema_version": ', '"schema_version": 9'),
    ),
    Fault(
        "inspect: a row that does not exist",
        "data_pipeline inspect corpus --first 100000",
        "rows 100,000 to 100,004: corpus has the rows 0 to 362",
    ),
]
