"""Rank, world size and the few reductions of a training step.

Collectives here, all over the world group: `all_reduce_sum`, `broadcast` (dtype and frequency: the caller's),
`agreed` and `gather_objects` (object all-gather, at start-up and around checkpoints only), `barrier`.
"""

import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
# Below the ports that systems give out by themselves (Linux: from 32768).
_PORTS = range(10_000, 30_000)


class RemoteError(RuntimeError):
    """Another rank failed where this one did not. The message names it."""


def initialize(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or
    Slurm does for the tasks of an `srun`.

    Started without a launcher, the process is a world of one. Raises ValueError where only a part of it is set, and
    where tasks of one `srun` would be worlds of their own, each of them training the same run.
    """
    os.environ.update(slurm_ranks(os.environ))
    if "RANK" in os.environ:
        if missing := [name for name in _LAUNCHER if name not in os.environ]:
            raise ValueError(
                f"RANK is set, but not {', '.join(missing)}; use a launcher that sets {', '.join(_LAUNCHER)}"
            )
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # On CPUs DeepSpeed compiles a shared-memory all-reduce for a minute at first use. Only its inference
        # engine calls it, and a build that was killed leaves a lock that later runs wait for without end. Asked for
        # the table of such operations, DeepSpeed would try them all, with the compiler; it reads no other entry.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks share the machine's cores; without this each would start a thread per core.
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    else:
        # Before any collective: NCCL takes the current device, which is the first one for every rank until set.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher would set, for a task of an `srun`; nothing outside of one, or where RANK is set already.

    MASTER_ADDR and MASTER_PORT are kept where they are set, else the step's first node (as `scontrol show hostnames`
    says) and a port that follows from job, restart and step. Raises ValueError where RANK comes from elsewhere and the
    world is smaller than the step, and where the first node is not to be found out.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    if missing := [name for name in _SLURM if name not in environment]:
        raise ValueError(f"SLURM_STEP_ID is set, but not {', '.join(missing)}; start ranks with srun or a launcher")
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if "RANK" in environment:
        # LOCAL_SIZE: ranks that one `deepspeed` in a task has started.
        world, expected = int(environment.get("WORLD_SIZE", "1")), tasks * int(environment.get("LOCAL_SIZE", "1"))
        if tasks > 1 and world < expected:
            raise ValueError(
                f"WORLD_SIZE is {world}, but srun has started {tasks} tasks, for {expected} ranks: each would train "
                "the run by itself. Unset RANK and WORLD_SIZE, or start one task a node with a launcher that joins them"
            )
        return {}
    mapped = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        # Where Slurm shows each task one GPU, that is number 0.
        "LOCAL_RANK": "0" if _one_device(environment) else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment, tasks)),
    }
    if "MASTER_ADDR" not in environment:
        mapped["MASTER_ADDR"] = "127.0.0.1" if tasks == 1 else _first_host(environment["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" not in environment:
        # Neighbouring jobs and steps get ports of their own.
        number = int(environment["SLURM_JOB_ID"]) * 31 + int(environment.get("SLURM_RESTART_COUNT", "0")) * 7
        mapped["MASTER_PORT"] = str(_PORTS[(number + int(environment["SLURM_STEP_ID"])) % len(_PORTS)])
    return mapped


def _one_device(environment: Mapping[str, str]) -> bool:
    return environment.get("CUDA_VISIBLE_DEVICES", "").isdigit()


def _tasks_here(environment: Mapping[str, str], tasks: int) -> int:
    """Tasks of the step on this node, from e.g. "8(x2),4"."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split(","):
        count, _, nodes = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def _first_host(nodes: str) -> str:
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(
            f"MASTER_ADDR is not set, and scontrol does not say which is the first of {nodes} ({error}); set it to the "
            "first line of `scontrol show hostnames` before srun"
        ) from None


def rank() -> int:
    """This process's number; what the launcher said before `initialize`, 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where this rank computes."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(), int(os.environ["LOCAL_RANK"]))


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; the tensor itself. int64 wraps."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """The tensor of rank `source`, on every rank, in place; the tensor itself."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The value of rank `source`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, by rank, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_device() -> None:
    """Until everything queued on this rank's device is done. For clocks, at pauses of the training; never in a step."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def agreed(action: Callable[[], T], *, on: int | None = None) -> T:
    """Run `action` on every rank (or on rank `on` alone) and raise on every rank if it failed on any.

    The first failing rank raises its own error, so that it is told once; the others raise RemoteError with its words.
    Without this they would wait for it in the next collective. Every rank calls. Returns what `action` returned;
    with `on`, that rank's result on every rank.
    """
    error: Exception | None = None
    result: Any = None
    try:
        if on in (None, rank()):
            result = action()
    except Exception as fault:
        error = fault
    for failed, message in enumerate(gather_objects(None if error is None else str(error))):
        if message is None:
            continue
        if failed == rank() and error is not None:
            raise error
        raise RemoteError(f"rank {failed}: {message}")
    return result if on is None else broadcast_object(result, source=on)


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
