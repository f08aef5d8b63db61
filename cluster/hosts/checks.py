"""Checks of the hosts' reports before ranks are started: one line per error, with the host and a remedy."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.hosts.remote import Answer
from cluster.phases import phases_ahead
from maskvr_ds.config import RunConfig

GIB = 2**30
# Versions that must be equal on all hosts.
PACKAGES = ("python", "torch", "deepspeed", "transformers", "maskvr_ds", "nccl")


class LaunchError(ValueError):
    """A launch that cannot be started; one error per line."""


def corpora(config: RunConfig) -> list[str]:
    """Absolute paths of the corpora that the ranks will open: not those of phases that the run has finished."""
    # A dict: ordered, without duplicates.
    opened: dict[str, None] = {}
    for _, phase in phases_ahead(config):
        data, evaluation = phase.data, phase.evaluation
        paths = [entry.path for entry in data.corpora]
        held_out = [data.held_out_path] if data.held_out_path else [path / "held_out" for path in paths]
        for path in (*paths, *(held_out if evaluation.every_steps else ())):
            opened[str(path.absolute())] = None
    return list(opened)


def host_errors(
    hosts: Mapping[str, int], answers: Mapping[str, Answer], *, folder: Path, port: int, on_cpus: bool
) -> dict[str, list[str]]:
    """Errors by what was checked: unreachable hosts, too many slots, missing or different packages, an unusable folder,
    missing, different or unreadable corpora, a port in use.

    hosts: host -> slots, the first one is the master. folder: of the launch. port: of the master. on_cpus: ranks need
    CPU cores, not GPUs.
    """
    reports = {host: answer.value for host, answer in answers.items() if answer.error is None}
    what = "cores" if on_cpus else "GPUs"
    found: dict[str, list[str]] = {
        "hosts": [f"{host}: {answer.error}" for host, answer in answers.items() if answer.error is not None],
        what: [line for host in reports if (line := slots_error(host, hosts[host], reports[host], on_cpus))],
        "software": _package_errors(reports),
        "output_dir": [
            f"{host}: {folder}: {value['folder']}; output_dir must be writable from all nodes"
            for host, value in reports.items()
            if value["folder"] is not None
        ],
        "corpora": _corpus_errors(reports),
        "port": [],
    }
    master = next(iter(hosts))
    if master in reports and reports[master]["port"] is None:
        line = f"{master}: port {port} is in use there; without --master-port a free one is chosen"
        found["port"].append(line)
    return found


def _package_errors(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{host}: {sys.executable} has no {package} there; use the same environment on all hosts"
        for host, value in reports.items()
        for package in ("torch", "deepspeed")
        if value["packages"][package] is None
    ]
    for package in PACKAGES:
        versions = {h: v["python"] if package == "python" else v["packages"][package] for h, v in reports.items()}
        lines += _differing(package, versions, lambda v: v or "none", "install the same version on all hosts")
    return lines


def _corpus_errors(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{host}: {path}: no corpus there (no manifest.json); use a path shared by all nodes"
        for host, value in reports.items()
        for path, digest in value["manifests"].items()
        if digest is None
    ]
    for path in next(iter(reports.values()))["manifests"] if reports else ():
        digests = {h: v["manifests"][path] for h, v in reports.items() if v["manifests"][path] is not None}
        remedy = "all nodes must read the same corpus; copy it again, or use a shared path"
        lines += _differing(f"{path}/manifest.json", digests, lambda digest: f"sha256 {digest[:12]}", remedy)
    for host, value in reports.items():
        for path, faults in value.get("shards", {}).items():
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            if faults:
                lines.append(f"{host}: {path}/{faults[0]}{more}; copy the corpus again, or correct its permissions")
    return lines


def slots_error(host: str, slots: int, value: Mapping[str, Any], on_cpus: bool) -> str | None:
    """Error message if a host has more slots than GPUs, or than CPU cores if `on_cpus`."""
    if not on_cpus and value["gpus"] is None:
        return (
            f"{host}: slots={slots}, but no GPU is visible (nvidia-smi is missing or fails there); install the driver, "
            "or set DS_ACCELERATOR=cpu to run on CPUs"
        )
    available, what = (value["cpus"], "CPU cores") if on_cpus else (len(value["gpus"]["names"]), "GPUs")
    return f"{host}: slots={slots}, but it has {available} {what}; correct the hostfile" if slots > available else None


def disk_errors(answers: Mapping[str, Answer], folder: Path, minimum: float) -> list[str]:
    """Hosts with less than `minimum` GiB free on the file system of `folder`."""
    return [
        f"{host}: {free / GIB:.3g} GiB free on the disk of {folder}, {minimum:g} required; free some space, or lower "
        "--minimum-free"
        for host, answer in answers.items()
        if (free := answer.value.get("free_bytes")) is not None and free < minimum * GIB
    ]


def clock_errors(answers: Mapping[str, Answer], limit: float) -> list[str]:
    """Clocks that differ from this machine's by more than `limit` seconds plus the uncertainty of the measurement."""
    return [
        f"{host}: its clock is {answer.clock[0]:+.1f} s off this machine's; synchronise it with chrony or ntpd"
        for host, answer in answers.items()
        if answer.clock is not None and abs(answer.clock[0]) > limit + answer.clock[1]
    ]


def driver_errors(answers: Mapping[str, Answer]) -> list[str]:
    """Hosts with different GPUs or drivers."""
    drivers = {
        host: (answer.value["gpus"]["driver"], tuple(sorted(set(answer.value["gpus"]["names"]))))
        for host, answer in answers.items()
        if answer.value.get("gpus")
    }
    if len(set(drivers.values())) < 2:
        return []
    kinds = ", ".join(f"{host}: {', '.join(names)} with driver {driver}" for host, (driver, names) in drivers.items())
    return [f"hosts differ in GPUs or drivers ({kinds}); the slowest one limits the run: remove or update it"]


def inconsistencies(answers: Mapping[str, Answer], clock: float) -> list[str]:
    """Differences that slow a run or confuse its logs, but do not make it wrong. clock: seconds allowed."""
    return clock_errors(answers, clock) + driver_errors(answers)


def job_errors(answers: Mapping[str, Answer], key: str) -> list[str]:
    """DeepSpeed jobs that already run on the hosts. key: `plan.run_key` of this run."""
    lines = []
    for host, answer in answers.items():
        for job in answer.value.get("jobs", ()):
            if (job["mark"] or "").startswith(f"{key}-"):
                lines.append(f"{host}: ranks of an earlier launch of this run are still running (pid {job['pid']})")
            else:
                lines.append(f"{host}: another DeepSpeed job is running (pid {job['pid']}, user {job['user']})")
    return lines


def launcher_error(launcher: str, path: str) -> str | None:
    """Error message if this machine cannot use a launcher. path: PATH of DeepSpeed's runner."""
    programs = {
        "pdsh": ("pdsh", "ssh"),
        "openmpi": ("ompi_info", "mpirun"),
        "mpich": ("mpirun",),
        "slurm": ("sinfo", "srun"),
    }
    missing = [program for program in programs[launcher] if shutil.which(program, path=path) is None]
    if missing:
        return f"--launcher {launcher}: {', '.join(missing)} not found on this machine; install it, or choose another"
    if launcher == "mpich":
        program = shutil.which("mpirun", path=path)
        assert program is not None
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        if "HYDRA" not in version:
            return "--launcher mpich: mpirun is not MPICH's (Hydra); put that first in PATH"
    return None


def _differing(what: str, values: Mapping[str, Any], show: Callable[[Any], str], remedy: str) -> list[str]:
    """Hosts whose value is not the most frequent one, one line each. values: by host."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return []
    usual = counts[0][0]
    like = next(host for host, value in values.items() if value == usual)
    return [
        f"{host}: {what} is {show(value)}, on {like} it is {show(usual)}; {remedy}"
        for host, value in values.items()
        if value != usual
    ]
