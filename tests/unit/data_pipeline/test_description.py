"""Corpora from YAML descriptions: source formats, mixtures, counts of document rules, reproducible bytes."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from data_pipeline.__main__ import main
from data_pipeline.build import build, pack, tokenize
from data_pipeline.manifest import read_manifest
from data_pipeline.reports.describe import describe
from data_pipeline.reports.scan import verify
from data_pipeline.sources.description import read_description
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from tests.support.documents import (
    ROOT,
    corpus_documents,
    describe_in,
    make_documents,
    tree,
    write_text,
    write_tokenizer,
)

SIZES: dict[str, Any] = {"work_size": 0.003, "shard_size": 0.003, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("description")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder


def encoded(folder: Path, documents: list[str]) -> list[list[int]]:
    words = Encoder(folder / "tok").tokenizer
    return [words.encode(document, add_special_tokens=False).ids for document in documents]


def write_wiki(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    articles = [
        f'<doc id="{i}" url="https://example.org/?curid={i}" title="T{i}">\nT{i}\n\n{text}\n\n</doc>\n'
        for i, text in enumerate(documents)
    ]
    path.write_text("".join(articles), encoding="utf-8")
    return path


@pytest.mark.parametrize("work_size", [0.0004, 1])
def test_source_formats(folder: Path, tmp_path: Path, work_size: float) -> None:
    texts = {name: make_documents(30, seed=i) for i, name in enumerate(("arrow", "csv", "split", "text", "wiki"))}
    data = datasets.Dataset.from_dict({"id": list(range(30)), "body": texts["arrow"]})
    data.save_to_disk(tmp_path / "arrow", num_shards=3)
    two = {"train": datasets.Dataset.from_dict({"text": texts["split"]}), "test": data}
    datasets.DatasetDict(two).save_to_disk(tmp_path / "split")
    datasets.Dataset.from_dict({"text": texts["csv"]}).to_csv(tmp_path / "a.csv")
    write_text(tmp_path / "notes.md", texts["text"])
    write_wiki(tmp_path / "wiki/AA/wiki_00", texts["wiki"][:20])
    write_wiki(tmp_path / "wiki/AB/wiki_00", texts["wiki"][20:])
    sources = [
        {"name": "wiki", "inputs": ["wiki"], "format": "wikiextractor"},
        {"name": "text", "inputs": ["notes.md"], "format": "text"},
        {"name": "split", "inputs": ["split"], "format": "dataset", "split": "train"},
        {"name": "csv", "inputs": ["*.csv"], "format": "builder:csv"},
        {"name": "arrow", "inputs": ["arrow"], "format": "dataset", "text_field": "body"},
    ]
    description = describe_in(tmp_path, sources)
    options = SIZES | {"work_size": work_size}
    manifest = build(None, folder / "tok", 16, tmp_path / "out", description=description, **options)
    wiki = [f"T{i}\n\n{t}" for part in (texts["wiki"][:20], texts["wiki"][20:]) for i, t in enumerate(part)]
    expected = [t for name in sorted(texts) for t in (wiki if name == "wiki" else texts[name])]
    assert corpus_documents(tmp_path / "out") == encoded(folder, expected)
    assert [entry.name for entry in manifest.mixture] == sorted(texts)
    assert [entry.documents for entry in manifest.mixture] == [30] * 5
    assert sum(entry.tokens for entry in manifest.mixture) == sum(map(len, encoded(folder, expected)))
    assert {source.name.split("/")[0] for source in manifest.sources} == set(texts)
    verify(tmp_path / "out")
    assert "source wiki" in describe(tmp_path / "out")
    saved = yaml.safe_load((tmp_path / "out/description.yaml").read_text())
    assert [source["name"] for source in saved["sources"]] == sorted(texts)


def test_mixture(folder: Path, tmp_path: Path) -> None:
    for name in ("books", "web", "wiki"):
        write_text(tmp_path / f"{name}.txt", [f"{name} {i} of" for i in range(600)])
    sources = [
        {"name": "wiki", "inputs": ["wiki.txt"], "weight": 2.5},
        {"name": "web", "inputs": ["web.txt"], "weight": 0.25},
        {"name": "books", "inputs": ["books.txt"]},
    ]
    description = describe_in(tmp_path, sources)
    tokenize(None, folder / "tok", tmp_path / "tokens", description=description, work_size=0.002, progress=False)
    manifest = pack(tmp_path / "tokens", 16, tmp_path / "out", shard_size=0.003, progress=False)
    found = corpus_documents(tmp_path / "out")
    times = Counter(map(tuple, found))

    def uses(name: str) -> list[int]:
        return [times[tuple(ids)] for ids in encoded(folder, [f"{name} {i} of" for i in range(600)])]

    assert uses("books") == [1] * 600
    assert set(uses("web")) == {0, 1}
    assert 0.2 < sum(uses("web")) / 600 < 0.3
    assert set(uses("wiki")) == {2, 3}
    assert 0.4 < sum(uses("wiki")) / 600 - 2 < 0.6
    assert [entry.documents for entry in manifest.mixture] == [sum(uses(name)) for name in ("books", "web", "wiki")]
    # Copies are far apart: all first copies, then all second copies.
    wiki = encoded(folder, ["wiki 0 of"])[0]
    first, second = [i for i, document in enumerate(found) if document == wiki][:2]
    assert second - first >= 600
    # Other weights need no new tokenize; a separate build gives the same bytes.
    weights = {"wiki": 1.0, "web": 1.0}
    assert pack(tmp_path / "tokens", 16, tmp_path / "even", weights=weights, progress=False).documents == 1800
    again = build(None, folder / "tok", 16, tmp_path / "built", description=description, **SIZES)
    assert again == manifest
    shutil.move(tmp_path / "corpus.yaml", tmp_path / "other.yaml")
    describe_in(tmp_path, sources[::-1])
    build(None, folder / "tok", 16, tmp_path / "reversed", description=description, workers=2, **SIZES)
    assert tree(tmp_path / "reversed") == tree(tmp_path / "built")
    again_with = ["pack", tmp_path / "tokens", "--sequence-length", 16, "--output", tmp_path / "even", "--weight"]
    assert main([str(item) for item in [*again_with, "web=1", "--weight", "wiki=1"]]) == 0
    assert main([str(item) for item in [*again_with, "wiki=2"]]) == 1


def test_weights_select_independently_of_the_held_out_split(folder: Path, tmp_path: Path) -> None:
    """Both select documents by one hash; by the same bits, the training side would keep less, or nothing."""
    write_text(tmp_path / "web.txt", [f"web {i} of" for i in range(1500)])
    description = describe_in(tmp_path, [{"name": "web", "inputs": ["web.txt"], "weight": 0.3}])
    options = SIZES | {"held_out": 0.3}
    manifest = build(None, folder / "tok", 16, tmp_path / "out", description=description, **options)
    trained = 1500 - read_manifest(tmp_path / "out" / "held_out").documents
    assert trained == pytest.approx(1050, abs=90)
    # Standard deviation √(1,050 · 0.3 · 0.7) = 15.
    assert manifest.documents == pytest.approx(0.3 * trained, abs=75)


def test_stats_of_each_source(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of unknown tokens and repeated documents against direct counts, for any work size and without names."""
    rng = random.Random(8)
    texts = {name: make_documents(60, seed=i, longest=12) for i, name in enumerate(("books", "web"))}
    texts["web"] += texts["books"][:15] + rng.choices(texts["web"], k=25)
    for name, documents in texts.items():
        write_text(tmp_path / f"{name}.txt", documents)
    sources = [
        {"name": "web", "inputs": ["web.txt"], "weight": 0.5},
        {"name": "books", "inputs": ["books.txt"], "weight": 2},
    ]
    description = describe_in(tmp_path, sources, documents={"min_characters": 9})
    manifest = build(None, folder / "tok", 16, tmp_path / "out", description=description, **SIZES)
    before: set[tuple[int, ...]] = set()
    for entry in manifest.mixture:
        long = [document for document in texts[entry.name] if len(document) >= 9]
        found = encoded(folder, long)
        assert entry.dropped == {"too_short": len(texts[entry.name]) - len(long)}
        assert entry.unknown == sum(ids.count(1) for ids in found) / sum(map(len, found))
        again = 0
        for ids in map(tuple, found):
            again += ids in before
            before.add(ids)
        assert entry.repeated == again / len(found)
        assert f"unknown {entry.unknown:.2%}, repeated {entry.repeated:.2%}" in describe(tmp_path / "out")
    again = build(None, folder / "tok", 16, tmp_path / "other", description=description, **SIZES | {"work_size": 1})
    assert again.mixture == manifest.mixture
    # From the packed corpus: copies due to a weight above 1 count as repeated.
    stored = list(map(tuple, corpus_documents(tmp_path / "out")))
    repeated = len(stored) - len(set(stored))
    assert f"{repeated:,} documents ({repeated / len(stored):.2%}) equal an earlier one\n" in describe(tmp_path / "out")
    # With documents that continue in the next block of rows, and with sampling by hash.
    monkeypatch.setattr("data_pipeline.reports.scan._ROWS", 3)
    assert f"{repeated:,} documents" in describe(tmp_path / "out")
    monkeypatch.setattr("data_pipeline.packing.source_counts._SAMPLE", len(stored) // 3)
    assert ", estimated from a sample of " in describe(tmp_path / "out")


def near_copy(document: str, rng: random.Random) -> str:
    words = document.split()
    for _ in range(max(len(words) // 200, 1)):
        words[rng.randrange(len(words))] = f"changed{rng.randrange(10**6)}"
    return " ".join(words)


def messy_corpus(folder: Path) -> tuple[Path, list[str]]:
    """Write documents many of which violate a rule; returns the description and the documents to keep, in order."""
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    good = [" ".join("".join(rng.choices(letters, k=4)) for _ in range(300)) for _ in range(40)]
    task = "the task has this very sentence of words in it"
    write_text(
        folder / "in/1.txt", [*good[:20], "short", "12 34 56 78 90 12 34 56", good[3], f"before {task} behind it"]
    )
    text = "\n\n".join([*good[20:], near_copy(good[5], rng), good[0], "e\u0301 " + good[21]]).encode()
    (folder / "in/2.txt").write_bytes(text + b"\n\nbad \xff bytes in this one, which is long enough\n")
    write_text(folder / "task.tsv", [f"1\t{task}\t0"])
    rules = {
        "bad_bytes": "skip", "normalize": "nfc", "min_characters": 10, "max_digits": 0.5, "duplicates": "near",
        "decontaminate": ["task*.tsv"], "decontaminate_words": 8,
    }  # fmt: skip
    return describe_in(folder, [{"name": "in", "inputs": ["in"]}], documents=rules), good


def test_dropped_documents_are_counted(folder: Path, tmp_path: Path) -> None:
    description, good = messy_corpus(tmp_path)
    manifest = build(None, folder / "tok", 64, tmp_path / "out", description=description, **SIZES)
    assert corpus_documents(tmp_path / "out") == encoded(folder, good)
    assert manifest.dropped == {
        "bad_bytes": 1, "contaminated": 1, "duplicate": 2, "many_digits": 1, "near_duplicate": 2, "too_short": 1,
    }  # fmt: skip
    assert manifest.schema_version == 2
    assert "dropped, near_duplicate 2\n" in describe(tmp_path / "out")
    for changes in ({"workers": 2}, {"work_size": 0.02}):
        name = next(iter(changes))
        build(None, folder / "tok", 64, tmp_path / name, description=description, **SIZES | changes)
        ours, theirs = tree(tmp_path / name), tree(tmp_path / "out")
        assert (ours.pop("build.json") == theirs.pop("build.json")) == (name == "workers")
        assert ours == theirs


def test_no_duplicate_on_both_sides(folder: Path, tmp_path: Path) -> None:
    """If a training document resembles a held-out one, the training document is dropped."""
    rng = random.Random(5)
    documents = [" ".join(f"{rng.choice('abcdef')}{rng.randrange(10**6)}" for _ in range(300)) for _ in range(60)]
    near = [near_copy(document, rng) for document in documents]
    write_text(tmp_path / "a.txt", [*documents, *near])
    description = describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"]}], documents={"duplicates": "near"})
    manifest = build(None, folder / "tok", 64, tmp_path / "out", description=description, held_out=0.3, **SIZES)
    assert manifest.dropped == {"near_duplicate": 60}
    pairs = dict(zip(map(tuple, encoded(folder, documents)), map(tuple, encoded(folder, near)), strict=True))
    pairs |= {two: one for one, two in pairs.items()}
    train, held = (set(map(tuple, corpus_documents(tmp_path / side))) for side in ("out", "out/held_out"))
    assert len(train) + len(held) == 60
    assert not train & {pairs[document] for document in held}
    # The split depends on the hash of the document alone, not on its duplicates.
    assert len(held) > 15


def test_duplicates_in_more_shards_than_files_may_be_open(folder: Path, tmp_path: Path) -> None:
    documents = make_documents(20, longest=8)
    write_text(tmp_path / "a.txt", [*documents, *documents])
    path = describe_in(tmp_path, [{"name": "a", "inputs": ["a.txt"]}], documents={"duplicates": "near"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(soft) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        found = tokenize(None, folder / "tok", tmp_path / "out", description=path, work_size=1e-6, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found.shards) == 40
    assert sum(found.dropped.values()) >= 20


def test_paths_of_a_description_are_relative_to_it(tmp_path: Path) -> None:
    found = read_description(describe_in(tmp_path, [{"name": "a", "inputs": ["x/*.txt", "/data/y"]}]))
    assert found.sources[0].inputs == (str(tmp_path / "x/*.txt"), "/data/y")


CRASH = """
import os, sys
from pathlib import Path
from data_pipeline.build import pack, tokenize

description, tokenizer, folder = sys.argv[1:]

def run(crash_at):
    # In a child process, since kill -9 skips all clean-up.
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left, rename = crash_at, Path.rename
    def crash_or_rename(path, target):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        return rename(path, target)
    Path.rename = crash_or_rename
    tokenize(None, tokenizer, f"{folder}/tokens", description=description, held_out=0.3, work_size=0.02, progress=False)
    pack(f"{folder}/tokens", 64, f"{folder}/pairs", packing="sop", shard_size=0.02, progress=False)
    os._exit(0)

# Unfinished units of work are repeated, so every run must get further than the last.
kills = 0
while (code := run(5 * kills)) == -9:
    kills += 1
assert code == 0, code
print(kills)
"""


def test_killed_at_every_few_renames(folder: Path, tmp_path: Path) -> None:
    """tokenize with deduplication, and pack with pairs, killed before renames: same bytes."""
    description, _ = messy_corpus(tmp_path)
    script = [sys.executable, "-c", CRASH, str(description), str(folder / "tok"), str(tmp_path / "killed")]
    (tmp_path / "killed").mkdir()
    found = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(found.stdout) > 5
    sizes: dict[str, Any] = {"work_size": 0.02, "progress": False}
    tokenize(None, folder / "tok", tmp_path / "uninterrupted/tokens", description=description, held_out=0.3, **sizes)
    pack(
        tmp_path / "uninterrupted/tokens",
        64,
        tmp_path / "uninterrupted/pairs",
        packing="sop",
        shard_size=0.02,
        progress=False,
    )
    assert tree(tmp_path / "killed") == tree(tmp_path / "uninterrupted")
