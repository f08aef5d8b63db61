"""Slurm's environment variables, translated to those of a launcher (RANK, WORLD_SIZE, …). Loads no torch.

DeepSpeed does not read them: without this module, each task of an `srun` would form a world of one rank, and all of
them would train the same run.
"""

import re
import socket
import subprocess
from collections.abc import Mapping

from maskvr_ds.runtime.numbers import MAX_NODES, shortened

_STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
_NODE_ADDRESS = re.compile(r"\bNodeAddr=(\S+)")
# An index or a UUID, also that of a part of a GPU.
_DEVICE = re.compile(r"\d+|(GPU|MIG)-[^,]+", re.ASCII)
_COUNT = re.compile(r"(\d{1,9})(?:\(x(\d{1,9})\))?")
# Below the ephemeral ports (Linux: from 32768).
_PORTS = range(10_000, 30_000)


def job_id(environment: Mapping[str, str]) -> str:
    """The job's id as squeue and scontrol accept it; "" outside a job. An array task is identified by the array's id
    and its index: SLURM_JOB_ID of one of the tasks equals the array's id, which denotes all tasks."""
    array = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array[0]}_{array[1]}" if all(array) else environment.get("SLURM_JOB_ID", "")


def gpus(environment: Mapping[str, str]) -> int:
    """Number of GPUs on this node that were allocated to the job; 0 if Slurm does not report it."""
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdecimal() else 0


def hostnames(nodes: str) -> list[str]:
    """ "n[1-3]" -> n1, n2, n3. Raises ValueError if scontrol fails."""
    words = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"{' '.join(words)}: {error}; run this on a node of the job, with Slurm's commands") from None


def reachable(node: str) -> str:
    """The node's name if it resolves here, otherwise the address by which Slurm itself reaches it (NodeAddr), which an
    administrator may set to something else. Raises ValueError if neither does."""
    if _resolves(node):
        return node
    words = ["scontrol", "--oneliner", "show", "node", node]
    try:
        text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        address = match[1] if (match := _NODE_ADDRESS.search(text)) else node
        why = f"its NodeAddr is {address}"
    except (OSError, subprocess.SubprocessError) as error:
        address, why = node, f"{' '.join(words)}: {error}"
    if address != node and _resolves(address):
        return address
    raise ValueError(
        f"{socket.gethostname()}: the node name {node} does not resolve here ({why}); set MASTER_ADDR to an address of "
        f"{node} before the ranks start, or have it added to the name service"
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True


def task_counts(text: str) -> list[int]:
    """Tasks per node: "8(x2),4" -> 8, 8, 4. Raises ValueError if `text` has another form."""
    counts: list[int] = []
    for part in text.split(","):
        if (match := _COUNT.fullmatch(part)) is None:
            raise ValueError(f"{text!r} does not say how many tasks each node has; 8(x2),4 expected")
        if len(counts) + (nodes := int(match[2] or 1)) > MAX_NODES:
            raise ValueError(f"{shortened(text)}: more than {MAX_NODES:,} nodes")
        counts += [int(match[1])] * nodes
    return counts


def ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a launcher would set, for a task of an `srun`; empty outside one, or if RANK is set already.

    MASTER_ADDR and MASTER_PORT are kept if set; otherwise they are the step's first node, and a port derived from job,
    restart and step. A node whose name does not resolve is replaced by its address. Raises ValueError if RANK was set
    by something else and the world is smaller than the step, or if the first node cannot be determined or reached.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    if missing := [name for name in _STEP if name not in environment]:
        raise ValueError(f"SLURM_STEP_ID is set, but not {', '.join(missing)}; start ranks with srun or a launcher")
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if "RANK" in environment:
        # LOCAL_SIZE: ranks started by one `deepspeed` within a task.
        world, expected = int(environment.get("WORLD_SIZE", "1")), tasks * int(environment.get("LOCAL_SIZE", "1"))
        if tasks > 1 and world < expected:
            raise ValueError(
                f"WORLD_SIZE is {world}, but srun has started {tasks} tasks, for {expected} ranks: each would train "
                "the run on its own. Unset RANK and WORLD_SIZE, or start one task per node with a launcher that joins "
                "them"
            )
        return {}
    here = task_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    mapped = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        # If Slurm exposes one GPU per task, its index is 0.
        "LOCAL_RANK": "0" if _one_device(environment) else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here[int(environment.get("SLURM_NODEID", "0"))]),
    }
    if tasks > 1:
        given = environment.get("MASTER_ADDR")
        address = reachable(given or _first_host(environment["SLURM_STEP_NODELIST"]))
        if address != given:
            mapped["MASTER_ADDR"] = address
    elif "MASTER_ADDR" not in environment:
        mapped["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        # Different ports for neighbouring jobs and steps.
        number = int(environment["SLURM_JOB_ID"]) * 31 + int(environment.get("SLURM_RESTART_COUNT", "0")) * 7
        mapped["MASTER_PORT"] = str(_PORTS[(number + int(environment["SLURM_STEP_ID"])) % len(_PORTS)])
    return mapped


def _one_device(environment: Mapping[str, str]) -> bool:
    return _DEVICE.fullmatch(environment.get("CUDA_VISIBLE_DEVICES", "")) is not None


def _first_host(nodes: str) -> str:
    try:
        return hostnames(nodes)[0]
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"MASTER_ADDR is not set, and the first of {nodes} cannot be determined ({error}); set it to the first "
            "line of `scontrol show hostnames` before srun"
        ) from None
