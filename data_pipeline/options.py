"""Options that several commands have."""

import argparse
from typing import Any

from data_pipeline.numbers import integer, number

INPUT = (
    "files, folders and globs of .txt, .jsonl (also compressed: .gz, .zst, .xz, .bz2), compressed .json of JSON lines, "
    "and .parquet; by name or glob also .md, .csv, .tsv and .json"
)


class OnePerSource(argparse.Action):
    """Appends (source, weight), once per source."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = getattr(namespace, self.dest)
        if values[0] in dict(given):
            parser.error(f"argument {option}: source {values[0]!r} has two weights; give one")
        setattr(namespace, self.dest, [*given, values])


def weight(text: str) -> tuple[str, float]:
    """SOURCE=W. Raises ValueError."""
    name, _, value = text.rpartition("=")
    return name, number(value)


def source_options(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--description",
        metavar="YAML",
        help="sources with weights, and document rules: filters, duplicates, contamination",
    )
    source.add_argument("--input", nargs="+", metavar="PATH", help=INPUT)
    document_options(command)
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="Hugging Face tokenizer folder, or a name on a hub: OWNER/NAME, OWNER/NAME@REVISION",
    )
    command.add_argument("--seed", type=integer, default=0, metavar="S", help="key of the held-out split (default 0)")
    command.add_argument(
        "--held-out",
        type=number,
        default=0.0,
        metavar="SHARE",
        help="share of the documents to hold out; in corpora: OUTPUT/held_out (default 0)",
    )
    command.add_argument(
        "--held-out-by",
        choices=("document", "file"),
        default="document",
        help="unit of the held-out split; file: at least one complete file, so that no part of what a file holds is "
        "trained on (default document)",
    )
    command.add_argument(
        "--max-unknown",
        type=number,
        default=0.5,
        metavar="SHARE",
        help="limit for the share of unknown tokens of a source; above 0.02 there is a warning (default 0.5)",
    )
    command.add_argument(
        "--work-size",
        type=number,
        metavar="MB",
        help="MB of text per unit of work; does not change the corpus (default: 1/64 of the text, between 1 and 32)",
    )


def document_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--documents",
        choices=("blank-line", "line", "file"),
        default="blank-line",
        help="unit of a document in .txt and .md files: up to a blank line (default), a line, or the file; "
        "with --description, set there",
    )
    command.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of .jsonl or .json, or column of .parquet, .csv or .tsv, that holds the text (default: text); "
        "with --description, set there",
    )
    for option, what in (
        ("--no-text", "records whose text is null or missing"),
        ("--bad-records", "lines that are not JSON objects with a string as text"),
    ):
        command.add_argument(
            option,
            choices=("error", "skip"),
            default="error",
            help=f"{what}: stop with an error (default), or skip and count them; with --description, set there",
        )
    command.add_argument(
        "--max-record",
        type=number,
        default=256.0,
        metavar="N",
        help="limit for a record, such as a line of JSON: millions of characters (default 256)",
    )
    command.add_argument(
        "--max-expansion",
        type=number,
        default=1000.0,
        metavar="X",
        help="limit for bytes of text per byte of a file, for files of more than 1 GB of text (default 1000)",
    )


def packing_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sequence-length", type=integer, required=True, metavar="L", help="tokens per row, at least 8"
    )
    command.add_argument(
        "--packing",
        choices=("full_sequences", "documents", "nsp", "sop"),
        default="full_sequences",
        help="full rows (default); one document per row; pairs for next-sentence or sentence-order prediction",
    )
    command.add_argument(
        "--bins", nargs="+", type=integer, default=(), metavar="N", help="shorter row lengths for packing documents"
    )
    command.add_argument(
        "--pair-probability",
        type=number,
        default=0.5,
        metavar="P",
        help="share of pairs that are random (nsp) or swapped (sop) (default 0.5)",
    )
    command.add_argument(
        "--columns",
        nargs="+",
        choices=("word_start", "sentence_start"),
        default=(),
        help="also store word or sentence starts, one bit per token",
    )
    command.add_argument("--shard-size", type=number, default=128.0, metavar="MB", help="MB per shard (default 128)")


def worker_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=integer, default=1, metavar="N", help="processes (default 1)")
    progress_options(command)


def progress_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bar on stderr (default: on a terminal)",
    )
    level = command.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help="errors only: no warnings, no progress bar by default")
    level.add_argument("--verbose", action="store_true", help="log each finished task to stderr")
