"""What files contain, whatever their names: compressions, encodings, escaped text, records without text."""

from __future__ import annotations

import bz2
import gzip
import html
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st

from data_pipeline.build import build
from data_pipeline.files import CorpusError
from data_pipeline.shards import read_manifest
from data_pipeline.sources.documents import read_documents
from data_pipeline.sources.inputs import Piece, Source, find_sources
from data_pipeline.sources.reading import Reading
from data_pipeline.sources.signatures import HEAD, why_not_text
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import describe_in, make_documents, run_command, tree, write_text, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(write_tokenizer(folder / "vocab", extra=["ä", "##ä"]), folder / "tok")
    return folder / "tok"


def texts_of(path: Path, kind: str = "", reading: Reading | None = None, documents: str = "blank-line") -> list[str]:
    stat = path.stat()
    source = Source(str(path), path.name, stat.st_size, stat.st_mtime_ns, kind)
    found, parts = [], ""
    pieces = read_documents(source, Piece(0, 0, stat.st_size), documents, "text", lambda *_: None, reading)
    for text, end in pieces:
        parts += text
        if end:
            found.append(parts)
            parts = ""
    return found


# --- compressions


def long_window(data: bytes, log: int = 28) -> bytes:
    """As `zstd --long`: a frame with a window above the limit of most decoders."""
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    out = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(out, closefd=False) as writer:
        writer.write(data)
    return out.getvalue()


COMPRESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": (".gz", gzip.compress),
    "zstd": (".zst", zstandard.compress),
    "zstd, long window": (".zst", long_window),
    "xz": (".xz", lzma.compress),
    "bzip2": (".bz2", bz2.compress),
}
PADDED = [name for name in COMPRESS if name in ("gzip", "xz")]


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_and_truncation(kind: str, tmp_path: Path) -> None:
    """Several members are read as one text; a file that ends at any place before its end is an error, never a text."""
    suffix, compress = COMPRESS[kind]
    documents = make_documents(300)
    text = "\n\n".join(documents).encode()
    path = tmp_path / f"a.txt{suffix}"
    whole = compress(text[:9000]) + compress(text[9000:])
    path.write_bytes(whole)
    assert texts_of(path) == documents
    for size in (0, 1, 5, 20, len(whole) // 3, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=r"corrupt .* file \(.*Copy or create it again"):
            texts_of(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0x55
    path.write_bytes(damaged)
    with pytest.raises(CorpusError, match=r"corrupt .* file"):
        texts_of(path)


@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("zeros", [1, 4, 512, 1_000_000])
def test_zero_padding(kind: str, zeros: int, tmp_path: Path) -> None:
    """As tapes and block devices leave it, also between members; anything else after a member is an error."""
    suffix, compress = COMPRESS[kind]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"one\n\n") + bytes(zeros) + compress(b"two") + bytes(zeros))
    assert texts_of(path) == ["one", "two"]
    path.write_bytes(compress(b"one") + bytes(zeros) + b"garbage")
    with pytest.raises(CorpusError, match="corrupt"):
        texts_of(path)
    path.write_bytes(bytes(zeros))
    with pytest.raises(CorpusError, match="corrupt"):
        texts_of(path)


def test_long_window_after_an_ordinary_frame(tmp_path: Path) -> None:
    """The text that the first decoder has delivered is not repeated."""
    documents = make_documents(3000)
    text = "\n\n".join(documents).encode()
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(text[:100_000]) + skippable + long_window(text[100_000:], 31))
    assert texts_of(path) == documents


@given(st.data())
def test_compressed_equals_plain(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("compressed")
    parts = data.draw(st.lists(st.text(st.sampled_from("ab ä\n"), min_size=1, max_size=40), max_size=4))
    suffix, compress = COMPRESS[data.draw(st.sampled_from(sorted(COMPRESS)))]
    (folder / "a.txt").write_text("x" + "".join(parts), encoding="utf-8", newline="")
    members = [compress(part.encode()) for part in ["x", *parts]]
    (folder / f"b.txt{suffix}").write_bytes(b"".join(members))
    assert texts_of(folder / f"b.txt{suffix}") == texts_of(folder / "a.txt")


def test_every_suffix_is_read(tmp_path: Path, tokenizer: Path) -> None:
    """Compressed .json holds JSON lines, as C4's files do."""
    document = make_documents(1)[0]
    line = json.dumps({"text": document}).encode() + b"\n"
    (tmp_path / "in").mkdir()
    for suffix, compress in COMPRESS.values():
        (tmp_path / f"in/a.txt{suffix}").write_bytes(compress(document.encode()))
        for name in ("jsonl", "json"):
            (tmp_path / f"in/a.{name}{suffix}").write_bytes(compress(line))
    manifest = build([tmp_path / "in"], tokenizer, 16, tmp_path / "out", progress=False)
    assert manifest.documents == len(list((tmp_path / "in").iterdir())) == 12
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'[{"text": "x"}]'))
    with pytest.raises(CorpusError, match=r"json\.gz:1: must be a JSON object, found list"):
        build([tmp_path / "c4*.json.gz"], tokenizer, 16, tmp_path / "array", progress=False)
    (tmp_path / "b.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"b\.json: record 1: has no field 'text'"):
        build([tmp_path / "b.json"], tokenizer, 16, tmp_path / "plain", progress=False)


# --- files that are not text

TEXT = "\n".join(["The naïve café of Zürich isn't ours, 42 €.", "Привет, мир", "漢字かな"] * 50)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["x"]}), out)
    return out.getvalue()


NOT_TEXT: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(TEXT.encode()), r"is gzip-compressed, not text\. Give it the suffix \.gz, or decompress"),
    "zstd": (zstandard.compress(TEXT.encode()), r"is zstd-compressed, .* suffix \.zst"),
    "xz": (lzma.compress(TEXT.encode()), r"is xz-compressed, .* suffix \.xz"),
    "bzip2": (bz2.compress(TEXT.encode()), r"is bzip2-compressed, .* suffix \.bz2"),
    "bzip2, empty": (bz2.compress(b""), "is bzip2-compressed"),
    "zip": (zipped(), "is a ZIP archive"),
    "tar": (tarred(), "is binary data"),
    "parquet": (parquet(), "is a Parquet file"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "is a PDF document"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is a PNG image"),
    "gif": (b"GIF89a" + bytes(range(256)), "is a GIF image"),
    "random": (bytes((i * 7919 + i * i) % 256 for i in range(5000)), "is binary data"),
    "zeros": (bytes(5000), "is binary data"),
    **{
        f"{encoding}{' with mark' if mark else ''}": (
            (b"\xff\xfe" if mark and "le" in encoding else b"\xfe\xff" if mark else b"") + TEXT.encode(encoding),
            "not UTF-8 at byte 0: it is UTF-16.*iconv -f UTF-16",
        )
        for encoding in ("utf-16-le", "utf-16-be")
        for mark in (False, True)
    },
    "utf-16, Chinese": ("漢字かな混じり文\n".encode("utf-16-le") * 50, "it is UTF-16LE without a byte order mark"),
    "utf-16, ASCII": ("plain\n".encode("utf-16-be") * 50, "it is UTF-16BE without a byte order mark"),
    "utf-32": (TEXT.encode("utf-32"), "it is UTF-32"),
    "utf-32, no mark": (TEXT.encode("utf-32-le"), "it is UTF-32LE without a byte order mark.*iconv -f UTF-32LE"),
}


@pytest.mark.parametrize("bad_bytes", ["error", "replace", "skip"])
@pytest.mark.parametrize("case", NOT_TEXT)
def test_files_that_are_not_text(case: str, bad_bytes: str, tmp_path: Path, tokenizer: Path) -> None:
    """Refused by their first bytes, whatever the rule for invalid bytes: plain, within .gz, and as another format."""
    data, message = NOT_TEXT[case]
    for name, content, kind in (
        ("a.txt", data, "auto"),
        ("a.jsonl", data, "auto"),
        ("a.txt.gz", gzip.compress(data), "auto"),
        ("a.bin", data, "text"),
        ("wiki_00", data, "wikiextractor"),
    ):
        (tmp_path / name).write_bytes(content)
        sources = [{"name": "a", "inputs": [name], "format": kind}]
        about = describe_in(tmp_path, sources, documents={"bad_bytes": bad_bytes})
        within = "the content of the gzip file " if name.endswith(".gz") else ""
        with pytest.raises(CorpusError, match=rf"{re.escape(name)}: {within}.*{message}"):
            build(None, tokenizer, 16, tmp_path / "out", description=about, progress=False)
        assert not (tmp_path / "out").exists()


@given(st.text(max_size=300), st.sampled_from(["utf-8", "latin-1", "cp1252", "koi8-r", "shift-jis", "gb18030"]))
def test_text_is_not_refused(text: str, encoding: str) -> None:
    """Text with a few odd characters, or in an encoding that `bad_bytes` is for, is not taken for binary data."""
    assume(sum(c < " " for c in text) <= 0.01 * len(text))
    assert why_not_text((text + " plain words" * 30).encode(encoding, "ignore")[:HEAD]) is None


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn", "Co"]), min_size=1), st.booleans())
def test_utf16_text_is_refused(text: str, little: bool) -> None:
    data = "\n".join([text, "Words, and more words."] * 20).encode("utf-16-le" if little else "utf-16-be")
    why = str(why_not_text(data))
    # Text of characters whose low byte is zero, such as U+0100, is taken for binary data.
    assert "it is UTF-16" in why or "is binary data" in why


def test_compressed_file_of_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(lzma.compress(TEXT.encode()))
    with pytest.raises(CorpusError, match=r"corrupt gzip file \(the content is xz: rename the file"):
        texts_of(path)


# --- WikiExtractor


def wiki(texts: list[str]) -> str:
    escaped = (html.escape(text, quote=False) for text in texts)
    return "".join(f'<doc id="{i}" url="u" title="T">\n{text}\n</doc>\n' for i, text in enumerate(escaped))


@given(
    st.lists(st.text(st.sampled_from("a&<>; \nltgmp#39quo\"'"), max_size=60), min_size=1, max_size=4),
    st.integers(1, 30),
)
def test_wikiextractor_is_unescaped(tmp_path_factory: pytest.TempPathFactory, texts: list[str], piece: int) -> None:
    """The text is the one that WikiExtractor escaped, also where an entity is cut between pieces of a long document."""
    from data_pipeline.sources import documents as module

    path = tmp_path_factory.mktemp("wiki") / "wiki_00"
    path.write_text(wiki(texts), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        # The line <doc …> must fit into the first piece.
        patch.setattr(module, "PIECE", piece + 30)
        assert texts_of(path, ".wiki") == [text.strip() for text in texts if text.strip()]


@pytest.mark.parametrize("cut", range(1, 14))
def test_entity_at_the_end_of_a_piece(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.sources import documents as module

    escaped = "a &amp;lt; b&gt;&amp;"
    pieces = [('<doc id="1">\n' + escaped[:cut], False), (escaped[cut:], True)]
    found = list(module._wiki(Source("wiki_00", "wiki_00", 0, 0), iter(pieces)))
    assert "".join(text for text, _ in found) == "a &lt; b>&"
    assert [end for _, end in found] == [False, True]


# --- names and the locale


@pytest.mark.parametrize("where", ["in", "in/a.txt", "in/*.txt"])
def test_dead_links(where: str, tmp_path: Path) -> None:
    write_text(tmp_path / "in/b.txt", ["text"])
    (tmp_path / "in/a.txt").symlink_to("gone.txt")
    with pytest.raises(CorpusError, match=r"in/a\.txt: is a link to gone\.txt, which cannot be read .*remove the link"):
        find_sources([tmp_path / where])
    (tmp_path / "in/a.txt").unlink()
    (tmp_path / "in/a.txt").symlink_to("a.txt")
    with pytest.raises(CorpusError, match=r"in/a\.txt: is a link to a\.txt, which cannot be read"):
        find_sources([tmp_path / where])


def test_ascii_locale(tmp_path: Path) -> None:
    """Files, names and output do not depend on the encoding of the locale."""
    write_text(tmp_path / "in/Zürich.txt", [*make_documents(50), "ä漢 ä漢"])
    about = describe_in(tmp_path, [{"name": "a", "inputs": ["in/Zürich.txt"]}])
    about.write_bytes(about.read_text(encoding="utf-8").encode())
    found = {}
    for name, settings in (("utf8", {"PYTHONUTF8": "1"}), ("ascii", {"PYTHONUTF8": "0", "LC_ALL": "C"})):
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {**settings, "PYTHONCOERCECLOCALE": "0"}.items():
                patch.setenv(key, value)
            folder = tmp_path / name
            words = ["tokenizer", "--input", tmp_path / "in", "--vocab-size", 72, "--output", folder / "tok"]
            assert run_command(*words).returncode == 0
            words = ["build", "--description", about, "--tokenizer", folder / "tok", "--sequence-length", 16]
            done = run_command(*words, "--output", folder / "out")
            assert done.returncode == 0, done.stderr
            shown = run_command("inspect", folder / "out", "--rows", 1000)
            assert shown.returncode == 0, shown.stderr
            assert ("漢" if name == "utf8" else r"\u6f22") in shown.stdout
        found[name] = tree(folder)
    assert found["utf8"] == found["ascii"]
    assert os.fsencode("Zürich").decode() in str(read_manifest(tmp_path / "ascii/out").sources[0].name)
