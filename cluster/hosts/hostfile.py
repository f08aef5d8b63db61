"""`python -m cluster hostfile`: checks a DeepSpeed hostfile, or creates one from names, ranges or a Slurm job.

What a hostfile may contain: maskvr_ds/runtime/hostfile.py.
"""

import argparse
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskvr_ds.runtime import slurm_env
from maskvr_ds.runtime.hostfile import HostfileError, is_host, read_hostfile
from maskvr_ds.runtime.numbers import MAX_NODES, MAX_SLOTS, integer, shortened

_RANGES = re.compile(r"\[([^\[\]]*)\]")
_BOUNDS = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", re.ASCII)


def expand(pattern: str) -> list[str]:
    """`a[1-3,7]-eth` -> a1-eth, a2-eth, a3-eth, a7-eth; leading zeros are kept. Several ranges: every combination.

    Raises HostfileError, also if the pattern stands for more than MAX_NODES hosts.
    """
    *texts, last = _RANGES.split(pattern)
    parts: list[list[str]] = []
    total = 1
    for before, ranges in zip(texts[::2], texts[1::2], strict=True):
        numbers = [_bounds(part, pattern) for part in ranges.split(",")]
        total *= sum(end - first + 1 for first, end, _ in numbers)
        if total > MAX_NODES:
            raise HostfileError(f"{shortened(pattern)}: stands for more than {MAX_NODES:,} hosts; correct the range")
        parts += [[before], [f"{n:0{width}d}" for first, end, width in numbers for n in range(first, end + 1)]]
    hosts = ["".join(combination) for combination in itertools.product(*parts, [last])]
    for host in hosts:
        if not is_host(host) or ":" in host:
            raise HostfileError(
                f"{shortened(pattern)}: {shortened(host)} is not a host name; expected letters, digits and _.-, or "
                "USER@HOST, no leading '-', ranges as in node[1-4]"
            )
    return hosts


def _bounds(part: str, pattern: str) -> tuple[int, int, int]:
    """First and last number of "7" or "01-16", and the width to which numbers are padded."""
    if (match := _BOUNDS.fullmatch(part)) is None:
        raise HostfileError(f"{shortened(pattern)}: {shortened(part)} is neither a number nor a range first-last")
    first, last = match[1], match[2] or match[1]
    if int(first) > int(last):
        raise HostfileError(f"{shortened(pattern)}: {part} is a descending range; write it as {last}-{first}")
    return int(first), int(last), len(first) if first.startswith("0") else 0


def hosts_from_words(words: Sequence[str], slots: int | None) -> dict[str, int]:
    """`h1 h2`, `h[1-4]:8`, `a:8,b:8` as host -> slots. slots: of hosts without a number. Raises HostfileError."""
    hosts: dict[str, int] = {}
    machines: dict[str, str] = {}
    for word in _split(",".join(words)):
        name, colon, count = word.partition(":")
        if ":" in count:
            raise HostfileError(
                f"{shortened(word)}: expected HOST or HOST:SLOTS; write an IPv6 address into a hostfile yourself, as "
                "`ADDRESS slots=N`"
            )
        try:
            number = integer(1, MAX_SLOTS)(count) if colon else slots
        except argparse.ArgumentTypeError:
            raise HostfileError(
                f"{shortened(word)}: {shortened(count)} slots; expected a number of ranks from 1 to {MAX_SLOTS:,}, as "
                "in node-1:8"
            ) from None
        if number is None:
            raise HostfileError(f"{word}: number of ranks is missing; pass {word}:8, or --slots 8 for all hosts")
        for host in expand(name):
            if host in hosts:
                raise HostfileError(f"{host} is listed twice")
            if (other := machines.setdefault(host.rpartition("@")[2], host)) != host:
                raise HostfileError(f"{host} is the same machine as {other}; list it once")
            hosts[host] = number
    if len(hosts) > MAX_NODES:
        raise HostfileError(f"--hosts: {len(hosts):,} hosts; at most {MAX_NODES:,} expected")
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
  python -m cluster hostfile hosts --check-slots                       # check it, and the GPUs of every host
  python -m cluster hostfile --hosts 'node[01-16]' --slots 8 --output hosts
  python -m cluster hostfile --hosts 10.0.0.4:8,10.0.0.5:4 > hosts
  python -m cluster hostfile --from-slurm --output hosts               # within salloc or sbatch
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
    if arguments.cpus and not arguments.check_slots:
        raise HostfileError("--cpus: counts cores for --check-slots; add --check-slots, or omit it")
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
        ranks = sum(hosts.values())
        print(f"{len(hosts)} host{'s' * (len(hosts) != 1)}, {ranks} rank{'s' * (ranks != 1)}")
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
