"""DeepSpeed hostfiles: one `host slots=N` per line, comments start with `#`.

If the file passed to `deepspeed --hostfile` does not exist, DeepSpeed trains on the local machine only and reports
success; on a malformed line it fails with a traceback. Reading the file here first turns both into an error message.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskvr_ds.runtime import slurm_env
from maskvr_ds.runtime.numbers import MAX_SLOTS, integer

# Lines that DeepSpeed accepts, except names that start with "-": options to ssh.
_LINE = re.compile(r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:@-]*)\s+slots=(?P<slots>\d+)\s*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
# Maximum number of hosts in one range; more is a typing error.
_MAX_HOSTS = 10_000


class HostfileError(ValueError):
    """An invalid hostfile, host name or number of slots."""


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host -> slots (number of ranks), in the order of the file; the first host is the master.

    Raises HostfileError, with the line number, if a line is not `host slots=N`, repeats a host or has 0 slots, and if
    the file names no host.
    """
    path = Path(path)
    if not path.is_file():
        raise HostfileError(f"{path}: no such file; DeepSpeed would train on this machine only")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HostfileError(f"{path}: not UTF-8 text ({error}); expected one `host slots=N` per line") from None
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
        raise HostfileError(f"{path}: names no host; expected one `host slots=N` per line")
    return hosts


def expand(pattern: str) -> list[str]:
    """`a[1-3,7]-eth` -> a1-eth, a2-eth, a3-eth, a7-eth; leading zeros are kept. Raises HostfileError."""
    if (match := re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", pattern)) is None:
        if not _HOST.fullmatch(pattern):
            raise HostfileError(
                f"{pattern!r}: invalid host name; expected letters, digits and _.-@, ranges as in node[1-4]"
            )
        return [pattern]
    before, ranges, after = match.groups()
    hosts = []
    for part in ranges.split(","):
        if (bounds := re.fullmatch(r"(\d+)(?:-(\d+))?", part)) is None:
            raise HostfileError(f"{pattern!r}: {part!r} is neither a number nor a range first-last")
        first, last = bounds[1], bounds[2] or bounds[1]
        if not 0 <= int(last) - int(first) < _MAX_HOSTS:
            raise HostfileError(f"{pattern!r}: {part} is a descending range, or one of more than {_MAX_HOSTS} hosts")
        width = len(first) if first.startswith("0") else 0
        numbers = range(int(first), int(last) + 1)
        hosts += [host for n in numbers for host in expand(f"{before}{n:0{width}d}{after}")]
    return hosts


def hosts_from_words(words: Sequence[str], slots: int | None) -> dict[str, int]:
    """`h1 h2`, `h[1-4]:8`, `a:8,b:8` as host -> slots. slots: of hosts without a number. Raises HostfileError."""
    hosts: dict[str, int] = {}
    for word in _split(",".join(words)):
        name, colon, count = word.partition(":")
        if colon and not (count.isdigit() and int(count)):
            raise HostfileError(f"{word!r}: {count!r} slots; expected a number of ranks, as in node-1:8")
        number = int(count) if colon else slots
        if number is None:
            raise HostfileError(f"{word}: number of ranks is missing; pass {word}:8, or --slots 8 for all hosts")
        for host in expand(name):
            if host in hosts:
                raise HostfileError(f"{host} is listed twice")
            hosts[host] = number
    return hosts


def _split(text: str) -> list[str]:
    """Split at commas outside of [ ]."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part]


def slurm_hosts(environment: Mapping[str, str], slots: int | None) -> dict[str, int]:
    """Nodes of the current Slurm job -> slots.

    slots: ranks per node; None: the job's tasks per node if set by --ntasks-per-node, otherwise its GPUs per node,
    otherwise its tasks on each node. Raises HostfileError if Slurm does not say.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise HostfileError("SLURM_JOB_NODELIST is not set; run this within a Slurm job (salloc, sbatch)")
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
        raise HostfileError("the number of ranks per node is unknown; pass --slots, or --ntasks-per-node to sbatch")
    if len(counts) != len(names):
        raise HostfileError(f"Slurm lists {len(names)} nodes, but tasks of {len(counts)}; pass --slots")
    return dict(zip(names, counts, strict=True))


def hostfile_text(hosts: Mapping[str, int]) -> str:
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())


_EXAMPLES = """examples:
  python -m cluster hostfile hosts --check-slots                       check it, and the GPUs of every host
  python -m cluster hostfile --hosts 'node[01-16]' --slots 8 --output hosts
  python -m cluster hostfile --hosts 10.0.0.4:8,10.0.0.5:4 > hosts
  python -m cluster hostfile --from-slurm --output hosts               within salloc or sbatch
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "hostfile",
        help="check or create a hostfile",
        description="Check a hostfile and print its hosts and ranks, or create one, the master first.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", help="hostfile to check")
    source.add_argument("--hosts", nargs="+", metavar="HOST[:SLOTS]", help="names and ranges: node[01-16], a:8,b:4")
    source.add_argument("--from-slurm", action="store_true", help="nodes of the current Slurm job")
    parser.add_argument(
        "--slots",
        type=integer(1, MAX_SLOTS),
        metavar="N",
        help="with --hosts, --from-slurm: ranks of every host without a number",
    )
    parser.add_argument("--output", metavar="FILE", help="write the hostfile (default: print it)")
    parser.add_argument("--check-slots", action="store_true", help="count the GPUs of every host over ssh")
    parser.add_argument("--cpus", action="store_true", help="with --check-slots: count CPU cores instead")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.file is not None:
        if arguments.slots is not None:
            raise HostfileError(
                f"--slots {arguments.slots}: {arguments.file} sets the slots of each host; change them there, or "
                "create a hostfile with --hosts"
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
    """Raise HostfileError if a host does not answer, or has fewer GPUs (CPU cores) than slots."""
    from cluster.hosts import checks, remote

    answers = remote.ask(hosts, {"action": "count"}, timeout=60)
    lines = []
    for host, answer in answers.items():
        if answer.error is not None:
            lines.append(f"{host}: {answer.error}")
        elif not on_cpus and answer.value["gpus"] is None:
            lines.append(f"{host}: its GPUs cannot be counted (no nvidia-smi); pass --cpus for ranks on CPUs")
        elif (error := checks.slots_error(host, hosts[host], answer.value, on_cpus)) is not None:
            lines.append(error)
    if lines:
        raise HostfileError("\n  ".join(["slots:", *lines]))
