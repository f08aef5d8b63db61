"""What a run needs of its hosts besides packages: memory, shared memory, room for checkpoints, compilers. Lower bounds,
from its configuration and the sizes of its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.hosts.checks import GIB
from maskvr_ds.config import ConfigError, RunConfig, run_deepspeed_config
from maskvr_ds.planning.corpora import corpora_of
from maskvr_ds.planning.sizes import encoder_sizes
from maskvr_ds.planning.zero import zero_settings
from maskvr_ds.run_folder import checkpoints

# A process with torch and DeepSpeed; with CUDA it takes more.
_PROCESS = 1 * GIB
# NVIDIA recommends 1 GiB for the 8 ranks of a host.
_SHARED_PER_RANK = GIB // 8
# MiB of a GPU that its driver and a display may use.
_IDLE = 2048


def parameters(config: RunConfig) -> int | None:
    """Parameters of the largest model of the phases; None if its architecture or its vocabulary is not known here."""
    try:
        sizes = [encoder_sizes(config.model, corpus.vocabulary) for corpus in corpora_of(config, None, None)]
    except (ConfigError, OSError):
        return None
    return max(size.total for size in sizes)


def checkpoint_bytes(config: RunConfig, number: int) -> int:
    """Bytes of a checkpoint of a model with `number` parameters: its weights in the run's precision; fp32 weights, and
    optimizer states in fp32: weights and two moments."""
    return number * (zero_settings(run_deepspeed_config(config)).element + 16)


def room_needed(config: RunConfig, number: int) -> int:
    """Bytes that the checkpoints of a run still need on its disk: those kept, one that is being written, the best one,
    less those that are there."""
    kept = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    there = sum(checkpoints.size(path) for path in checkpoints.checkpoints(config.output_dir))
    return max(0, kept * checkpoint_bytes(config, number) - there)


def room_errors(reports: Mapping[str, Mapping[str, Any]], needed: int, folder: Path) -> list[str]:
    """Hosts whose disk of `folder` has less than `needed` bytes free."""
    return [
        f"{host}: {free / GIB:.3g} GiB free on the disk of {folder}, the run's checkpoints need {needed / GIB:.3g}; "
        "free some space, or lower checkpoint.keep_last"
        for host, value in reports.items()
        if (free := value.get("free_bytes")) is not None and free < needed
    ]


def memory_needed(config: RunConfig, number: int, slots: int, ranks: int, on_cpus: bool) -> int:
    """Bytes of a host's memory: per rank a process and the fp32 weights that it starts from; on CPUs, or with an
    offloaded optimizer, also gradients and optimizer states, partitioned as ZeRO does."""
    zero = zero_settings(run_deepspeed_config(config))
    states = 12 * number // (ranks if zero.stage else 1) if on_cpus or zero.offload else 0
    gradients = 4 * number if on_cpus else 0
    return slots * (_PROCESS + 4 * number + gradients + states)


def memory_errors(
    reports: Mapping[str, Mapping[str, Any]], hosts: Mapping[str, int], config: RunConfig, number: int, on_cpus: bool
) -> list[str]:
    """Hosts with less memory than `memory_needed`. hosts: host -> slots. number: of parameters."""
    lines = []
    for host, value in reports.items():
        needed = memory_needed(config, number, hosts[host], sum(hosts.values()), on_cpus)
        if (free := value.get("memory")) is not None and free < needed:
            lines.append(
                f"{host}: {free / GIB:.3g} GiB of memory are available, its ranks ({hosts[host]}) "
                f"need at least {needed / GIB:.3g}; end other programs there, or lower its slots"
            )
    return lines


def shared_memory_errors(reports: Mapping[str, Mapping[str, Any]], hosts: Mapping[str, int]) -> list[str]:
    """Hosts whose /dev/shm is too small for NCCL between their GPUs, as in containers with the default of 64 MiB."""
    return [
        f"{host}: {free / 2**20:.3g} MiB free in /dev/shm, NCCL needs about {slots * _SHARED_PER_RANK / 2**20:.0f} for "
        f"{slots} ranks; remove files there, or start the container with --shm-size=1g or --ipc=host"
        for host, value in reports.items()
        if (slots := hosts[host]) > 1
        and (free := value.get("shared_memory")) is not None
        and free < slots * _SHARED_PER_RANK
    ]


def gpu_memory_errors(reports: Mapping[str, Mapping[str, Any]], hosts: Mapping[str, int]) -> list[str]:
    """GPUs of ranks that other processes use."""
    return [
        f"{host}: GPU {index} has {used / 1024:.3g} GiB in use; end the process that uses it (nvidia-smi shows it)"
        for host, value in reports.items()
        if value.get("gpus")
        for index, used in enumerate(value["gpus"].get("used", ())[: hosts[host]])
        if used is not None and used > _IDLE
    ]


def compiler_errors(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Hosts without what torch.compile generates code with."""
    return [
        f"{host}: training.compile needs a C++ compiler, and there is none (CXX, g++, clang++); install g++, or set "
        "training.compile to none"
        for host, value in reports.items()
        if value["compiler"] is None
    ]


def triton_errors(reports: Mapping[str, Mapping[str, Any]], setting: str, off: str) -> list[str]:
    """Hosts without Triton. setting: what needs it. off: the value with which it does not."""
    return [
        f"{host}: {setting} needs Triton, which is not installed there; install triton, or set {setting} to {off}"
        for host, value in reports.items()
        if not value["triton"]
    ]


def interface_errors(reports: Mapping[str, Mapping[str, Any]], exports: Mapping[str, str]) -> list[str]:
    """Interfaces named for NCCL or gloo that a host does not have. A value is a list of names; for NCCL, of prefixes,
    after = of exact names, after ^ of what to exclude."""
    lines = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = exports.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        names = wanted.removeprefix("=").split(",")
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        for host, value in reports.items():
            found = value["interfaces"]
            if not any(name == one if exact else one.startswith(name) for name in names for one in found):
                lines.append(f"{host}: {variable}={wanted}, but its interfaces are {', '.join(found)}; correct it")
    return lines
