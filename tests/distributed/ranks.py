"""Run a function on several ranks: real processes with a real gloo process group."""

import gc
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def _context(accelerator: str) -> Any:
    """On CPUs a fork server that has imported everything and computed nothing: each rank saves seconds of imports.

    Other accelerators need `spawn`: DeepSpeed chooses the accelerator when it is imported.
    """
    if accelerator != "cpu":
        return mp.get_context("spawn")
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the imports below
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["maskvr_ds.train"])
    return context


def _run_rank(
    function: Any,
    rank: int,
    world_size: int,
    port: int,
    accelerator: str,
    environment: dict[str, str],
    args: Any,
    answers: Any,
) -> None:
    # The fork server has the environment of its start. One thread each: ranks share the machine's cores, and OpenMP's
    # threads spin while they wait for each other.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        DS_ACCELERATOR=accelerator,
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    gc.freeze()  # imported modules are no garbage; scanning them takes half a second at the end of each run
    try:
        answers.put((rank, function(*args), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0, accelerator: str = "cpu"
) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes with torchrun's environment variables set.

    `function` must be importable (module level) and initialises the process group itself. `args` and results must be
    picklable and free of tensors, whose shared memory ends with the rank (NumPy arrays are fine).

    Returns the results by rank. Raises RuntimeError if a rank raised (with its traceback) or died without an answer,
    TimeoutError if not all ranks answered within `timeout` seconds; the remaining ranks are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = _context(accelerator)
    answers, environment = context.Queue(), dict(os.environ)
    processes = [
        context.Process(
            target=_run_rank, args=(function, rank, world_size, port, accelerator, environment, args, answers)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            # Checked before the queue, so that what a rank put there before it exited is certain to be read.
            dead = [r for r, p in enumerate(processes) if p.exitcode is not None and r not in results]
            try:
                rank, result, failure = answers.get(timeout=1.0)
            except queue.Empty:
                if dead:
                    codes = {r: processes[r].exitcode for r in dead}
                    raise RuntimeError(f"ranks ended without an answer, exit codes {codes}") from None
                if time.monotonic() > deadline:
                    missing = sorted(set(range(world_size)) - set(results))
                    raise TimeoutError(f"ranks {missing} did not answer within {timeout} s") from None
                continue
            if failure is not None:
                raise RuntimeError(f"rank {rank} of {world_size} failed:\n{failure}")
            results[rank] = result
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(timeout=10.0 if len(results) == world_size else 0.0)
            if process.is_alive():
                process.kill()
                process.join()
