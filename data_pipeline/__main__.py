"""Command line `python -m data_pipeline`: tokenizer, build, tokenize, pack, verify, stats, inspect."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from data_pipeline.console import CommandParser, run_into_pipe
from data_pipeline.numbers import counted, integer
from data_pipeline.options import (
    INPUT,
    OnePerSource,
    document_options,
    packing_options,
    progress_options,
    source_options,
    weight,
    worker_options,
)

if TYPE_CHECKING:
    from data_pipeline.arguments import Safeguards
    from data_pipeline.execution.mpi import Team

_EPILOG = """\
`python -m data_pipeline COMMAND --help` shows examples. A stopped build resumes when the same command is rerun.
Exit codes: 0 success, 1 failure, 2 usage error, 130 Ctrl-C.
"""
_OUTPUT = "to write: new, empty, or of the same command stopped before"
_Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


def command_parser() -> argparse.ArgumentParser:
    """Parser of all commands; cluster/slurm/corpora.py uses it to check arguments before a job is submitted."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline",
        description="Convert raw text to a corpus of tokenised, unmasked rows for pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    _add_tokenizer(commands)
    _add_build(commands)
    _add_tokenize(commands)
    _add_pack(commands)
    _add_verify(commands)
    _add_stats(commands)
    _add_inspect(commands)
    return parser


def _add_command(
    commands: _Commands, name: str, summary: str, examples: str, description: str = ""
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_tokenizer(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "tokenizer",
        "train a tokenizer: BERT's WordPiece or byte-level BPE; or add words to one",
        "  python -m data_pipeline tokenizer --input texts/ --vocab-size 30522 --output tok/\n"
        "  python -m data_pipeline tokenizer --input 'wiki/*.jsonl.zst' --text-field body --vocab-size 30522 \\\n"
        "      --cased --output tok_cased/\n"
        "  python -m data_pipeline tokenizer --description corpus.yaml --vocab-size 30522 --output tok/\n"
        "  python -m data_pipeline tokenizer --input texts/ --vocab-size 50265 --kind byte-bpe --output tok_bpe/\n"
        "  python -m data_pipeline tokenizer --extend bert/ --add 500 --input papers/ --output tok_papers/\n",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--description",
        metavar="YAML",
        help="sources and document rules, as for build; weights, duplicates and contamination do not matter here",
    )
    source.add_argument("--input", nargs="+", metavar="PATH", help=INPUT)
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--vocab-size", type=integer, metavar="N", help="entries, including special tokens")
    size.add_argument(
        "--extend",
        metavar="BASE",
        help="instead of a new tokenizer: this one (folder, or name on a hub), with --add new tokens",
    )
    command.add_argument(
        "--add",
        type=integer,
        metavar="N",
        help="with --extend: number of new tokens, for the words of the text by which most tokens are saved",
    )
    command.add_argument(
        "--kind",
        choices=("wordpiece", "byte-bpe"),
        help="wordpiece: as BERT's; byte-bpe: byte-level BPE as RoBERTa's (default wordpiece)",
    )
    command.add_argument("--cased", action="store_true", help="wordpiece: keep case and accents (default: lower-case)")
    command.add_argument("--output", required=True, metavar="DIR", help=f"tokenizer folder {_OUTPUT}")
    document_options(command)
    progress_options(command)


def _add_build(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "build",
        "tokenise and pack texts into a corpus",
        "  python -m data_pipeline build --input texts/ --tokenizer tok/ --sequence-length 128 \\\n"
        "      --output corpus/ --workers 16\n"
        "  mpirun -n 64 python -m data_pipeline build --description corpus.yaml --tokenizer tok/ \\\n"
        "      --sequence-length 512 --packing sop --held-out 0.005 --output corpus512/ --workers 8\n",
        "Tokenise and pack texts into a corpus. Rows are in document order; the trainer shuffles them.\n"
        "The output does not depend on --workers, nor on interruptions.",
    )
    source_options(command)
    packing_options(command)
    command.add_argument("--output", required=True, metavar="DIR", help=f"corpus folder {_OUTPUT}")
    worker_options(command)


def _add_tokenize(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "tokenize",
        "first half of build: write token shards, from which many corpora can be packed",
        "  python -m data_pipeline tokenize --input texts/ --tokenizer tok/ --output tokens/ --workers 16\n"
        "  python -m data_pipeline tokenize --description corpus.yaml --tokenizer tok/ --held-out 0.005 \\\n"
        "      --output tokens/ --workers 16\n",
        "Tokenise texts to token shards: ids, document and sentence boundaries, word starts.",
    )
    source_options(command)
    command.add_argument("--output", required=True, metavar="DIR", help=f"folder of token shards {_OUTPUT}")
    worker_options(command)


def _add_pack(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "pack",
        "second half of build: pack token shards into a corpus",
        "  python -m data_pipeline pack tokens/ --sequence-length 128 --output corpus128/\n"
        "  python -m data_pipeline pack tokens/ --sequence-length 512 --output corpus512/ --weight wiki=2\n",
        "Pack token shards into a corpus. The same token shards can be packed any number of times.",
    )
    command.add_argument("tokens", metavar="TOKENS", help="output folder of tokenize")
    command.add_argument(
        "--weight",
        action=OnePerSource,
        default=[],
        type=weight,
        metavar="SOURCE=W",
        help="use the documents of a source W times, overriding the description; may be repeated",
    )
    packing_options(command)
    command.add_argument("--output", required=True, metavar="DIR", help=f"corpus folder {_OUTPUT}")
    worker_options(command)


def _add_verify(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "verify",
        "check all data of a corpus, and report every bad file",
        "  python -m data_pipeline verify corpus/\n  python -m data_pipeline verify tokens/ --no-progress\n",
    )
    command.add_argument("folder", metavar="DIR", help="corpus folder, or output folder of tokenize")
    progress_options(command)


def _add_stats(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "stats",
        "show tokens, rows, documents, unknown rate, lengths, top tokens",
        "  python -m data_pipeline stats corpus/\n  python -m data_pipeline stats corpus/ --top 50 --png corpus.png\n",
    )
    command.add_argument(
        "--top",
        type=integer,
        default=20,
        metavar="N",
        help="most frequent tokens to list (default 20)",
    )
    command.add_argument("--png", metavar="FILE", help="plot lengths, top tokens and sources to this file")
    command.add_argument("folder", metavar="DIR", help="corpus folder")
    progress_options(command)


def _add_inspect(commands: _Commands) -> None:
    command = _add_command(
        commands,
        "inspect",
        "print rows as tokens",
        "  python -m data_pipeline inspect corpus/\n  python -m data_pipeline inspect corpus/ --first 1000 --rows 20\n",
    )
    command.add_argument("--rows", type=integer, default=5, metavar="N", help="number of rows (default 5)")
    command.add_argument("--first", type=integer, default=0, metavar="ROW", help="first row (default 0)")
    command.add_argument("folder", metavar="DIR", help="corpus folder")


def _run(arguments: argparse.Namespace) -> None:
    # Late imports: --help does not load Arrow.
    options = vars(arguments)
    command = options.pop("command")
    with _log_to_stderr(options):
        _run_command(command, options, arguments)


def _run_command(command: str, options: dict[str, Any], arguments: argparse.Namespace) -> None:
    if command in ("build", "tokenize", "pack"):
        from data_pipeline.execution.mpi import join_team
        from data_pipeline.execution.workers import Pool, serve

        team = join_team()
        if team and team.rank:
            serve(team, Pool(arguments.workers))
            return
        try:
            _run_parallel(command, options, team)
        finally:
            if team:
                team.stop()
    elif command == "tokenizer":
        options["limits"] = _safeguards(options).limits()
        if (path := options.pop("description")) is not None:
            from data_pipeline.arguments import resolve_description

            rules = (options.pop(name) for name in ("documents", "text_field", "no_text", "bad_records"))
            options["description"], _ = resolve_description(None, path, *rules)
        print(f"{arguments.output}: {_make_tokenizer(options)}")
    elif command == "inspect":
        from data_pipeline.reports.rows import decoded_rows

        print(decoded_rows(arguments.folder, arguments.first, arguments.rows))
    else:
        from data_pipeline.execution.progress import ProgressBar
        from data_pipeline.reports.describe import describe
        from data_pipeline.reports.scan import shards_of, verify, verify_tokens
        from data_pipeline.shards import HELD_OUT, read_manifest
        from data_pipeline.tokenization.token_shards import is_tokens, read_tokens

        if command == "verify" and is_tokens(arguments.folder):
            tokens = read_tokens(arguments.folder, sizes=False)
            with ProgressBar(tokens.bytes, "verify", arguments.progress) as bar:
                verify_tokens(arguments.folder, tokens, bar.update)
            print(f"{arguments.folder}: OK, {counted(len(tokens.shards), 'token shard')} checked")
            _print_not_hashed([Path(arguments.folder)])
            return
        size = sum(shard.bytes for shard in read_manifest(arguments.folder).shards)
        held_out = Path(arguments.folder) / HELD_OUT
        if command == "stats":
            with ProgressBar(size, "stats", arguments.progress) as bar:
                text = describe(arguments.folder, arguments.top, bar.update, arguments.png and Path(arguments.png))
            print(text)
        else:
            size += sum(path.stat().st_size for path in held_out.glob("*.arrow"))
            # Each shard is read twice: for its SHA-256, and for its rows.
            with ProgressBar(2 * size, "verify", arguments.progress) as bar:
                manifests = verify(arguments.folder, bar.update)
            print(f"{arguments.folder}: OK, {shards_of(manifests)} checked")
            _print_not_hashed([Path(arguments.folder), *([held_out] if held_out.exists() else [])])


def _make_tokenizer(options: dict[str, Any]) -> str:
    """Train or extend a tokenizer; returns what was made."""
    from data_pipeline.files import CorpusError
    from data_pipeline.tokenization.training import extend_tokenizer, train_tokenizer

    inputs, base, number = (options.pop(name) for name in ("input", "extend", "add"))
    if base is None:
        if number is not None:
            raise CorpusError(f"--add {number:,}: belongs to --extend BASE; omit it")
        options["kind"] = options["kind"] or "wordpiece"
        train_tokenizer(inputs, **options)
        return f"tokenizer of {options['vocab_size']:,} entries"
    if number is None:
        raise CorpusError("--extend needs --add N, the number of new tokens")
    _, kind, cased = (options.pop(name) for name in ("vocab_size", "kind", "cased"))
    if kind or cased:
        raise CorpusError(f"{'--kind' if kind else '--cased'}: --extend keeps what its base is; omit it")
    made = extend_tokenizer(inputs, base, number, **options)
    shown = ", ".join(made.tokens[:3]) + (", …" if len(made.tokens) > 3 else "")
    return (
        f"tokenizer of {made.vocab_size:,} entries, {len(made.tokens):,} of them new ({shown})"
        f"; the text has {made.after:,} tokens, {made.before:,} before"
    )


def _print_not_hashed(folders: Sequence[Path]) -> None:
    from data_pipeline.checksums import is_hashed, not_hashed
    from data_pipeline.manifest import MANIFEST

    if manifests := [folder / MANIFEST for folder in folders if not is_hashed(folder / MANIFEST)]:
        print(not_hashed(manifests))


def _run_parallel(command: str, options: dict[str, Any], team: Team | None) -> None:
    """Run build, tokenize or pack, on rank 0 of a team if there is one."""
    output = options["output"]
    if command != "pack":
        options["safeguards"] = _safeguards(options)
    if command == "tokenize":
        from data_pipeline.build import tokenize
        from data_pipeline.tokenization.unknown import describe_unknown

        tokens = tokenize(options.pop("input"), team=team, **options)
        ids = sum(shard.sides[side].length for shard in tokens.shards for side in tokens.sides)
        facts = f"{ids:,} ids in {counted(len(tokens.shards), 'token shard')}, {describe_unknown(tokens)}"
        print(f"{output}: {facts}{_dropped(tokens.dropped)}")
    else:
        from data_pipeline.build import build, pack

        notes: list[str] = []
        options["report"] = notes.append
        if command == "build":
            manifest = build(options.pop("input"), team=team, **options)
        else:
            manifest = pack(options.pop("tokens"), weights=dict(options.pop("weight")), team=team, **options)
        print(
            f"{output}: {counted(manifest.documents, 'document')}, {counted(manifest.tokens, 'token')}, "
            f"{counted(manifest.rows, 'row')} of {manifest.sequence_length}, {counted(len(manifest.shards), 'shard')}"
            f"{''.join(f', {note}' for note in notes)}{_dropped(manifest.dropped)}"
        )


def _safeguards(options: dict[str, Any]) -> Safeguards:
    from data_pipeline.arguments import Safeguards

    names = ("max_record", "max_expansion", "max_unknown")
    return Safeguards(**{name: options.pop(name) for name in names if name in options})


def _dropped(counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"; dropped: {reasons}" if counts else ""


class _StderrHandler(logging.Handler):
    """Prints records on the current sys.stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _log_to_stderr(options: dict[str, Any]) -> Iterator[None]:
    """Take --quiet and --verbose out of the options; log to stderr, at their level, within the block."""
    quiet, verbose = options.pop("quiet", False), options.pop("verbose", False)
    logger = logging.getLogger("data_pipeline")
    if quiet and options["progress"] is None:
        options["progress"] = False
    handler, level = _StderrHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. On usage errors, argparse exits with 2."""
    arguments = command_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Tokens and paths may not be printable in the encoding of the locale.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run_into_pipe(partial(_run, arguments))
    except KeyboardInterrupt:
        print("error: interrupted. Rerun the same command to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        # Any other ValueError is a bug: show its traceback.
        from data_pipeline.files import CorpusError

        if not isinstance(error, CorpusError | OSError):
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
