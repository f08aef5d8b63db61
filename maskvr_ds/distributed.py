"""Rank, world size and the few reductions of a training step.

Collectives here, all over the world group: `all_reduce_sum` (int64 or float64, as the caller says),
`agree` (object all-gather, at start-up and around checkpoints only), `barrier`.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class RemoteError(RuntimeError):
    """Another rank failed where this one did not. The message names it."""


def initialize(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Started without a launcher, the process is a world of one.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # On CPUs DeepSpeed compiles a shared-memory all-reduce for a minute at first use. Only its inference
        # engine calls it, and a build that was killed leaves a lock that later runs wait for without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks share the machine's cores; without this each would start a thread per core.
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    else:
        # Before any collective: NCCL takes the current device, which is the first one for every rank until set.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timeout, verbose=False)


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


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error: its own where it has one, else RemoteError naming the rank.

    Every rank calls this at the same place; without it the others would wait for the failed one.
    """
    messages: list[str | None] = [None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(messages, None if error is None else f"{error}")
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise RemoteError(f"rank {other}: {message}")


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
