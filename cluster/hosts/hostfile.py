"""DeepSpeed hostfiles: one `host slots=N` a line, `#` begins a comment.

Where the file named with `deepspeed --hostfile` does not exist, DeepSpeed trains on the local machine alone and calls
it success; a line it cannot read ends it with a traceback. Reading the file here first turns both into one error.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskvr_ds.runtime import slurm_env

# What DeepSpeed accepts for a line; a name that begins with "-" would be an option to ssh.
_LINE = re.compile(r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:@-]*)\s+slots=(?P<slots>\d+)\s*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
# Hosts of one range: a slip of the finger, not a cluster.
_MOST = 10_000


class HostfileError(ValueError):
    """A hostfile that cannot be used."""


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host → slots (ranks to start there), in the file's order; the first host is the master.

    Raises HostfileError naming the line: not `host slots=N`, a host twice, no slots, or no host at all.
    """
    path = Path(path)
    if not path.is_file():
        raise HostfileError(f"{path}: no such file; DeepSpeed would train on this machine alone")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HostfileError(f"{path}: not UTF-8 text ({error}); one `host slots=N` a line expected") from None
    hosts: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), 1):
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


def expand(pattern: str) -> list[str]:
    """`a[1-3,7]-eth` → a1-eth, a2-eth, a3-eth, a7-eth; leading zeros stay. Raises HostfileError."""
    if (match := re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", pattern)) is None:
        if not _HOST.fullmatch(pattern):
            raise HostfileError(
                f"{pattern!r} is no host's name; letters, digits and _.-@ expected, ranges as node[1-4]"
            )
        return [pattern]
    before, ranges, after = match.groups()
    found = []
    for part in ranges.split(","):
        if (bounds := re.fullmatch(r"(\d+)(?:-(\d+))?", part)) is None:
            raise HostfileError(f"{pattern!r}: {part!r} is no number and no range first-last")
        first, last = bounds[1], bounds[2] or bounds[1]
        if not 0 <= int(last) - int(first) < _MOST:
            raise HostfileError(f"{pattern!r}: {part} runs backwards, or over more than {_MOST} hosts")
        width = len(first) if first.startswith("0") else 0
        numbers = range(int(first), int(last) + 1)
        found += [host for n in numbers for host in expand(f"{before}{n:0{width}d}{after}")]
    return found


def hosts_from_words(words: Sequence[str], slots: int | None) -> dict[str, int]:
    """`h1 h2`, `h[1-4]:8`, `a:8,b:8` → host → slots. slots: of hosts that have none of their own."""
    hosts: dict[str, int] = {}
    for word in _split(",".join(words)):
        name, colon, count = word.partition(":")
        if colon and not (count.isdigit() and int(count)):
            raise HostfileError(f"{word!r}: {count!r} slots; a number of ranks expected, as in node-1:8")
        number = int(count) if colon else slots
        if number is None:
            raise HostfileError(f"{word}: how many ranks? Give {word}:8, or --slots 8 for all")
        for host in expand(name):
            if host in hosts:
                raise HostfileError(f"{host} is named twice")
            hosts[host] = number
    return hosts


def _split(text: str) -> list[str]:
    """At commas, but not at those within [ ]."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part]


def slurm_hosts(environment: Mapping[str, str], slots: int | None) -> dict[str, int]:
    """The nodes of the Slurm job that this runs in; slots: None: its tasks a node, else its GPUs a node."""
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise HostfileError("SLURM_JOB_NODELIST is not set: not within a Slurm job (salloc, sbatch)")
    names = slurm_env.hostnames(nodes)
    if slots is not None:
        counts = [slots] * len(names)
    elif tasks := environment.get("SLURM_NTASKS_PER_NODE"):
        counts = [int(tasks)] * len(names)
    elif gpus := environment.get("SLURM_GPUS_ON_NODE"):
        counts = [int(gpus)] * len(names)
    elif tasks := environment.get("SLURM_TASKS_PER_NODE"):
        counts = slurm_env.task_counts(tasks)
    else:
        raise HostfileError(
            "Slurm does not say how many ranks a node has; give --slots, or --ntasks-per-node to sbatch"
        )
    if len(counts) != len(names):
        raise HostfileError(f"Slurm names {len(names)} nodes and tasks for {len(counts)}; give --slots")
    return dict(zip(names, counts, strict=True))


def hostfile_text(hosts: Mapping[str, int]) -> str:
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())


_EXAMPLES = """examples:
  python -m cluster hostfile hosts                                     check it
  python -m cluster hostfile hosts --check-slots                       and the GPUs that each host has
  python -m cluster hostfile --hosts 'node[01-16]' --slots 8 --output hosts
  python -m cluster hostfile --hosts 10.0.0.4:8,10.0.0.5:8 gpu-west-2a-7:4 > hosts
  python -m cluster hostfile --from-slurm --output hosts               within salloc or sbatch
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "hostfile",
        help="check a hostfile, or make one",
        description="Check a hostfile and print hosts and ranks; or make one, the master first.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", help="to be checked")
    source.add_argument("--hosts", nargs="+", metavar="HOST[:SLOTS]", help="names and ranges: node[01-16], a:8,b:4")
    source.add_argument("--from-slurm", action="store_true", help="the nodes of the Slurm job that this runs in")
    parser.add_argument(
        "--slots", type=int, metavar="N", help="--hosts, --from-slurm: ranks on every host that does not say its own"
    )
    parser.add_argument("--output", metavar="FILE", help="write it there (default: print it)")
    parser.add_argument("--check-slots", action="store_true", help="ask every host by ssh how many GPUs it has")
    parser.add_argument("--cpus", action="store_true", help="--check-slots: ranks need CPU cores, not GPUs")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.slots is not None and arguments.slots < 1:
        raise HostfileError(f"--slots {arguments.slots}: at least 1 expected")
    if arguments.file is not None:
        if arguments.slots is not None:
            raise HostfileError(
                f"--slots {arguments.slots}: {arguments.file} says the slots of each host; change them there, or make "
                "a hostfile of --hosts"
            )
        hosts = read_hostfile(arguments.file)
    elif arguments.from_slurm:
        hosts = slurm_hosts(os.environ, arguments.slots)
    else:
        hosts = hosts_from_words(arguments.hosts, arguments.slots)
    if arguments.check_slots:
        _check_slots(hosts, arguments.cpus)
    if arguments.file is not None or arguments.output:
        if arguments.output:
            Path(arguments.output).write_text(hostfile_text(hosts), encoding="utf-8")
        for host, slots in hosts.items():
            print(f"{host:40} {slots}")
        print(f"{len(hosts)} hosts, {sum(hosts.values())} ranks")
    else:
        print(hostfile_text(hosts), end="")
    return 0


def _check_slots(hosts: Mapping[str, int], on_cpus: bool) -> None:
    """Raise HostfileError for hosts that do not answer, or have fewer GPUs (cores) than slots."""
    from cluster.hosts import checks, remote

    answers = remote.ask(hosts, {"action": "count"}, timeout=60)
    lines = []
    for host, answer in answers.items():
        if answer.fault is not None:
            lines.append(f"{host}: {answer.fault}")
        elif not on_cpus and answer.value["gpus"] is None:
            lines.append(f"{host}: its GPUs cannot be counted (no nvidia-smi); --cpus, where ranks run on CPUs")
        elif (fault := checks.slots_fault(host, hosts[host], answer.value, on_cpus)) is not None:
            lines.append(fault)
    if lines:
        raise HostfileError("\n  ".join(["slots:", *lines]))
