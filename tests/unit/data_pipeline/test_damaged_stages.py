"""Files between the stages of a build: whatever is damaged in them is named, and ends in no corpus."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.__main__ import main
from data_pipeline.build import build, pack, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.manifest import MANIFEST
from data_pipeline.tokenization import token_shards
from tests.support.documents import make_documents, tree, write_text, write_tokenizer

SIZES: dict[str, Any] = {"work_size": 0.006, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/, tok, tokens (with a held-out side); about.yaml, a description with duplicates removed."""
    folder = tmp_path_factory.mktemp("stages")
    documents = make_documents(60)
    for i in range(2):
        write_text(folder / f"in/{i}.txt", [*documents[i * 30 : i * 30 + 30], documents[0], documents[7]])
    write_tokenizer(folder / "tok")
    about = {"sources": [{"name": "a", "inputs": ["in"]}], "documents": {"duplicates": "exact"}}
    (folder / "about.yaml").write_text(yaml.safe_dump(about))
    tokenize(None, folder / "tok", folder / "tokens", description=folder / "about.yaml", held_out=0.2, **SIZES)
    return folder


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def killed(at: str, run: Callable[[], object]) -> None:
    """Run until the function `at` is called."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, fail)
        with pytest.raises(KeyboardInterrupt):
            run()


SUFFIXES = [
    "train.ids",
    "train.ends",
    "train.word_start",
    "train.sentence_start",
    "train.keys",
    "train.drop",
    "held_out.ids",
]


@pytest.mark.parametrize(
    ("suffix", "workers"), [*((s, 1) for s in SUFFIXES), ("train.ids", 2), ("tokenizer/tokenizer.json", 1)]
)
def test_pack_refuses_damaged_token_shards(suffix: str, workers: int, folder: Path, tmp_path: Path) -> None:
    tokens = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    if suffix.endswith(".json"):
        path = tokens / suffix
        good = path.read_bytes()
        path.write_bytes(good + b"\n")
    else:
        path = next(path for path in sorted(tokens.glob(f"tokens-*.{suffix}")) if path.stat().st_size)
        good = path.read_bytes()
        flip(path)
    for _ in range(2):
        with pytest.raises(CorpusError) as caught:
            pack(tokens, 16, tmp_path / "out", progress=False, workers=workers)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{path}: sha256 ")
        assert line.endswith("Copy it again or tokenise again")
        assert not (tmp_path / "out").exists()
    path.write_bytes(good)
    pack(tokens, 16, tmp_path / "out", progress=False)


def test_every_damaged_file_has_its_line(folder: Path, tmp_path: Path) -> None:
    tokens = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    bad = [
        sorted(tokens.glob(f"tokens-*.{suffix}"))[number] for suffix, number in (("train.ids", 0), ("train.ends", 1))
    ]
    for path in bad:
        flip(path)
    with pytest.raises(CorpusError) as caught:
        pack(tokens, 16, tmp_path / "out", progress=False)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [str(path) for path in bad]


def test_verify_names_every_bad_file_of_token_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    assert main(["verify", str(tokens), "--progress"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tokens}: OK, 2 token shards checked\n"
    assert "verify: 100%" in err
    flip(tokens / "tokenizer/tokenizer.json")
    flip(sorted(tokens.glob("tokens-*.train.ends"))[1])
    for path in sorted(tokens.glob("tokens-*.train.ids"))[:2]:
        path.unlink()
    with pytest.raises(CorpusError) as caught:
        pack(tokens, 16, tmp_path / "out", progress=False)
    assert str(caught.value).count("bytes expected, file missing") == 2
    assert main(["verify", str(tokens)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit("/", 1)[1].split(":")[0] for line in lines] == [
        "tokenizer.json",
        "tokens-00000.train.ids",
        "tokens-00001.train.ids",
        "tokens-00001.train.ends",
    ]
    (tokens / "tokenizer/tokenizer.json").unlink()
    assert main(["verify", str(tokens)]) == 1
    assert f"{tokens}/tokenizer/tokenizer.json: file missing. Copy it again" in capsys.readouterr().err


def test_packing_asks_once_for_each_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in each of the processes of a job: these may be thousands, on a network file system."""
    asked: list[Path] = []

    def ask(path: Path, file: token_shards.TokenFile) -> str | None:
        asked.append(path)
        return original(path, file)

    original = token_shards.size_fault
    monkeypatch.setattr(token_shards, "size_fault", ask)
    pack(folder / "tokens", 16, tmp_path / "out", progress=False)
    assert sorted(asked) == sorted((folder / "tokens").glob("tokens-*"))


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "source": (lambda m: m["shards"][0].update(source=1), "shard 0 has source 1 and sides"),
    "side": (lambda m: m["shards"][1]["sides"].pop("held_out"), "shard 1 has source 0 and sides train"),
    "weights": (lambda m: m.update(weights=[]), "1 names, but 0 weights"),
    "infinite": (lambda m: m.update(weights=[float("inf")]), "weights.0: Input should be a finite number"),
    "documents": (lambda m: m["shards"][0]["sides"]["train"].update(documents=900), "expected, for 900 documents"),
    "length": (lambda m: m["shards"][0]["sides"]["train"].update(length=7), "expected, for .* documents of 7 ids"),
    "ids": (lambda m: m["shards"][0]["sides"]["train"]["files"].pop("ids"), "shard 0: sizes {'ids': "),
    "vocabulary": (lambda m: m.update(vocab_size=70_000), "shard 0: sizes {'ids': "),
    "special": (lambda m: m["special_tokens"].update(mask=5000), "special token ids must be below vocab_size"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_contradicts_itself_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """Without a hash, as of an earlier version."""
    change, message = CHANGES[name]
    tokens = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    content = json.loads((tokens / MANIFEST).read_text())
    del content["sha256"]
    change(content)
    (tokens / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorpusError, match=message):
        pack(tokens, 16, tmp_path / "out", progress=False)
    assert main(["verify", str(tokens)]) == 1


# Where a build is killed, and the file that is damaged then.
KILLED = [
    ("data_pipeline.tokenization.stage.find_drops", ".build/tokens-*.train.digests", "documents"),
    ("data_pipeline.build._pack_sides", ".build/tokens-*.train.ids", "full_sequences"),
    ("data_pipeline.build._pack_sides", ".build/tokens-*.held_out.ends", "documents"),
    ("data_pipeline.packing.stage.join_rows", ".build/rows-*.input_ids", "documents"),
    ("data_pipeline.packing.stage.join_rows", ".build/rows-*.pair_label", "nsp"),
]


@pytest.mark.parametrize(("at", "damaged", "packing"), KILLED)
def test_a_resumed_build_refuses_files_damaged_meanwhile(
    at: str, damaged: str, packing: str, folder: Path, tmp_path: Path
) -> None:
    def run(name: str) -> None:
        about = folder / "about.yaml"
        out = tmp_path / name
        build(None, folder / "tok", 16, out, description=about, held_out=0.2, packing=packing, **SIZES)

    run("uninterrupted")
    killed(at, lambda: run("out"))
    path = next(path for path in sorted((tmp_path / "out").glob(damaged)) if path.stat().st_size)
    good = path.read_bytes()
    flip(path)
    for _ in range(2):
        with pytest.raises(CorpusError) as caught:
            run("out")
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{path}: sha256 ")
        assert line.endswith("Remove the output folder, then rerun the command")
        assert not (tmp_path / "out" / MANIFEST).exists()
    path.write_bytes(good)
    run("out")
    assert tree(tmp_path / "out") == tree(tmp_path / "uninterrupted")


def test_rows_of_an_earlier_version_have_no_hashes_and_are_used(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> None:
        build([folder / "in"], folder / "tok", 16, tmp_path / "out", packing="documents", **SIZES)

    killed("data_pipeline.packing.stage.join_rows", run)
    for path in (tmp_path / "out/.build/results").glob("train.rows-*.json"):
        result = json.loads(path.read_text())
        assert result.pop("sha256")
        path.write_text(json.dumps(result))
    run()
    assert caplog.text.count("are not hashed") == 1
