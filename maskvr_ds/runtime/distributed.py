"""Process group: rank, world size, reductions of a training step, errors that concern all ranks.

Collectives, all over the world group: `all_reduce_sum`, `broadcast` (dtype and frequency: see the callers),
`run_collectively`, `run_on_rank0` and `gather_objects` (object all-gather, at start-up and around checkpoints only),
`barrier`.
"""

import contextlib
import os
import platform
import socket
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from maskvr_ds.runtime import slurm_env

T = TypeVar("T")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RemoteError(RuntimeError):
    """Another rank failed and this one did not. The message names it."""


class ReplicaError(ArithmeticError):
    """What all ranks should hold the same copy of differs. Raised on all ranks."""


def initialize(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or
    Slurm for the tasks of an `srun`.

    Without a launcher, the process is a world of one rank. Raises ValueError if only some of the variables are set, if
    tasks of one `srun` would form separate worlds that train the same run, if MASTER_ADDR does not resolve, or if a job
    with GPUs would train on CPUs.
    """
    os.environ.update(slurm_env.ranks(os.environ))
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
    _check_master(os.environ["MASTER_ADDR"])
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        if (gpus := slurm_env.gpus(os.environ)) and os.environ.get("DS_ACCELERATOR") != "cpu":
            raise ValueError(
                f"{socket.gethostname()}: Slurm gave the job {gpus} GPUs of this node, and torch {torch.__version__} "
                "sees none: check the driver and which torch is installed there, or set DS_ACCELERATOR=cpu to train on "
                "CPUs"
            )
        # On CPUs DeepSpeed compiles a shared-memory all-reduce at first use, which takes a minute. Only its inference
        # engine calls it, and a build that was killed leaves a lock on which later runs wait forever. Were DeepSpeed
        # to fill this table itself, it would probe all such ops with the compiler; it reads no other entry.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks share the machine's cores; otherwise each would start one thread per core.
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    else:
        # Before any collective: NCCL uses the current device, which is device 0 on every rank until set.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])


def _check_master(address: str) -> None:
    """Raise ValueError if MASTER_ADDR does not resolve: torch would try for minutes before it says so."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"{socket.gethostname()}: MASTER_ADDR {address} does not resolve here ({error}); set it to a name or an "
            "address of the host of rank 0 that all hosts know"
        ) from None


def run_as_rank(
    action: Callable[[], int | None],
    *,
    timeout: timedelta = timedelta(minutes=30),
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Run `action` as one rank of a program: join the process group, report errors once per job, leave the group.

    errors: exceptions that the user can correct, reported in one line by the rank that raised them. ArithmeticError is
    raised on all ranks and reported by rank 0. Other exceptions keep their traceback. Returns the exit status:
    `action`'s, or 1.
    """
    # Deprecations inside torch that DeepSpeed has yet to follow: the user of a run cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        initialize(timeout)
        return action() or 0
    except RemoteError:
        return 1  # reported by the rank that failed
    except ArithmeticError as error:  # FloatingPointError, ReplicaError
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except errors as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        shut_down()


def rank() -> int:
    """This process's rank; before `initialize` according to the launcher, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device of this rank."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(), int(os.environ["LOCAL_RANK"]))


def device_name() -> str:
    """Name of this rank's GPU, or of the CPU, as its maker gives it."""
    here = device()
    if here.type == "cuda":
        return torch.cuda.get_device_name(here)
    if here.type != "cpu":
        return here.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine() or "CPU"


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; returns the tensor. int64 wraps around."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Copy the tensor of rank `source` to all ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The value of rank `source`, on all ranks. The value must be picklable."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on all ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_device() -> None:
    """Block until all work queued on this rank's device is done: for timing between steps, never within a step."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def run_collectively(action: Callable[[], T], *, on: int | None = None) -> T:
    """Run `action` on every rank (or on rank `on` alone) and raise on all ranks if it failed on any.

    The first failing rank re-raises its own exception; the others raise RemoteError with its message. Without this
    they would wait for the failed rank in the next collective. Collective: call on all ranks. Returns what `action`
    returned; with `on`, that rank's result on all ranks.
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


def run_on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; returns its result, or raises its exception, on all ranks (see `run_collectively`)."""
    return run_collectively(action, on=0)


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
