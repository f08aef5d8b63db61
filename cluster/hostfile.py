"""DeepSpeed hostfiles: one `host slots=N` a line, `#` begins a comment.

Where the file named with `deepspeed --hostfile` does not exist, DeepSpeed trains on the local machine alone and calls
it success; a line it cannot read ends it with a traceback. Reading the file here first turns both into one error.
"""

import argparse
import re
from pathlib import Path

# What DeepSpeed accepts for a line; a name that begins with "-" would be an option to ssh.
_LINE = re.compile(r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:@-]*)\s+slots=(?P<slots>\d+)\s*")


class HostfileError(ValueError):
    """A hostfile that cannot be used."""


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host → slots (ranks to start there), in the file's order; the first host is the master.

    Raises HostfileError naming the line: not `host slots=N`, a host twice, no slots, or no host at all.
    """
    path = Path(path)
    if not path.is_file():
        raise HostfileError(f"{path}: no such file; DeepSpeed would train on this machine alone")
    hosts: dict[str, int] = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise HostfileError(f"{path}:{number}: {line!r} is not `host slots=N`")
        host, slots = match["host"], int(match["slots"])
        if host in hosts:
            raise HostfileError(f"{path}:{number}: {host} is listed twice; give it one line with all its slots")
        if slots == 0:
            raise HostfileError(f"{path}:{number}: {host} has no slots; remove the line")
        hosts[host] = slots
    if not hosts:
        raise HostfileError(f"{path}: names no host; one `host slots=N` a line expected")
    return hosts


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("hostfile", help="check a hostfile and print hosts and ranks")
    parser.add_argument("file")
    parser.set_defaults(run=_print)


def _print(arguments: argparse.Namespace) -> int:
    hosts = read_hostfile(arguments.file)
    for host, slots in hosts.items():
        print(f"{host:40} {slots}")
    print(f"{len(hosts)} hosts, {sum(hosts.values())} ranks")
    return 0
