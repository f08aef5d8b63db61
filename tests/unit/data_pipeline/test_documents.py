"""Sources, units of work and documents."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.files import CorpusError
from data_pipeline.filters.rules import DocumentFilter, DocumentRules
from data_pipeline.sources import documents as documents_module
from data_pipeline.sources.cuts import cut_units
from data_pipeline.sources.inputs import Source, Unit, find_sources
from data_pipeline.sources.reading import Reading
from tests.support.documents import make_documents, write_text


def read(
    inputs: Sequence[str | Path],
    documents: str = "blank-line",
    field: str = "text",
    unit_bytes: int = 1 << 40,
) -> list[str]:
    """All documents of the inputs, unit by unit, with the pieces of long ones joined."""
    sources = find_sources(inputs)
    found: list[str] = []
    for unit in cut_units(sources, documents, field, unit_bytes):
        for piece in unit:
            parts: list[str] = []
            source = sources[piece.source]
            for text, end in documents_module.read_documents(source, piece, documents, field, lambda *_: None):
                parts.append(text)
                if end:
                    found.append("".join(parts))
                    parts = []
            assert not parts
    return found


def write_all_formats(folder: Path, documents: list[str]) -> list[Path]:
    folder.mkdir()
    text = write_text(folder / "a.txt", documents).read_bytes()
    lines = "".join(json.dumps({"id": i, "body": d}) + "\n" for i, d in enumerate(documents)).encode()
    files = {"a.txt.gz": gzip.compress(text), "a.txt.zst": zstandard.compress(text)}
    files |= {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstandard.compress(lines)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"id": range(len(documents)), "body": documents}), folder / "a.parquet", row_group_size=7)
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    documents = make_documents(50)
    paths = write_all_formats(tmp_path / "in", documents)
    assert len(paths) == 7
    for path in paths:
        for unit_bytes in (1 << 40, 1000, 1):
            assert read([path], field="body", unit_bytes=unit_bytes) == documents


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("blank-line", ["a b\nc", "d", "e\nf"]),
        ("line", ["a b", "c", "d", "e", "f"]),
        ("file", ["a b\nc\n\n \t\n\nd\n\t\r\ne\nf"]),
    ],
)
def test_document_units(tmp_path: Path, mode: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    # Byte order mark, leading and trailing blank lines, blank lines with white space, no final line end.
    path.write_bytes(b"\xef\xbb\xbf\n\na b\nc\n\n \t\n\nd\n\t\r\ne\nf\n\n ")
    assert read([path], mode) == expected
    path.write_bytes(b"a b\r\n\r\nc\r\n")
    assert read([path], "blank-line") == ["a b", "c"]


@given(st.data())
def test_documents_do_not_depend_on_units_and_blocks(data: st.DataObject) -> None:
    """Any split of the bytes into units and blocks gives the same documents and pieces."""
    signs = st.sampled_from([*"ab é漢\n\n\n \t", "\r\n"])
    text = data.draw(st.lists(signs, max_size=120).map("".join))
    mode = data.draw(st.sampled_from(["blank-line", "line", "file"]))
    separator = documents_module._SEPARATORS[mode]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE", data.draw(st.integers(2, 20)))
        source, reading = Source("a.txt", "a.txt", 0, 0), Reading()
        full = list(documents_module._text(source, iter([text]), separator, reading))
        size = data.draw(st.integers(1, 9))
        blocks = (text[i : i + size] for i in range(0, len(text), size))
        assert list(documents_module._text(source, blocks, separator, reading)) == full
        assert all(len(piece) <= documents_module.PIECE for piece, _ in full)
        assert not any(len(piece) > 1 and piece.endswith("\r") for piece, _ in full)
    rule = {"blank-line": r"\n[ \t\r\f\v]*\n", "line": "\n", "file": r"(?!)"}[mode]
    joined, current = [], ""
    for piece, end in full:
        current += piece
        if end:
            joined.append(current)
            current = ""
    assert joined == [part.strip() for part in re.split(rule, text) if part.strip()]


@given(st.text(st.sampled_from("ab é\n\n \t"), max_size=80).filter(str.strip), st.integers(1, 40))
def test_units_cover_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, unit_bytes: int) -> None:
    path = tmp_path_factory.mktemp("units") / "a.txt"
    path.write_text(text, newline="")
    for mode in ("blank-line", "line", "file"):
        sources = find_sources([path])
        units = cut_units(sources, mode, "text", unit_bytes)
        cuts = [(piece.start, piece.stop) for unit in units for piece in unit]
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
        assert cuts[-1][1] == len(text.encode())
        assert read([path], mode, unit_bytes=unit_bytes) == read([path], mode)


def test_line_ends_do_not_change_what_a_long_document_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CR LF cut in two would become an empty line, and the document no duplicate of itself."""
    monkeypatch.setattr(documents_module, "PIECE", 10)
    rules = DocumentRules(control_characters="remove", duplicates="exact")
    found = []
    for line_end in ("\n", "\r\n"):
        texts = list(documents_module._pieces(line_end.join(["aaa bbb", "ccc", "ddd eee", "f"])))
        assert len(texts) > 1
        out = DocumentFilter(rules, True, None)([text for text, _ in texts], [end for _, end in texts])
        found.append(("".join(out.texts), out.digests))
    assert found[0] == found[1]


def test_long_line_ends_in_pieces_at_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "PIECE", 10)
    assert list(documents_module._pieces("aaa bbb ccc dddddddddddd\nee")) == [
        ("aaa bbb", False),
        (" ccc", False),
        (" ddddddddd", False),
        ("ddd\nee", True),
    ]


def test_small_files_share_units_and_large_ones_are_cut(tmp_path: Path) -> None:
    for i in range(10):
        write_text(tmp_path / f"small{i}.txt", ["x" * 99])
    write_text(tmp_path / "a_large.txt", ["y" * 99] * 30)
    sources = find_sources([tmp_path])
    units: list[Unit] = cut_units(sources, "blank-line", "text", 500)
    assert len(units) > 5
    assert max(len(unit) for unit in units) == 5
    assert [piece.source for unit in units for piece in unit] == sorted(p.source for u in units for p in u)


def test_names_and_order_do_not_depend_on_the_arguments(tmp_path: Path) -> None:
    for name in (
        "b/x.txt",
        "a/y.jsonl",
        "a/z.txt.gz",
        "c.parquet",
        "a/.hidden.txt",
        "a/notes.md",
        ".git/t.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = ["a/y.jsonl", "a/z.txt.gz", "b/x.txt", "c.parquet"]
    for inputs in ([tmp_path], [tmp_path / "c.parquet", tmp_path / "b", tmp_path / "a"], [f"{tmp_path}/*"]):
        assert [source.name for source in find_sources(inputs)] == expected
    deep = [source.name for source in find_sources([f"{tmp_path}/**/*.txt*"])]
    assert deep == ["a/z.txt.gz", "b/x.txt"]


def test_recursive_globs_list_every_file_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They match folders too, which would list what is in them again."""
    for name in ("x.txt", "a/y.txt", "a/b/z.txt", "a/b/c/.hidden/t.txt"):
        write_text(tmp_path / "in" / name, ["text"])
    expected = ["a/b/z.txt", "a/y.txt", "x.txt"]
    for pattern in ("*", "**", "**/", "**/*", "**/*.txt"):
        assert [source.name for source in find_sources([f"{tmp_path}/in/{pattern}"])] == expected, pattern
    (tmp_path / "in/a/b/notes.md").write_text("text")
    assert len(find_sources([f"{tmp_path}/in/**/*"])) == 4
    assert not caplog.text
    assert len(find_sources([f"{tmp_path}/in/**/"])) == 3
    assert "skipped 1 files: .md 1" in caplog.text
    with pytest.raises(CorpusError, match="listed twice"):
        find_sources([f"{tmp_path}/in/**", f"{tmp_path}/in/a/*.txt"])


def test_faulty_inputs(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", ["text"])
    (tmp_path / "b.rst").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="listed twice"):
        find_sources([path, tmp_path / "empty/../a.txt"])
    with pytest.raises(CorpusError, match="listed twice"):
        find_sources([tmp_path, path])
    with pytest.raises(CorpusError, match=r"b\.rst: unknown file type"):
        find_sources([tmp_path / "b.rst"])
    with pytest.raises(CorpusError, match="no such file"):
        find_sources([tmp_path / "*.jsonl"])
    with pytest.raises(CorpusError, match="the corpus is empty"):
        find_sources([tmp_path / "empty"])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_bad_utf8_is_located(tmp_path: Path, suffix: str, compression: str, bad: bytes) -> None:
    before = '{"text": "é"}\n'.encode() * 90_000
    data = before + bad
    path = tmp_path / f"a{suffix}{compression}"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    path.write_bytes(compress(data))
    with pytest.raises(CorpusError, match=rf"a{suffix}{compression}: not UTF-8 at byte {len(before):,} .*iconv"):
        read([path], "line")
    if not compression:
        with pytest.raises(CorpusError, match=rf"not UTF-8 at byte {len(before):,} "):
            read([path], "line", unit_bytes=400_000)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_or_corrupt(tmp_path: Path, suffix: str, compress: object) -> None:
    assert callable(compress)
    data = compress("\n\n".join(make_documents(300)).encode())
    path = tmp_path / f"a.txt{suffix}"
    for size in (0, 1, 4, 9, 20, len(data) // 2, len(data) - 5, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CorpusError, match=rf"a\.txt{suffix}: corrupt .* file \(.*Copy or create it again"):
            read([path])
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(CorpusError, match="corrupt"):
        read([path])
    path.write_bytes(data + compress(b" and more"))
    assert read([path])[-1].endswith(" and more")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "not JSON"),
        ("[1]", "must be a JSON object, found list"),
        ('{"title": "x", "url": "y"}', "has no field 'text', only title, url. Set --text-field"),
        ('{"text": null}', "field 'text' must be a string, found NoneType"),
        ('{"text": 3}', "field 'text' must be a string, found int"),
        (r'{"text": "\ud800"}', "is not Unicode text"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' * 50 + line + "\n" + '{"text": "good"}\n')
    for unit_bytes in (1 << 40, 100):
        with pytest.raises(CorpusError, match=re.escape(f"{path}:101: ") + ".*" + re.escape(message)):
            read([path], unit_bytes=unit_bytes)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["x"], "size": [3]}), path)
    with pytest.raises(CorpusError, match=r"has no column 'text', only title, size\. Set --text-field to"):
        read([path])
    with pytest.raises(CorpusError, match="column 'size' has type int64, must be string"):
        read([path], field="size")
    pq.write_table(pa.table({"text": ["x", "y", None]}), path)
    with pytest.raises(CorpusError, match="row 2 of row group 0 has no"):
        read([path])
    bad = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(CorpusError, match="'text' is not UTF-8"):
        read([path])
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"PAR1" + b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(CorpusError, match=r"a\.parquet: corrupt Parquet file"):
            read([path])


def test_parquet_strings_of_every_kind(tmp_path: Path) -> None:
    texts = ["one", "two", "one"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"nested": [{"a": 1, "b": 2}] * 3, "text": pa.array(texts).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        assert read([tmp_path]) == texts
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    assert read([tmp_path]) == []


def test_modified_source_is_detected(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", ["text"])
    (source,) = find_sources([path])
    source.check_unchanged()
    path.write_text("other text")
    with pytest.raises(CorpusError, match="changed since the build started"):
        source.check_unchanged()
    path.unlink()
    with pytest.raises(CorpusError, match="disappeared"):
        source.check_unchanged()


def test_globs_skip_tokenizer_and_output(tmp_path: Path) -> None:
    """vocab.txt is no text, and the output must not become an input of the same command run again."""
    for name in ("texts/a.txt", "tok/vocab.txt", "corpus/tokenizer/vocab.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    exclude = (tmp_path / "corpus", tmp_path / "tok")
    for pattern in ("**/*.txt", "*", "*/*.txt"):
        assert [source.name for source in find_sources([f"{tmp_path}/{pattern}"], exclude)] == ["a.txt"]
    # A folder that the pattern names is meant, and so is one below a tokenizer's.
    assert [source.name for source in find_sources([f"{tmp_path}/tok/*.txt"], exclude)] == ["vocab.txt"]
    assert [source.name for source in find_sources([f"{tmp_path}/texts/*"], (tmp_path,))] == ["a.txt"]
