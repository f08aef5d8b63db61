"""`python -m data_pipeline`: tokenizer, build, tokenize, pack, verify, stats, inspect."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.execution.mpi import Team

_EXAMPLES = """\
examples:
  python -m data_pipeline tokenizer --input texts/ --vocab-size 30522 --output tok/
  python -m data_pipeline build --input texts/ --tokenizer tok/ --sequence-length 128 \\
      --output corpus/ --workers 16
  python -m data_pipeline build --input 'wiki/*.jsonl.zst' --text-field body --tokenizer tok/ \\
      --sequence-length 512 --output corpus512/ --held-out 0.005
  python -m data_pipeline build --description corpus.yaml --tokenizer tok/ --sequence-length 128 \\
      --output corpus/ --packing sop
  python -m data_pipeline tokenize --description corpus.yaml --tokenizer tok/ --output tokens/ --workers 16
  python -m data_pipeline pack tokens/ --sequence-length 128 --output corpus128/
  python -m data_pipeline pack tokens/ --sequence-length 512 --output corpus512/ --weight wiki=2
  mpirun -n 64 python -m data_pipeline build --description corpus.yaml --tokenizer tok/ \\
      --sequence-length 128 --output corpus/ --workers 8
  python -m data_pipeline verify corpus/
  python -m data_pipeline stats corpus/ --png corpus.png
  python -m data_pipeline inspect corpus/ --first 1000

A build that was stopped goes on with the same command.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
"""
_INPUT = "files, folders and globs of .txt, .jsonl (also .gz, .zst) and .parquet"


def command_parser() -> argparse.ArgumentParser:
    """Of all commands. Whoever starts them elsewhere checks arguments with it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline",
        description="Raw text to a corpus of pre-tokenised, unmasked rows for pretraining.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tokenizer = commands.add_parser("tokenizer", help="train a BERT WordPiece tokenizer")
    tokenizer.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="entries, special tokens included"
    )
    tokenizer.add_argument("--cased", action="store_true", help="keep case and accents (default: lower-case)")

    build = commands.add_parser(
        "build",
        help="tokenise and pack texts to a corpus",
        description="Tokenise and pack texts to a corpus. Rows stay in the order of the documents;\n"
        "the trainer shuffles when it reads. The output depends neither on --workers nor on a\n"
        "kill and restart.",
    )
    tokenize = commands.add_parser(
        "tokenize",
        help="the first half of build: token shards, of which many corpora can be packed",
        description="Tokenise texts to token shards: ids, document and sentence boundaries, word starts.",
    )
    pack = commands.add_parser(
        "pack",
        help="the second half of build: pack token shards to a corpus",
        description="Pack token shards to a corpus. One tokenize serves any number of packs.",
    )
    pack.add_argument("tokens", metavar="TOKENS", help="folder that tokenize wrote")
    pack.add_argument(
        "--weight",
        action="append",
        default=[],
        type=_weight,
        metavar="SOURCE=W",
        help="use a source's documents W times, whatever the description says; may be repeated",
    )
    pack.add_argument("--output", required=True, metavar="DIR", help="corpus folder to write: new or empty")
    for command in (build, tokenize):
        command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
        command.add_argument("--seed", type=int, default=0, metavar="S", help="key of the held-out choice (default 0)")
        command.add_argument(
            "--held-out",
            type=float,
            default=0.0,
            metavar="SHARE",
            help="share of the documents that goes to OUTPUT/held_out instead (default 0)",
        )
        command.add_argument(
            "--work-size",
            type=float,
            metavar="MB",
            help="MB of text a unit of work; does not change the corpus (default: a 64th of the text, from 1 to 32)",
        )
    for command in (build, pack):
        command.add_argument("--sequence-length", type=int, required=True, metavar="L", help="tokens a row, at least 8")
        command.add_argument(
            "--packing",
            choices=("full_sequences", "documents", "nsp", "sop"),
            default="full_sequences",
            help="full rows (default); a document a row; pairs for next-sentence or sentence-order prediction",
        )
        command.add_argument(
            "--bins", nargs="+", type=int, default=(), metavar="N", help="shorter rows that packing documents may use"
        )
        command.add_argument(
            "--pair-probability",
            type=float,
            default=0.5,
            metavar="P",
            help="share of pairs that are random (nsp) or swapped (sop) (default 0.5)",
        )
        command.add_argument(
            "--columns",
            nargs="+",
            choices=("word_start", "sentence_start"),
            default=(),
            help="store also where words or sentences begin, a bit a token",
        )
        command.add_argument("--shard-size", type=float, default=128.0, metavar="MB", help="MB a shard (default 128)")
    for command in (build, tokenize, pack):
        command.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    for command, output in (
        (tokenizer, "tokenizer folder"),
        (build, "corpus folder"),
        (tokenize, "folder of token shards"),
    ):
        given: argparse._ActionsContainer = command
        if command is not tokenizer:
            given = command.add_mutually_exclusive_group(required=True)
            given.add_argument(
                "--description",
                metavar="YAML",
                help="sources with weights, and rules for documents: filters, duplicates, contamination",
            )
        given.add_argument("--input", nargs="+", required=command is tokenizer, metavar="PATH", help=_INPUT)
        command.add_argument("--output", required=True, metavar="DIR", help=f"{output} to write: new or empty")
        command.add_argument(
            "--documents",
            choices=("blank-line", "line", "file"),
            default="blank-line",
            help="what a document is in .txt files: ends at a blank line (default), a line, or the file",
        )
        command.add_argument(
            "--text-field",
            default="text",
            metavar="NAME",
            help="field of .jsonl, column of .parquet that holds the text (default: text)",
        )

    verify = commands.add_parser("verify", help="check a corpus in full; names every bad file")
    stats = commands.add_parser("stats", help="tokens, rows, documents, unknown rate, lengths, top tokens")
    stats.add_argument("--top", type=int, default=20, metavar="N", help="most frequent tokens to list (default 20)")
    stats.add_argument("--png", metavar="FILE", help="draw lengths, top tokens and sources into this file")
    inspect = commands.add_parser("inspect", help="print rows as tokens")
    inspect.add_argument("--rows", type=int, default=5, metavar="N", help="how many (default 5)")
    inspect.add_argument("--first", type=int, default=0, metavar="ROW", help="from which on (default 0)")
    for command in (verify, stats, inspect):
        command.add_argument("folder", metavar="DIR", help="corpus folder")
    for command in (tokenizer, build, tokenize, pack, verify, stats):
        command.formatter_class = raw
        command.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="progress bar on stderr (default: on a terminal)",
        )
    return parser


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    return name, float(value)


def _run(arguments: argparse.Namespace) -> None:
    # Imported late: --help need not wait for Arrow.
    options = vars(arguments)
    command = options.pop("command")
    if command in ("build", "tokenize", "pack"):
        from data_pipeline.execution.mpi import join_team
        from data_pipeline.execution.workers import Pool, serve

        team = join_team()
        if team and team.rank:
            serve(team, Pool(arguments.workers))
            return
        try:
            _make(command, options, team)
        finally:
            if team:
                team.stop()
    elif command == "tokenizer":
        from data_pipeline.tokenization.tokenizer import train_tokenizer

        train_tokenizer(options.pop("input"), **options)
        print(f"{arguments.output}: tokenizer of {arguments.vocab_size:,} entries")
    elif command == "inspect":
        from data_pipeline.reports.rows import decoded_rows

        print(decoded_rows(arguments.folder, arguments.first, arguments.rows))
    else:
        from data_pipeline.execution.progress import ProgressBar
        from data_pipeline.reports.describe import describe
        from data_pipeline.reports.scan import verify
        from data_pipeline.shards import read_manifest
        from data_pipeline.tokenization.token_shards import is_tokens, read_tokens, verify_tokens

        if command == "verify" and is_tokens(arguments.folder):
            tokens = read_tokens(arguments.folder)
            verify_tokens(arguments.folder, tokens)
            print(f"{arguments.folder}: good, {len(tokens.shards):,} token shards checked")
            return
        size = sum(shard.bytes for shard in read_manifest(arguments.folder).shards)
        if command == "stats":
            with ProgressBar(size, "stats", arguments.progress) as bar:
                text = describe(arguments.folder, arguments.top, bar.update, arguments.png and Path(arguments.png))
            print(text)
        else:
            # Each shard is read twice: for its hash, and for its rows.
            with ProgressBar(2 * size, "verify", arguments.progress) as bar:
                manifests = verify(arguments.folder, bar.update)
            shards = sum(len(manifest.shards) for manifest in manifests)
            print(f"{arguments.folder}: good, {shards:,} shards checked")


def _make(command: str, options: dict[str, Any], team: Team | None) -> None:
    """The commands that make something on many processes."""
    output = options["output"]
    if command == "tokenize":
        from data_pipeline.build import tokenize

        tokens = tokenize(options.pop("input"), team=team, **options)
        ids = sum(shard.sides[side].length for shard in tokens.shards for side in tokens.sides)
        print(f"{output}: {ids:,} ids in {len(tokens.shards):,} token shards{_dropped(tokens.dropped)}")
    else:
        from data_pipeline.build import build, pack

        if command == "build":
            manifest = build(options.pop("input"), team=team, **options)
        else:
            manifest = pack(options.pop("tokens"), weights=dict(options.pop("weight")), team=team, **options)
        print(
            f"{output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
            f"{manifest.rows:,} rows of {manifest.sequence_length}, {len(manifest.shards):,} shards"
            f"{_dropped(manifest.dropped)}"
        )


def _dropped(counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"; dropped: {reasons}" if counts else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. argparse itself exits with 2 on wrong usage."""
    arguments = command_parser().parse_args(argv)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("error: interrupted. The same command goes on where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        # CorpusError is a ValueError; of others the type says more than the text.
        from data_pipeline.files import CorpusError

        if not isinstance(error, CorpusError | OSError):
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
