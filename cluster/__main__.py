"""`python -m cluster`: tools for login nodes."""

import argparse
import sys
from collections.abc import Sequence

from cluster.hostfile import read_hostfile

EXAMPLES = """examples:
  python -m cluster hostfile hosts && deepspeed --hostfile hosts --module maskvr_ds.train --config run.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Tools for login nodes: no torch, no deepspeed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    hostfile = commands.add_parser("hostfile", help="check a hostfile and print hosts and ranks")
    hostfile.add_argument("file")
    arguments = parser.parse_args(argv)
    try:
        hosts = read_hostfile(arguments.file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for host, slots in hosts.items():
        print(f"{host:40} {slots}")
    print(f"{len(hosts)} hosts, {sum(hosts.values())} ranks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
