"""Unknown tokens: shown, warned of, refused; tokenizers without tokens; finished output that cannot be written to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from data_pipeline.__main__ import main
from data_pipeline.arguments import Safeguards
from data_pipeline.build import build, pack, tokenize
from data_pipeline.files import CorpusError
from data_pipeline.sources.description import read_description
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import describe_in, make_documents, run_command, tree, write_text, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder / "tok"


# --- unknown tokens


def text_with(unknown: int, of: int) -> list[str]:
    return [" ".join("漢" if i < unknown else "the" for i in range(of))]


@pytest.mark.parametrize("command", ["build", "tokenize"])
@pytest.mark.parametrize(
    ("unknown", "of", "options", "outcome"),
    [
        (0, 100, [], "silent"),
        (2, 100, [], "silent"),
        (3, 100, [], "warning"),
        (50, 100, [], "warning"),
        (51, 100, [], "error"),
        (100, 100, [], "error"),
        (100, 100, ["--max-unknown", 1], "warning"),
        (3, 100, ["--max-unknown", 0.02], "error"),
        (2, 100, ["--max-unknown", 0.01], "error"),
    ],
)
def test_share_of_unknown_tokens(
    command: str,
    unknown: int,
    of: int,
    options: list[object],
    outcome: str,
    tmp_path: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_text(tmp_path / "a.txt", text_with(unknown, of))
    words = [command, "--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "out", *options]
    words += ["--sequence-length", 16] if command == "build" else []
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    fact = f"{unknown / of:.1%} of {of:,} tokens are unknown ([UNK])"
    assert status == (outcome == "error")
    if outcome == "error":
        assert re.fullmatch(rf"error: {re.escape(fact)}, the limit is .*raise --max-unknown\n", captured.err)
        assert not (tmp_path / "out/manifest.json").exists()
        # What was done is kept: with the option, the same command completes.
        options = ["--max-unknown", 1]
        assert main([str(word) for word in [*words, *options]]) == 0
        captured = capsys.readouterr()
    else:
        assert captured.err.startswith(f"warning: {fact}. Language, case and accents" if outcome == "warning" else "")
        assert bool(captured.err) == (outcome == "warning")
    assert f", {unknown / of:.2%} of the text unknown" in captured.out


def test_unknown_tokens_of_one_source(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A small source is not hidden by a large one, nor a held-out side by the training side."""
    write_text(tmp_path / "a.txt", text_with(0, 10_000))
    write_text(tmp_path / "b.txt", text_with(51, 100))
    about = describe_in(tmp_path, [{"name": n, "inputs": [f"{n}.txt"]} for n in "ab"])
    with pytest.raises(CorpusError, match=r"^source b: 51.0% of 100 tokens are unknown"):
        build(None, tokenizer, 16, tmp_path / "out", description=about, progress=False)
    options: dict[str, Any] = {"safeguards": Safeguards(max_unknown=0.6), "progress": False}
    build(None, tokenizer, 16, tmp_path / "out", description=about, **options)
    assert caplog.messages[-1].startswith("warning: source b: 51.0% of 100 tokens")
    known = [f"the{' of' * i}" for i in range(1, 40)]
    unknown = [f"漢{' 字' * i}" for i in range(1, 5)]
    for seed in range(200):
        source = write_text(tmp_path / "c.txt", [*known, *unknown])
        try:
            build([source], tokenizer, 16, tmp_path / f"c{seed}", held_out=0.02, seed=seed, progress=False)
        except CorpusError as error:
            if "side held_out: 100.0% of" in str(error):
                return
    pytest.fail("no seed put only unknown documents into the held-out side")


def test_tokenizer_without_tokens(tmp_path: Path) -> None:
    """What transformers 5 saves for BertTokenizer(vocab_file=…): the special tokens alone."""
    from transformers import BertTokenizer

    vocabulary = write_tokenizer(tmp_path / "vocab") / "vocab.txt"
    BertTokenizer(vocab_file=str(vocabulary), do_lower_case=True).save_pretrained(tmp_path / "tok")
    source = write_text(tmp_path / "a.txt", make_documents(3))
    with pytest.raises(
        CorpusError, match=rf"^{tmp_path}/tok/tokenizer\.json: has no tokens besides its 5 special ones"
    ):
        build([source], tmp_path / "tok", 16, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    BertTokenizer(vocab=str(vocabulary), do_lower_case=True).save_pretrained(tmp_path / "good")
    build([source], tmp_path / "good", 16, tmp_path / "out", progress=False)


# --- finished output


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; skipped if mounting is not permitted (needs root with CAP_SYS_ADMIN)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("leftover", [False, True])
def test_finished_output_on_a_read_only_file_system(
    leftover: bool, disk: Path, tmp_path: Path, tokenizer: Path
) -> None:
    """Each command is run again and succeeds, also if it was killed before it removed its work folder."""
    source = write_text(tmp_path / "a.txt", make_documents(60))
    commands = [
        ["build", "--input", source, "--tokenizer", tokenizer, "--sequence-length", 16, "--held-out", 0.3],
        ["tokenize", "--input", source, "--tokenizer", tokenizer],
        ["pack", disk / "tokenize", "--sequence-length", 16],
    ]
    for words in commands:
        assert run_command(*words, "--output", disk / str(words[0])).returncode == 0
        if leftover:
            (disk / str(words[0]) / ".build/results").mkdir(parents=True)
    before = tree(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for words in commands:
        done = run_command(*words, "--output", disk / str(words[0]))
        assert done.returncode == 0, done.stderr
    changed = run_command(*commands[0], "--seed", 1, "--output", disk / "build")
    assert changed.returncode == 1
    assert "other arguments: seed was 0, is now 1" in changed.stderr
    assert tree(disk) == before
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    for words in commands:
        assert run_command(*words, "--output", disk / str(words[0])).returncode == 0
        assert not (disk / str(words[0]) / ".build").exists()


def test_finished_output_is_not_touched(tmp_path: Path, tokenizer: Path) -> None:
    source = write_text(tmp_path / "a.txt", make_documents(20))
    tokenize([source], tokenizer, tmp_path / "tokens", progress=False)
    pack(tmp_path / "tokens", 16, tmp_path / "out", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    tokenize([source], tokenizer, tmp_path / "tokens", progress=False)
    pack(tmp_path / "tokens", 16, tmp_path / "out", progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before


# --- globs of datasets


def test_globs_of_datasets(tmp_path: Path, tokenizer: Path) -> None:
    texts = make_documents(30)
    for i, name in enumerate(["part-0", "part-1", "other"]):
        datasets.Dataset.from_dict({"text": texts[i * 10 : i * 10 + 10]}).save_to_disk(tmp_path / "saved" / name)
    source = {"name": "a", "inputs": ["saved/part-*"], "format": "dataset"}
    manifest = build(None, tokenizer, 16, tmp_path / "out", description=describe_in(tmp_path, [source]), progress=False)
    assert manifest.documents == 20
    assert [entry.name.split("/")[1] for entry in manifest.sources] == ["part-0", "part-1"]
    for inputs, message in (
        (["saved/none-*"], r"saved/none-\*: no such folder, and no folder matches it\. Format dataset"),
        (["saved/*/*.json"], r"state\.json: is a file, not a folder|dataset_info\.json: is a file, not a folder"),
        (["saved/*", "saved/part-0"], "is listed twice"),
    ):
        about = describe_in(tmp_path, [source | {"inputs": inputs}])
        with pytest.raises(CorpusError, match=message):
            build(None, tokenizer, 16, tmp_path / "no", description=about, progress=False)
        assert not (tmp_path / "no").exists()


def test_deep_description(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text("[" * 20_000, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"corpus\.yaml: not YAML"):
        read_description(tmp_path / "corpus.yaml")
