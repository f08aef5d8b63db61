"""What must hold on the hosts before ranks start there: each fault in a line, with its host and a remedy."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.hosts.remote import Answer
from maskvr_ds.config import RunConfig

GIB = 2**30


class LaunchError(ValueError):
    """What keeps a run from being started; one fault a line."""


def corpora(config: RunConfig) -> list[str]:
    """The corpora that ranks will open, as absolute paths."""
    found: dict[str, None] = {}
    for index in range(len(config.phases) or 1):
        data, evaluation = config.phase(index).data, config.phase(index).evaluation
        paths = [entry.path for entry in data.corpora]
        held_out = [data.held_out_path] if data.held_out_path else [path / "held_out" for path in paths]
        for path in (*paths, *(held_out if evaluation.every_steps else ())):
            found[str(path.absolute())] = None
    return list(found)


def faults(
    hosts: Mapping[str, int], answers: Mapping[str, Answer], *, folder: Path, port: int, on_cpus: bool
) -> list[str]:
    """hosts: host → slots, the first one the master. on_cpus: ranks need cores, not GPUs."""
    lines = [f"{host}: {answer.fault}" for host, answer in answers.items() if answer.fault is not None]
    seen = {host: answer.value for host, answer in answers.items() if answer.fault is None}
    lines += [line for host in seen if (line := slots_fault(host, hosts[host], seen[host], on_cpus)) is not None]
    for host, value in seen.items():
        for package in ("torch", "deepspeed"):
            if value["packages"][package] is None:
                lines.append(f"{host}: {sys.executable} there has no {package}; one environment for all hosts expected")
        if value["folder"] is not None:
            lines.append(f"{host}: {folder}: {value['folder']}; output_dir must lie where all nodes can write")
        for path, digest in value["manifests"].items():
            if digest is None:
                lines.append(f"{host}: {path}: no corpus there (no manifest.json); put it where all nodes see it")
    for package in ("python", "torch", "deepspeed", "transformers", "maskvr_ds", "nccl"):
        versions = {h: v["python"] if package == "python" else v["packages"][package] for h, v in seen.items()}
        lines += _differing(package, versions, lambda v: v or "none", "install the same on all hosts")
    for path in next(iter(seen.values()))["manifests"] if seen else ():
        digests = {h: v["manifests"][path] for h, v in seen.items() if v["manifests"][path] is not None}
        remedy = "all nodes must see one corpus; copy it anew, or name a shared folder"
        lines += _differing(f"{path}/manifest.json", digests, lambda digest: f"sha256 {digest[:12]}", remedy)
    master = next(iter(hosts))
    if master in seen and seen[master]["port"] is None:
        lines.append(f"{master}: port {port} is taken there; leave --master-port out, and a free one is found")
    return lines


def slots_fault(host: str, slots: int, value: Mapping[str, Any], on_cpus: bool) -> str | None:
    """What is wrong with the number of slots: more than GPUs, or than cores for ranks on CPUs."""
    if not on_cpus and value["gpus"] is None:
        return (
            f"{host}: slots={slots}, but no GPU is visible (nvidia-smi is missing or fails there); install the driver, "
            "or set DS_ACCELERATOR=cpu where ranks run on CPUs"
        )
    there, what = (value["cpus"], "CPU cores") if on_cpus else (len(value["gpus"]["names"]), "GPUs")
    return f"{host}: slots={slots}, but it has {there} {what}; correct the hostfile" if slots > there else None


def disk_faults(answers: Mapping[str, Answer], folder: Path, minimum: float) -> list[str]:
    """Hosts with less than `minimum` GiB free where `folder` lies."""
    return [
        f"{host}: {free / GIB:.3g} GiB free on the disk of {folder}, {minimum:g} expected; make room, or say "
        "--minimum-free"
        for host, answer in answers.items()
        if (free := answer.value.get("free_bytes")) is not None and free < minimum * GIB
    ]


def unevenness(answers: Mapping[str, Answer], clock: float) -> list[str]:
    """What slows a run or confuses its logs, and keeps none from being right: clocks more than `clock` seconds from
    this machine's, beyond what the connection leaves open; hosts with unlike GPUs or drivers."""
    lines = []
    drivers = {}
    for host, answer in answers.items():
        if answer.clock is not None and abs(answer.clock[0]) > clock + answer.clock[1]:
            lines.append(
                f"{host}: its clock is {answer.clock[0]:+.1f} s from this machine's; have chrony or ntpd set it"
            )
        if answer.value.get("gpus"):
            drivers[host] = answer.value["gpus"]["driver"], tuple(sorted(set(answer.value["gpus"]["names"])))
    if len(set(drivers.values())) > 1:
        kinds = ", ".join(
            f"{host}: {', '.join(names)} with driver {driver}" for host, (driver, names) in drivers.items()
        )
        lines.append(
            f"hosts differ in GPUs or drivers ({kinds}); the slowest sets the pace: leave it out, or update it"
        )
    return lines


def job_faults(answers: Mapping[str, Answer], key: str) -> list[str]:
    """DeepSpeed jobs that are on the hosts already. key: of this run, as in node.MARK."""
    lines = []
    for host, answer in answers.items():
        for job in answer.value.get("jobs", ()):
            if (job["mark"] or "").startswith(f"{key}-"):
                lines.append(f"{host}: ranks of an earlier launch of this run are still there (pid {job['pid']})")
            else:
                lines.append(f"{host}: another DeepSpeed job is there (pid {job['pid']}, user {job['user']})")
    return lines


def launcher_fault(launcher: str, path: str) -> str | None:
    """Why this machine cannot use a launcher. path: where DeepSpeed's runner will look for it."""
    programs = {
        "pdsh": ("pdsh", "ssh"),
        "openmpi": ("ompi_info", "mpirun"),
        "mpich": ("mpirun",),
        "slurm": ("sinfo", "srun"),
    }
    missing = [program for program in programs[launcher] if shutil.which(program, path=path) is None]
    if missing:
        return f"--launcher {launcher}: {', '.join(missing)} not found on this machine; install it, or use another"
    if launcher == "mpich":
        program = shutil.which("mpirun", path=path)
        assert program is not None
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        if "HYDRA" not in version:
            return "--launcher mpich: mpirun is not MPICH's (Hydra); put its folder first in PATH"
    return None


def _differing(what: str, values: Mapping[str, Any], show: Callable[[Any], str], remedy: str) -> list[str]:
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
