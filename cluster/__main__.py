"""`python -m cluster`: command-line tools for login nodes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from cluster import status
from cluster.hosts import hostfile, launch, preflight
from cluster.slurm import command
from data_pipeline.console import CommandParser, run_into_pipe

EXAMPLES = """examples:
  python -m cluster slurm --config run.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --submit
  python -m cluster hostfile hosts && deepspeed --hostfile hosts --module maskvr_ds.train --config run.yaml
  python -m cluster preflight --hostfile hosts --config run.yaml
  python -m cluster launch --hostfile hosts --config run.yaml --resume auto
  python -m cluster status runs/mine
"""
# Each adds its parser, whose default `run` maps the parsed arguments to an exit status.
COMMANDS = (hostfile.add_parser, launch.add_parser, command.add_parser, preflight.add_parser, status.add_parser)


def command_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; the parsed arguments have `run`, which maps them to an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Submit, launch and watch runs from a login node. Needs neither torch nor deepspeed there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run_into_pipe(partial(run, arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
