"""Faults of texts, tokenizers and descriptions, met by `data_pipeline`."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tests.unit.faults.case import Fault, writes

BUILD = "data_pipeline build --input in --tokenizer tok --sequence-length 16 --output out"
TO = BUILD.removesuffix("out")
TEXT = b"the cat is on the mat and it was to be\n" * 200


def parquet(**columns: list[object]):
    def prepare(folder: Path) -> None:
        (folder / "in").mkdir()
        pq.write_table(pa.table(columns), folder / "in/a.parquet")

    return prepare


def pipe(folder: Path) -> None:
    (folder / "in").mkdir()
    os.mkfifo(folder / "in/a.txt")


def device(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in/a.txt").symlink_to("/dev/zero")


def dead_link(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in/a.txt").symlink_to("nowhere")


def five_tokens(folder: Path) -> None:
    writes("in/a.txt", TEXT)(folder)
    writes("tok/vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")(folder)


def slow_only(folder: Path) -> None:
    writes("in/a.txt", TEXT)(folder)
    for path in (folder / "tok").iterdir():
        path.unlink()
    (folder / "tok/spiece.model").write_bytes(b"\x0a\x0b")


def sourced(**settings: str) -> str:
    lines = "".join(f"    {key}: {value}\n" for key, value in settings.items())
    return f"sources:\n  - name: web\n    inputs: [in]\n{lines}"


DESCRIBED = "data_pipeline build --description d.yaml --tokenizer tok --sequence-length 16 --output out"

FAULTS = [
    Fault(
        "no text at all",
        BUILD,
        "the corpus is empty: no text in …in/a.txt. Add text",
        prepare=writes("in/a.txt", " \n\n"),
    ),
    Fault(
        "Latin-1",
        BUILD,
        "…in/a.txt: not UTF-8 at byte 8 (0xf6: invalid start byte). Convert the file to UTF-8, for example with iconv",
        prepare=writes("in/a.txt", "gut\n\nschön\n".encode("latin-1")),
    ),
    Fault(
        "UTF-16 without a mark",
        BUILD,
        "…in/a.txt: not UTF-8 at byte 0: it is UTF-16LE without a byte order mark. Convert the file, for "
        "example with iconv -f UTF-16LE -t UTF-8",
        prepare=writes("in/a.txt", "the cat\n".encode("utf-16-le")),
    ),
    Fault(
        "a ZIP archive named .txt",
        BUILD,
        "…in/a.txt: is a ZIP archive or Office document, not text. Extract the text, or remove the file",
        prepare=writes("in/a.txt", b"PK\x03\x04" + bytes(100)),
    ),
    Fault(
        "a gzip file named .txt",
        BUILD,
        "…in/a.txt: is gzip-compressed, not text. Give it the suffix .gz, or decompress it",
        prepare=writes("in/a.txt", gzip.compress(TEXT)),
    ),
    Fault(
        "a gzip file that is cut",
        BUILD,
        "…in/a.txt.gz: corrupt gzip file (Truncated: the data end before their end mark). Copy or create it again",
        prepare=writes("in/a.txt.gz", gzip.compress(TEXT)[:-9]),
    ),
    Fault(
        "plain text named .gz",
        BUILD,
        "…in/a.txt.gz: corrupt gzip file (Error -3 while decompressing data: incorrect header check). "
        "Copy or create it again",
        prepare=writes("in/a.txt.gz", TEXT),
    ),
    Fault(
        "a zstd file that is cut",
        BUILD,
        "…in/a.txt.zst: corrupt zstd file (Truncated: the data end within a block). Copy or create it again",
        prepare=writes("in/a.txt.zst", zstandard.compress(TEXT)[:-3]),
    ),
    Fault(
        "text named .xz",
        BUILD,
        "…in/a.txt.xz: corrupt xz file (Input format not supported by decoder). Copy or create it again",
        prepare=writes("in/a.txt.xz", TEXT),
    ),
    Fault(
        "text named .bz2",
        BUILD,
        "…in/a.txt.bz2: corrupt bzip2 file (Invalid data stream). Copy or create it again",
        prepare=writes("in/a.txt.bz2", TEXT),
    ),
    Fault(
        "files of unknown types only",
        BUILD,
        "in: the corpus is empty: no file of a supported type (.txt, .jsonl, .parquet; .txt, .jsonl and "
        ".json also compressed (.gz, .zst, .xz, .bz2); by name or glob also .md, .csv, .tsv and .json). "
        "Files .doc (1): convert them to text, or set their format in a description",
        prepare=writes("in/a.doc", TEXT),
    ),
    Fault(
        "a named pipe",
        BUILD,
        "in/a.txt: is a named pipe, not a file: its end is unknown. Save its content to a file, or remove it",
        prepare=pipe,
    ),
    Fault(
        "a link to a device",
        BUILD,
        "in/a.txt: is a link to a device, not a file: its end is unknown. Save its content to a file, or remove it",
        prepare=device,
    ),
    Fault(
        "a dead link",
        BUILD,
        "in/a.txt: is a link to nowhere, which cannot be read (No such file or directory). Restore the "
        "file, or remove the link",
        prepare=dead_link,
    ),
    Fault("no such input", BUILD, "in: no such file or folder, and no file matches it"),
    Fault(
        "a record without the field",
        BUILD,
        "…in/a.jsonl:1: has no field 'text', only body. Set --text-field (--no-text skip, or no_text: "
        "skip in a description, drops such records)",
        prepare=writes("in/a.jsonl", '{"body": "x"}\n'),
    ),
    Fault(
        "a broken line of JSON",
        BUILD,
        "…in/a.jsonl:2: not JSON (Expecting value: line 1 column 10 (char 9)). Every line must be a JSON "
        "object (--bad-records skip, or bad_records: skip in a description, drops such records)",
        prepare=writes("in/a.jsonl", '{"text": "x"}\n{"text": \n'),
    ),
    Fault(
        "a record with null text",
        BUILD,
        "…in/a.jsonl:2: field 'text' must be a string, found NoneType (--no-text skip, or no_text: skip "
        "in a description, drops such records)",
        prepare=writes("in/a.jsonl", '{"text": "x"}\n{"text": null}\n'),
    ),
    Fault(
        "a record that is a list",
        BUILD,
        "…in/a.jsonl:1: must be a JSON object, found list (--bad-records skip, or bad_records: skip in a "
        "description, drops such records)",
        prepare=writes("in/a.jsonl", '["text"]\n'),
    ),
    Fault(
        "a record beyond --max-record",
        BUILD + " --max-record 0.001",
        "…in/a.jsonl:1: a record of more than 0.001 million characters. If this is intended, raise "
        "--max-record, else remove it",
        prepare=writes("in/a.jsonl", json.dumps({"text": "the cat " * 1000}) + "\n"),
    ),
    Fault(
        "Parquet without the column",
        BUILD,
        "…in/a.parquet: has no column 'text', only body. Set --text-field to the column that holds the text",
        prepare=parquet(body=["x"]),
    ),
    Fault(
        "Parquet with a null",
        BUILD,
        "…in/a.parquet: row 1 of row group 0 has no 'text' (null). Remove such rows or replace null by an"
        " empty string (--no-text skip, or no_text: skip in a description, drops such records)",
        prepare=parquet(text=["x", None]),
    ),
    Fault(
        "Parquet with numbers as text",
        BUILD,
        "…in/a.parquet: column 'text' has type int64, must be string",
        prepare=parquet(text=[1, 2]),
    ),
    Fault(
        "text named .parquet",
        BUILD,
        "…in/a.parquet: corrupt Parquet file (Parquet magic bytes not found in footer. Either the file is"
        " corrupted or this is not a parquet file.). Copy or create it again",
        prepare=writes("in/a.parquet", TEXT),
    ),
    Fault(
        "an output folder with files of one's own",
        TO + "texts",
        "texts: output folder is not empty and holds no build. Choose another, or remove it first",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "an output that is a file",
        TO + "run.yaml",
        "run.yaml: is a file, the output must be a folder",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "an output that holds another corpus",
        TO + "corpus",
        "corpus: output folder holds a build with other arguments: held_out was 0.2, is now 0.0. Use the "
        "same arguments and inputs to resume, choose another folder, or remove this one first",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "rows too short",
        BUILD.replace("16", "7"),
        "sequence length 7: must be from 8 to 1,048,576",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "a share that is no share",
        BUILD + " --held-out nan",
        "argument --held-out: 'nan': expected a finite number of at most 1e+15",
        status=2,
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "a held-out share of 1",
        BUILD + " --held-out 1",
        "held-out share 1.0: must be from 0 to below 1",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "a held-out share without documents",
        BUILD + " --held-out 1e-9",
        "held-out share 1e-09: the held-out split gets none of 1 document. These are too few documents: add "
        "text, split it into more documents (--documents), of several files hold out a complete one (--held-out-by "
        "file), or use --held-out 0",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "bins of another packing",
        BUILD + " --bins 16",
        "bins (16,): must be omitted: only packing documents uses them",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "no tokenizer there",
        BUILD.replace("tok ", "texts "),
        "texts/tokenizer.json: missing. Save the tokenizer with transformers' save_pretrained, or train one",
        prepare=writes("in/a.txt", TEXT),
    ),
    Fault(
        "a tokenizer of special tokens only",
        BUILD,
        "tok/tokenizer.json: has no tokens besides its 5 special ones, so every text would be [UNK]. "
        "transformers 5 saves this after BertTokenizer(vocab_file=…), whose argument is now …",
        prepare=five_tokens,
    ),
    Fault(
        "a SentencePiece model without tokenizer.json",
        BUILD,
        "tok/tokenizer.json: missing, the folder has only spiece.model. Load it with transformers' AutoTokenizer (with "
        "the packages sentencepiece and protobuf installed) and save it with save_pretrained, which writes a "
        "tokenizer.json; a tokenizer that has no fast version is not supported",
        prepare=slow_only,
    ),
    Fault(
        "a tokenizer that fits no word",
        BUILD,
        "100.0% of 400 tokens are unknown ([UNK]), the limit is 50.0%. Language, case and accents of the "
        "tokenizer must fit the text: choose another, or raise --max-unknown",
        prepare=writes("in/a.txt", "漢字 仮名\n" * 100),
    ),
    Fault(
        "a description with an unknown key",
        DESCRIBED,
        "d.yaml: sources.0.colour: unknown key; known here: name, inputs, format, documents, text_field, split, weight",
        prepare=writes("d.yaml", sourced(colour="red")),
    ),
    Fault(
        "a description with a weight below 0",
        DESCRIBED,
        "d.yaml: sources.0.weight: Input should be greater than 0, found -1",
        prepare=writes("d.yaml", sourced(weight="-1")),
    ),
    Fault(
        "a description that is no YAML",
        DESCRIBED,
        "d.yaml: not YAML: while parsing a flow node",
        prepare=writes("d.yaml", "sources: ["),
    ),
    Fault(
        "a description without sources",
        DESCRIBED,
        "d.yaml: sources: Tuple should have at least 1 item after validation, not 0",
        prepare=writes("d.yaml", "sources: []\n"),
    ),
    Fault(
        "a vocabulary too large for the text",
        "data_pipeline tokenizer --input texts --vocab-size 10 --output out",
        "vocabulary size 10 is not possible with this text, which gives 54: the characters alone need "
        "more. Use --vocab-size 54 or other text",
    ),
    Fault(
        "more new tokens than the text yields",
        "data_pipeline tokenizer --extend corpus/tokenizer --add 5000 --input texts --output out",
        "--add 5,000: the text yields only … new tokens for words that the tokenizer splits. Use --add … or other text",
    ),
    Fault(
        "a text without words to add",
        "data_pipeline tokenizer --extend tok --add 1 --input in --output out",
        "--add 1: the tokenizer splits no word of the text; there is nothing to add",
        prepare=writes("in/a.txt", b"a b c 123\n"),
    ),
    Fault(
        "a number of new tokens, and no tokenizer to extend",
        "data_pipeline tokenizer --add 5 --vocab-size 100 --input texts --output out",
        "--add 5: belongs to --extend BASE; omit it",
    ),
    Fault(
        "a tokenizer to extend, and no number",
        "data_pipeline tokenizer --extend tok --input texts --output out",
        "--extend needs --add N, the number of new tokens",
    ),
]
