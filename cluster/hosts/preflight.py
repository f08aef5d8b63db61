"""`python -m cluster preflight`: what would stop or slow a run, found before hours are spent.

Every host says what it is and sees, all at once; then ranks add up known numbers and time every link. Prints one table
and each fault in a line with its remedy. Trains nothing, ends no other job, leaves nothing behind.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.hosts import hostfile, remote
from cluster.hosts import plan as preparation
from cluster.hosts.checks import GIB
from cluster.hosts.plan import Draft
from cluster.hosts.supervisor import POLL, Job
from maskvr_ds.config import add_run_options, load_config

RESULT = "interconnect.json"
# Seconds for the ranks' measurements.
_LONGEST = 600
_COLUMNS = (
    "host",
    "name",
    "ranks",
    "GPUs",
    "driver",
    "CPUs",
    "python",
    "torch",
    "deepspeed",
    "NCCL",
    "GiB free",
    "folder",
    "clock",
    "corpus",
)
_EXAMPLES = """examples:
  python -m cluster preflight --hostfile hosts --config run.yaml
  srun --pty bash -c 'python -m cluster preflight --slurm --config run.yaml'    # or in the job's script
exit status: 0 all is well; 1 a fault, each told in a line
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "preflight",
        help="check nodes, versions, disks, clocks and links before a run",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hostfile", metavar="FILE", help="one `host slots=N` a line, the master first")
    where.add_argument("--slurm", action="store_true", help="the nodes of the Slurm job that this runs in")
    parser.add_argument("--slots", type=int, metavar="N", help="--slurm: ranks a node; default: as the job says")
    preparation.add_options(parser, force="measure although other jobs are there")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument(
        "--slowest-link",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the links' median bandwidth that each must reach (default: 0.5)",
    )
    parser.add_argument("--bytes", type=int, metavar="N", help="that bandwidths are measured with; default: by device")
    parser.add_argument("--no-interconnect", action="store_true", help="start no ranks")
    parser.set_defaults(run=_preflight)


def _preflight(arguments: argparse.Namespace) -> int:
    if arguments.slurm:
        arguments.launcher = "slurm"
        hosts = hostfile.slurm_hosts(os.environ, arguments.slots)
    elif arguments.slots is not None:
        raise hostfile.HostfileError(
            f"--slots {arguments.slots}: {arguments.hostfile} says the slots of each host; change them there"
        )
    else:
        hosts = hostfile.read_hostfile(arguments.hostfile)
    config = load_config(arguments.config, arguments.assignments)
    draft = Draft(arguments, hosts, config)
    links: dict[str, Any] | None = None
    try:
        answers = draft.ask()
        faults = [*draft.faults(answers), *draft.unevenness(answers)]
        try:
            for index in range(len(config.phases) or 1):
                config.phase(index).accumulation_steps(sum(hosts.values()))
        except ValueError as error:
            faults.append(str(error))
        # Ranks that cannot start would add nothing but their own words to what is known.
        if not arguments.no_interconnect and sum(hosts.values()) > 1 and not faults:
            links, faults = _interconnect(draft, answers)
            if links is not None:
                faults += links_faults(links, arguments.slowest_link)
    finally:
        draft.discard()
    if arguments.json:
        said = {host: _row(answer) for host, answer in answers.items()}
        print(json.dumps({"hosts": said, "interconnect": links, "faults": faults}, indent=1))
    else:
        print(table(hosts, answers))
        if links is not None:
            print(summary(links))
        elif faults and not arguments.no_interconnect:
            print("interconnect: not measured, until the faults are mended")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _interconnect(draft: Draft, answers: Mapping[str, remote.Answer]) -> tuple[dict[str, Any] | None, list[str]]:
    """Start ranks of maskvr_ds.runtime.interconnect; → what they measured, and what kept them from it."""
    size = [] if draft.arguments.bytes is None else ["--bytes", str(draft.arguments.bytes)]
    plan = draft.plan(
        answers, "maskvr_ds.runtime.interconnect", lambda folder: ["--output", str(folder / RESULT), *size]
    )
    plan = replace(plan, start=min(plan.start, _LONGEST))
    result = plan.folder / RESULT
    job = Job(plan, quiet=True)
    why: str | None = None
    try:
        while (why := job.look()) is None:
            time.sleep(POLL)
    finally:
        ended = job.end()
    if not result.is_file():
        return None, ["interconnect: " + line for line in [*([why] if why else []), *job.explain(ended)]]
    return json.loads(result.read_text(encoding="utf-8")), []


def links_faults(links: Mapping[str, Any], share: float) -> list[str]:
    """Wrong sums, and links that have less than `share` of the median bandwidth."""
    faults = [f"{fault}; do not train: memory, cable or driver" for fault in links["faults"]]
    if len(set(links["nccl"])) > 1:
        faults.append(f"ranks load different NCCL: {', '.join(map(str, links['nccl']))}; install the same everywhere")
    speeds = [link["bytes_per_second"] for link in links["links"]]
    middle = statistics.median(speeds)
    for link in links["links"]:
        if link["bytes_per_second"] < share * middle:
            faults.append(
                f"link {_link(links, link)}: {_rate(link['bytes_per_second'])}, the median is {_rate(middle)}; "
                "look at its cable, switch port and NCCL_SOCKET_IFNAME, or leave a host out"
            )
    return faults


def summary(links: Mapping[str, Any]) -> str:
    slowest = min(links["links"], key=lambda link: link["bytes_per_second"])
    sums = "wrong sums" if links["faults"] else "sums are right"
    milliseconds = links["all_reduce_seconds"] * 1e3
    speed = _rate(slowest["bytes_per_second"])
    return (
        f"interconnect ({links['backend']}, {links['world_size']} ranks, {links['bytes'] / 2**20:g} MiB): {sums}; "
        f"all-reduce {milliseconds:.3g} ms, bus {_rate(links['bus_bytes_per_second'])}\n"
        f"slowest of {len(links['links'])} links: {_link(links, slowest)}, {speed} each way"
    )


def _link(links: Mapping[str, Any], link: Mapping[str, Any]) -> str:
    ends = [f"{links['hosts'][number]} (rank {number})" for number in link["ranks"]]
    return " – ".join(ends)


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.3g} GB/s"


def _row(answer: remote.Answer) -> dict[str, Any]:
    clock = (
        None if answer.clock is None else {"offset_seconds": answer.clock[0], "uncertainty_seconds": answer.clock[1]}
    )
    return {**answer.value, "clock": clock, "fault": answer.fault}


def table(hosts: Mapping[str, int], answers: Mapping[str, remote.Answer]) -> str:
    """One line a host."""
    rows: list[Sequence[str]] = [_COLUMNS]
    for host, answer in answers.items():
        value = answer.value
        if answer.fault is not None:
            rows.append((host, "no answer", str(hosts[host])))
            continue
        gpus, packages = value["gpus"], value["packages"]
        assert answer.clock is not None
        rows.append(
            (
                host,
                value["hostname"],
                str(hosts[host]),
                "none seen" if gpus is None else f"{len(gpus['names'])} {'/'.join(sorted(set(gpus['names'])))}",
                "-" if gpus is None else str(gpus["driver"]),
                str(value["cpus"]),
                value["python"],
                *(packages[name] or "-" for name in ("torch", "deepspeed", "nccl")),
                "-" if value["free_bytes"] is None else f"{value['free_bytes'] / GIB:.0f}",
                "writable" if value["folder"] is None else "fault",
                f"{answer.clock[0]:+.1f}",
                " ".join((digest or "missing")[:8] for digest in value["manifests"].values()),
            )
        )
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
