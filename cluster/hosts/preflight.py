"""Find what would stop or slow a run before it starts.

Checks the configuration and what it names, as `maskvr config` does; collects a report of every host in parallel; then
starts ranks that all-reduce known numbers and time every link. Prints one line per host and one per check, and all
errors with their remedies. Trains nothing, kills no other job, leaves no files. Accepts --resume, --quiet and --verbose
as `launch` does, without effect.
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
from cluster.hosts.checks import GIB, LaunchError
from cluster.hosts.findings import Finding, findings_table, of_configuration, of_hosts
from cluster.hosts.plan import Draft, add_launch_options
from cluster.hosts.supervisor import POLL, Job
from maskvr_ds.config import ConfigError, add_run_options
from maskvr_ds.runtime.hostfile import HostfileError, read_hostfile
from maskvr_ds.runtime.numbers import MAX_SLOTS, integer, number
from maskvr_ds.training.references import CheckedRun, check_run

RESULT = "interconnect.json"
# Maximum seconds until the ranks measure.
_START_SECONDS = 600
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
  srun --pty bash -c 'python -m cluster preflight --slurm --config run.yaml'    # or in a job script
exit status: 0 no errors; 1 errors, one line each on standard error
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
    where.add_argument("--hostfile", metavar="FILE", help="one `host slots=N` per line, master first")
    where.add_argument("--slurm", action="store_true", help="nodes of the current Slurm job")
    parser.add_argument(
        "--slots",
        type=integer(1, MAX_SLOTS),
        metavar="N",
        help="with --slurm: ranks per node; default: as in the job",
    )
    add_launch_options(parser, force="measure although other jobs run on the hosts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--slowest-link",
        type=number(0, 1),
        default=0.5,
        metavar="SHARE",
        help="minimum bandwidth of a link, as a share of the median (default: 0.5)",
    )
    parser.add_argument(
        "--bytes", type=integer(1, 2**40), metavar="N", help="message size of the measurement; default: by device"
    )
    parser.add_argument("--no-interconnect", action="store_true", help="start no ranks, measure no links")
    parser.set_defaults(run=_preflight)


def _preflight(arguments: argparse.Namespace) -> int:
    if arguments.slurm:
        if arguments.launcher not in ("pdsh", "slurm"):  # pdsh: the default
            raise LaunchError(
                f"--launcher {arguments.launcher}: --slurm measures with srun; omit it, or give --hostfile instead"
            )
        arguments.launcher = "slurm"
        hosts = hostfile.slurm_hosts(os.environ, arguments.slots)
    elif arguments.slots is not None:
        raise HostfileError(
            f"--slots {arguments.slots}: {arguments.hostfile} sets the slots of each host; change them there"
        )
    else:
        hosts = read_hostfile(arguments.hostfile)
    answers: dict[str, remote.Answer] = {}
    links: dict[str, Any] | None = None
    ranks = sum(hosts.values())
    try:
        checked = check_run(arguments.config, arguments.assignments, ranks)
    except ConfigError as error:
        findings = [
            Finding("configuration", "", [str(error)]),
            Finding("all else", "not checked: it depends on the configuration", skipped=True),
        ]
    else:
        answers, links, findings = _check(arguments, hosts, checked)
    errors = [line for finding in findings for line in finding.faults]
    if arguments.json:
        reports = {host: _row(answer) for host, answer in answers.items()}
        rows = [
            {"check": finding.what, "state": finding.state, "summary": finding.summary, "faults": list(finding.faults)}
            for finding in findings
        ]
        print(json.dumps({"hosts": reports, "checks": rows, "interconnect": links, "faults": errors}, indent=1))
    else:
        if answers:
            print(table(hosts, answers), end="\n\n")
        print(findings_table(findings))
        if links is not None:
            print(summary(links))
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    return 1 if errors else 0


def _check(
    arguments: argparse.Namespace, hosts: Mapping[str, int], checked: CheckedRun
) -> tuple[dict[str, remote.Answer], dict[str, Any] | None, list[Finding]]:
    """Answers of the hosts, measurements of the links (None: not measured), and what was found."""
    ranks = sum(hosts.values())
    try:
        draft = Draft(arguments, hosts, checked.config)
    except (LaunchError, OSError) as error:
        unknown = Finding("hosts", "not asked: fix the errors first", skipped=True)
        return {}, None, [*of_configuration(checked, ranks, {}), Finding("launcher", "", [str(error)]), unknown]
    links = None
    try:
        answers = draft.ask()
        findings = [*of_configuration(checked, ranks, answers), *of_hosts(draft, answers)]
        if arguments.no_interconnect or ranks < 2:
            why = "--no-interconnect" if arguments.no_interconnect else "there is one rank"
            findings.append(Finding("interconnect", why, skipped=True))
        # Ranks that cannot start would only add messages about the same errors.
        elif any(finding.faults for finding in findings):
            findings.append(Finding("interconnect", "not measured; fix the errors first", skipped=True))
        else:
            links, errors = _interconnect(draft, answers)
            errors += [] if links is None else link_errors(links, arguments.slowest_link)
            findings.append(Finding("interconnect", "sums and bandwidths of all links", errors))
    finally:
        draft.discard()
    return answers, links, findings


def _interconnect(draft: Draft, answers: Mapping[str, remote.Answer]) -> tuple[dict[str, Any] | None, list[str]]:
    """Run maskvr_ds.runtime.interconnect on all ranks; returns its measurements, None if it failed, and the errors."""
    size = [] if draft.arguments.bytes is None else ["--bytes", str(draft.arguments.bytes)]
    plan = draft.plan(
        answers, "maskvr_ds.runtime.interconnect", lambda folder: ["--output", str(folder / RESULT), *size]
    )
    plan = replace(plan, start_timeout=min(plan.start_timeout, _START_SECONDS))
    result = plan.folder / RESULT
    job = Job(plan, quiet=True)
    why: str | None = None
    try:
        while (why := job.poll()) is None:
            time.sleep(POLL)
    finally:
        killed = job.kill()
    if not result.is_file():
        return None, ["interconnect: " + line for line in [*([why] if why else []), *job.explain(killed)]]
    return json.loads(result.read_text(encoding="utf-8")), []


def link_errors(links: Mapping[str, Any], share: float) -> list[str]:
    """Wrong sums, different NCCL versions, and links with less than `share` of the median bandwidth."""
    errors = [f"{error}; do not train: memory, cable or driver is faulty" for error in links["faults"]]
    if len(set(links["nccl"])) > 1:
        versions = ", ".join(map(str, links["nccl"]))
        errors.append(f"ranks load different NCCL versions: {versions}; install the same version on all hosts")
    speeds = [link["bytes_per_second"] for link in links["links"]]
    middle = statistics.median(speeds)
    for link in links["links"]:
        if link["bytes_per_second"] < share * middle:
            errors.append(
                f"link {_link(links, link)}: {_rate(link['bytes_per_second'])}, the median is {_rate(middle)}; "
                "check its cable, switch port and NCCL_SOCKET_IFNAME, or remove a host"
            )
    return errors


def summary(links: Mapping[str, Any]) -> str:
    """Measurements of the links in two lines."""
    slowest = min(links["links"], key=lambda link: link["bytes_per_second"])
    sums = "wrong sums" if links["faults"] else "correct sums"
    milliseconds = links["all_reduce_seconds"] * 1e3
    speed = _rate(slowest["bytes_per_second"])
    return (
        f"interconnect ({links['backend']}, {links['world_size']} ranks, {links['bytes'] / 2**20:g} MiB): {sums}; "
        f"all-reduce {milliseconds:.3g} ms, bus {_rate(links['bus_bytes_per_second'])}\n"
        f"slowest of {len(links['links'])} links: {_link(links, slowest)}, {speed} in each direction"
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
    return {**answer.value, "clock": clock, "fault": answer.error}


def table(hosts: Mapping[str, int], answers: Mapping[str, remote.Answer]) -> str:
    """One line per host."""
    rows: list[Sequence[str]] = [_COLUMNS]
    for host, answer in answers.items():
        value = answer.value
        if answer.error is not None:
            rows.append((host, "no answer", str(hosts[host])))
            continue
        gpus, packages = value["gpus"], value["packages"]
        assert answer.clock is not None
        rows.append(
            (
                host,
                value["hostname"],
                str(hosts[host]),
                "none" if gpus is None else f"{len(gpus['names'])} {'/'.join(sorted(set(gpus['names'])))}",
                "-" if gpus is None else str(gpus["driver"]),
                str(value["cpus"]),
                value["python"],
                *(packages[name] or "-" for name in ("torch", "deepspeed", "nccl")),
                "-" if value["free_bytes"] is None else f"{value['free_bytes'] / GIB:.0f}",
                "writable" if value["folder"] is None else "unusable",
                f"{answer.clock[0]:+.1f}",
                " ".join((digest or "missing")[:8] for digest in value["manifests"].values()),
            )
        )
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
