"""Invalid input and full disks: exit code, message, and no incomplete files."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.__main__ import main
from data_pipeline.build import build
from data_pipeline.files import CorpusError
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.corpora import change_manifest
from tests.support.documents import ROOT, command, make_documents, run_command, tree, write_text, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    return folder / "tok"


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: Path) -> Path:
    """A valid corpus of several shards with held-out documents."""
    write_text(tmp_path / "a.txt", make_documents(100))
    build(
        [tmp_path / "a.txt"],
        tokenizer,
        16,
        tmp_path / "corpus",
        held_out=0.3,
        shard_size=0.002,
        progress=False,
    )
    return tmp_path / "corpus"


def fails(capsys: pytest.CaptureFixture[str], arguments: list[object], message: str) -> str:
    """Run a command that must fail with exit code 1 and one line on stderr, in this process."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err
    assert all(line.startswith("error: ") for line in captured.err.splitlines())
    return captured.err


def json_lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


BIG = "\n\n".join(make_documents(400)).encode()
INPUTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "the corpus is empty: no text in .*a.txt. Add text"),
    "blank": ("a.txt", b" \n\n\t\n", "the corpus is empty"),
    "no tokens": ("a.jsonl", json_lines({"text": ""}, {"text": "\u200d"}), "the corpus is empty"),
    "latin-1": ("a.txt", b"good\n\nb\xe4d\n", r"a\.txt: not UTF-8 at byte 7 \(0xe4.*Convert the file"),
    "gzip cut": (
        "a.txt.gz",
        gzip.compress(BIG)[:-9],
        r"a\.txt\.gz: corrupt gzip file \(Truncated.*Copy or create",
    ),
    "gzip broken": ("a.txt.gz", gzip.compress(BIG)[:-9] + b"x" * 9, r"a\.txt\.gz: corrupt gzip file"),
    "no gzip": ("a.txt.gz", BIG, r"a\.txt\.gz: corrupt gzip file"),
    "zstd cut": ("a.txt.zst", zstandard.compress(BIG)[:-9], r"a\.txt\.zst: corrupt zstd file \(Truncated"),
    "no zstd": ("a.jsonl.zst", BIG, r"a\.jsonl\.zst: corrupt zstd file"),
    "no json": (
        "a.jsonl",
        json_lines({"text": "x"}) + b"{text}\n",
        r"a\.jsonl:2: not JSON .*must be a JSON object",
    ),
    "no field": (
        "a.jsonl",
        json_lines({"text": "x"}, {"body": "x"}),
        r"a\.jsonl:2: has no field 'text', only body",
    ),
    "no parquet": ("a.parquet", BIG, r"a\.parquet: corrupt Parquet file"),
    "other suffix": ("a.doc", BIG, r"a\.doc: unknown file type\. Supported: \.txt"),
}


# Errors of worker processes take another path, the same for all of them.
@pytest.mark.parametrize(
    ("case", "workers"), [*((case, 1) for case in INPUTS), ("latin-1", 2), ("gzip cut", 2), ("no parquet", 2)]
)
def test_bad_input(
    case: str, workers: int, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, message = INPUTS[case]
    (tmp_path / name).write_bytes(data)
    inputs = [tmp_path / name]
    if workers == 2:
        # Valid files as well, to have more than one unit of work.
        inputs += [write_text(tmp_path / f"good{i}.txt", make_documents(50)) for i in range(2)]
    options = ["--tokenizer", tokenizer, "--sequence-length", 16, "--workers", workers, "--work-size", 0.005]
    output = tmp_path / "out"
    fails(capsys, ["build", "--input", *inputs, *options, "--output", output], message)
    assert not list(tmp_path.rglob("*.arrow"))
    assert not list(tmp_path.rglob("*.partial"))
    assert not (output / "manifest.json").exists()
    if workers == 1:
        assert not output.exists()


def test_parquet_without_the_column(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    options = ["--tokenizer", tokenizer, "--sequence-length", 16, "--output", tmp_path / "out"]
    message = r"a\.parquet: has no column 'text', only body\. Set --text-field to the column that holds the text"
    fails(capsys, ["build", "--input", tmp_path, *options], message)
    assert not (tmp_path / "out").exists()
    assert main([str(x) for x in ["build", "--input", tmp_path, *options, "--text-field", "body"]]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequence-length", 7], "sequence length 7: must be from 8 to 1,048,576"),
        (["--sequence-length", -1], "sequence length -1: must be from 8"),
        (["--sequence-length", 16, "--workers", 0], "workers 0: must be from 1 to 4,096"),
        (["--sequence-length", 10**18], "sequence length 1000000000000000000: must be from 8"),
        (["--sequence-length", 16, "--workers", 10**18], "workers 1000000000000000000: must be from 1"),
        (["--sequence-length", 16, "--held-out", 1], r"held-out share 1\.0: must be from 0 to below 1"),
        (["--sequence-length", 16, "--held-out", 1e-12], "the held-out split gets none of"),
        (["--sequence-length", 16, "--seed", -1], "seed -1: must be from 0"),
        (["--sequence-length", 16, "--shard-size", 0], r"shard size 0\.0: must be above 0"),
    ],
)
def test_bad_arguments(
    options: list[object], message: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "a.txt", ["text"])
    start = ["build", "--input", tmp_path / "a.txt", "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    fails(capsys, [*start, *options], message)
    assert not (tmp_path / "out").exists()


def test_usage_error_has_exit_code_2(tmp_path: Path) -> None:
    for arguments in (["build", "--input", "x"], ["bild"], [], ["build", "--documents", "page"]):
        found = run_command(*arguments)
        assert found.returncode == 2
        *_, usage, error = found.stderr.splitlines()
        assert "python -m data_pipeline" in usage
        assert error.startswith("python -m data_pipeline")
        assert len(found.stderr.splitlines()) < 8, "the error is not below a long usage"
    found = run_command("build", "--input", "x", "--tokenizer", tmp_path, "--sequence-length", 16, "--output", "y")
    assert (found.returncode, found.stderr) == (
        1,
        "error: x: no such file or folder, and no file matches it\n",
    )


def test_foreign_output_folder(
    tmp_path: Path, tokenizer: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [
        "build",
        "--input",
        tmp_path / "a.txt",
        "--tokenizer",
        tokenizer,
        "--sequence-length",
        32,
        "--output",
    ]
    for folder, message in (
        (tokenizer, "output folder is not empty and holds no build. Choose another, or remove it"),
        (tmp_path / "a.txt", "is a file, the output must be a folder"),
        (corpus, "output folder holds a build with other arguments: sequence_length was 16, is now 32"),
    ):
        before = tree(folder)
        fails(capsys, [*start, folder], message)
        assert tree(folder) == before


def change_byte(path: Path, position: int = -300) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def link_away(corpus: Path) -> None:
    (corpus / "shard-00001.arrow").rename(corpus.parent / "away.arrow")
    (corpus / "shard-00001.arrow").symlink_to(corpus.parent / "away.arrow")


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: change_byte(c / "shard-00001.arrow"), r"shard-00001\.arrow: sha256 .* expected, .* found"),
        (lambda c: change_byte(c / "held_out/shard-00000.arrow"), r"held_out/shard-00000\.arrow: sha256"),
        (lambda c: os.truncate(c / "shard-00001.arrow", 500), r"shard-00001\.arrow: .* expected, 500 found"),
        (lambda c: (c / "shard-00001.arrow").unlink(), r"shard-00001\.arrow: shard is missing"),
        (link_away, r"shard-00001\.arrow: links to outside the corpus folder"),
        (
            lambda c: change_manifest(c, lambda m: m["shards"][0].update(file="../away.arrow")),
            r"manifest\.json: shards\.0\.file: .*'\.\./away\.arrow' is not a plain file name",
        ),
        (
            lambda c: change_manifest(c, lambda m: m["shards"][0].update(file="/away.arrow")),
            "'/away.arrow' is not a plain file name",
        ),
        (lambda c: change_byte(c / "tokenizer/tokenizer.json", 3), r"tokenizer\.json: sha256 .*Restore that"),
        (lambda c: (c / "tokenizer/tokenizer.json").unlink(), r"tokenizer\.json: missing"),
        (
            lambda c: change_manifest(c, lambda m: m.update(documents=m["documents"] + 1)),
            r"manifest\.json: \d+ documents stated, \d+ found in the shards",
        ),
        (
            lambda c: change_manifest(c, lambda m: m.update(tokens=m["tokens"] - 1)),
            r"manifest\.json: [\d,]+ tokens stated, [\d,]+ found in the shards",
        ),
        (
            lambda c: change_manifest(c, lambda m: m.update(vocab_size=50)),
            r"shard-00000\.arrow: row \d+ has id \d+, must be below the vocabulary size 50",
        ),
        (
            lambda c: (c / "manifest.json").unlink(),
            r"manifest\.json: not found\. .*rerun the build command",
        ),
    ],
)
def test_verify_names_the_damage(
    damage: Damage, message: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(corpus)]) == 0
    damage(corpus)
    fails(capsys, ["verify", corpus], message)


def test_verify_names_every_damaged_file(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["shard-00000.arrow", "shard-00002.arrow", "tokenizer/tokenizer.json", "held_out/shard-00000.arrow"]
    for name in bad:
        change_byte(corpus / name)
    errors = fails(capsys, ["verify", corpus], "sha256").splitlines()
    assert sorted(line.split()[1] for line in errors) == sorted(f"{corpus / name}:" for name in bad)


@pytest.fixture(scope="module")
def large_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of a corpus of about one megabyte."""
    return write_text(tmp_path_factory.mktemp("large") / "a.txt", make_documents(2000, longest=200))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB; skipped if mounting is not permitted (needs root with CAP_SYS_ADMIN)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here; the file size limit is tested instead")
    if done.returncode:
        pytest.skip(f"cannot mount here ({done.stderr.strip()}); the file size limit is tested instead")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def errors(found: subprocess.CompletedProcess[str]) -> str:
    """What a command wrote to stderr, without the warning of unknown tokens in `make_documents`."""
    return "".join(line for line in found.stderr.splitlines(keepends=True) if not line.startswith("warning: 4."))


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(workers: int, small_disk: Path, large_text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Token files fit but shards do not; with more space, the same command completes as on a large disk."""
    output = small_disk / "corpus"
    arguments = ["build", "--input", large_text, "--tokenizer", tokenizer, "--sequence-length", 128]
    arguments += ["--shard-size", "0.3", "--workers", workers, "--output"]
    assert run_command(*arguments, tmp_path / "uninterrupted").returncode == 0
    uninterrupted = tree(tmp_path / "uninterrupted")
    # Token files and shards have about the same size.
    size = sum(map(len, uninterrupted.values()))
    resize(small_disk, int(1.6 * size))
    found = run_command(*arguments, output)
    assert found.returncode == 1, found
    message = r"error: .*corpus/shard-\d+\.arrow: cannot write \(No space left on device\): the file needs "
    message += r"[\d,]+ bytes, [\d,]+ bytes are free now\. Free space .*\n"
    assert re.fullmatch(message, errors(found)), found.stderr
    assert not list(output.rglob("*.partial"))
    assert not (output / "manifest.json").exists()
    assert all(path.read_bytes() == uninterrupted[path.name] for path in output.glob("shard-*.arrow"))
    resize(small_disk, 3 * size)
    assert run_command(*arguments, output).returncode == 0
    assert tree(output) == uninterrupted


def test_file_size_limit(large_text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The same code path with a limit of the process, which needs no privileges."""
    output = tmp_path / "corpus"
    arguments = ["build", "--input", large_text, "--tokenizer", tokenizer, "--sequence-length", 128]
    arguments += ["--work-size", "0.05", "--output", output]
    limit = 200_000
    found = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert found.returncode == 1, found
    assert re.search(r"shard-00000\.arrow: cannot write \(File too large\): the file needs [\d,]+ bytes", found.stderr)
    assert len(errors(found).splitlines()) == 1
    assert not list(output.rglob("*.partial"))
    assert not list(output.rglob("*.arrow"))
    assert not (output / "manifest.json").exists()
    assert run_command(*arguments).returncode == 0
    assert run_command("verify", output).returncode == 0


def test_full_disk_before_any_task_has_finished(small_disk: Path, tokenizer: Path, large_text: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_500_000))
    with pytest.raises((CorpusError, OSError), match="No space left on device"):
        build([large_text], tokenizer, 128, small_disk / "corpus", progress=False)
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast"]
