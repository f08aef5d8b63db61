"""Manifests carry a hash of themselves: a changed value is found, whatever it is; those without a hash are read."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.__main__ import main
from data_pipeline.build import build, pack, tokenize
from data_pipeline.checksums import checksum, with_checksum, without_checksum
from data_pipeline.files import CorpusError
from data_pipeline.manifest import read_manifest
from data_pipeline.shards import Corpus, write_shard
from data_pipeline.tokenization.token_shards import read_tokens
from tests.support.corpora import change_manifest
from tests.support.documents import make_documents, write_text, write_tokenizer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e6, 1e6) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/a.txt; tok; corpus with a held-out corpus; tokens."""
    folder = tmp_path_factory.mktemp("made")
    write_text(folder / "in/a.txt", make_documents(120))
    write_tokenizer(folder / "tok")
    build([folder / "in"], folder / "tok", 16, folder / "corpus", held_out=0.2, progress=False)
    tokenize([folder / "in"], folder / "tok", folder / "tokens", progress=False)
    return folder


def values_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values that are no containers."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    if not isinstance(content, dict | list):
        yield path
    for key, value in items:
        yield from values_of(value, (*path, key))


def changed(content: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy with another value at `path`: the next number, or another last character."""
    content = json.loads(json.dumps(content))
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    value = inner[path[-1]]
    if isinstance(value, str):
        value = value[:-1] + ("1" if value.endswith("0") else "0")
    else:
        value = 1 if value is None else value + 1
    inner[path[-1]] = value
    return content


@given(OBJECTS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_hash_depends_on_values_and_nothing_else(content: dict[str, Any], random: Any) -> None:
    content.pop("sha256", None)
    hashed = with_checksum(content)
    keys = list(hashed)
    random.shuffle(keys)
    other = json.loads(json.dumps({key: hashed[key] for key in keys}, indent=random.choice([None, 3])))
    assert without_checksum(other, Path("m"), "") == content
    assert without_checksum(content, Path("m"), "") == content, "no hash, nothing to compare"
    for path in values_of(content):
        assert checksum(changed(content, path)) != checksum(content)


@pytest.mark.parametrize("name", ["corpus", "tokens"])
def test_every_changed_value_of_a_manifest_is_found(name: str, made: Path, tmp_path: Path) -> None:
    """Among them the special tokens and the size of the vocabulary, which nothing else contradicts."""
    folder = shutil.copytree(made / name, tmp_path / name)
    path = folder / "manifest.json"
    good = json.loads(path.read_bytes())
    read = read_manifest if name == "corpus" else read_tokens
    paths = list(values_of(good))
    assert {("special_tokens", "mask"), ("vocab_size",), ("tokenizer_sha256",)} <= set(paths)
    for where in paths:
        path.write_text(json.dumps(changed(good, where)))
        with pytest.raises(CorpusError):
            read(folder)
    path.write_text(json.dumps(changed(good, ("special_tokens", "mask"))))
    remedy = r"Restore it from a copy or (build the corpus|tokenise) again"
    with pytest.raises(CorpusError, match=rf"manifest\.json: sha256 \w+ expected, \w+ found: .* damaged\. {remedy}"):
        read(folder)
    for indent in (None, 4):
        path.write_text(json.dumps(dict(reversed(good.items())), indent=indent))
        read(folder)


@pytest.mark.parametrize("where", ["corpus", "corpus/held_out", "tokens"])
def test_verify_finds_another_mask_id(
    where: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = where.split("/")[0]
    shutil.copytree(made / name, tmp_path / name)
    path = tmp_path / where / "manifest.json"
    path.write_text(json.dumps(changed(json.loads(path.read_bytes()), ("special_tokens", "mask"))))
    assert main(["verify", str(tmp_path / name)]) == 1
    assert f"error: {path}: sha256 " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["corpus", "tokens"])
def test_manifests_without_a_hash_are_read_and_reported(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made / name, tmp_path / name)
    assert main(["verify", str(folder)]) == 0
    assert "not hashed" not in capsys.readouterr().out
    change_manifest(folder, lambda _: None, hashed=False)
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr()
    assert f"{folder / 'manifest.json'}: not hashed (written by an earlier version)" in said.out
    assert said.out.count("not hashed") == 1
    if name == "corpus":
        assert Corpus(folder).remarks == (said.out.splitlines()[-1],)
        assert Corpus(folder / "held_out").remarks == ()


def test_verify_compares_a_manifest_without_a_hash_with_its_tokenizer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made / "corpus", tmp_path / "corpus")
    mask = read_manifest(folder).special_tokens.mask
    change_manifest(folder, lambda m: m["special_tokens"].update(mask=mask + 10), hashed=False)
    assert main(["verify", str(folder)]) == 1
    assert f"special_tokens.mask is {mask + 10}, {mask} in the tokenizer. Restore" in capsys.readouterr().err


def test_packing_token_shards_without_a_hash_warns_once(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = shutil.copytree(made / "tokens", tmp_path / "tokens")
    with caplog.at_level(logging.WARNING):
        pack(tokens, 16, tmp_path / "one", progress=False)
        assert "not hashed" not in caplog.text
        change_manifest(tokens, lambda _: None, hashed=False)
        pack(tokens, 16, tmp_path / "two", progress=False)
    assert caplog.text.count("not hashed") == 1
    assert read_manifest(tmp_path / "one").shards == read_manifest(tmp_path / "two").shards


def test_full_verification_names_the_row_of_an_id_beyond_the_vocabulary(made: Path, tmp_path: Path) -> None:
    """As a broken packer would write it: all hashes are right."""
    folder = shutil.copytree(made / "corpus", tmp_path / "corpus")
    corpus = Corpus(folder)
    vocab_size, ids, ends = corpus.manifest.vocab_size, corpus.input_ids(0).copy(), corpus.document_end(0)
    ids[7, 3] = vocab_size
    ids[9, 2] = vocab_size + 1
    entry = write_shard(folder, "shard-00000.arrow", ids, ends)
    change_manifest(folder, lambda m: m["shards"].__setitem__(0, entry.model_dump(exclude={"length"})))
    found = rf"shard-00000\.arrow: row 7 has id {vocab_size}, must be below the vocabulary size {vocab_size}"
    with pytest.raises(CorpusError, match=found):
        Corpus(folder).verify()
    with pytest.raises(CorpusError, match=found):
        Corpus(folder).verify([0])
    Corpus(folder).verify([])
    ids[[7, 9], [3, 2]] = vocab_size - 1
    entry = write_shard(folder, "shard-00000.arrow", ids, ends)
    change_manifest(folder, lambda m: m["shards"].__setitem__(0, entry.model_dump(exclude={"length"})))
    Corpus(folder).verify()
    assert np.array_equal(Corpus(folder).input_ids(0), ids)
