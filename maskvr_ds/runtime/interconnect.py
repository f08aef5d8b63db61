"""Do the ranks add up right, how fast, and which link is the slowest: `python -m cluster preflight` starts it as ranks.

Collectives, all over the world group: all-reduces of int64, fp32 and bf16 vectors; barriers between rounds; point to
point, both ways at once, between one rank of every host (every rank, where there is one host) and each of the others.
A round of pairs in which everyone takes part once (a tournament) measures n/2 links at a time, as training uses them.
"""

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import atomic_write

MIB = 2**20
_LENGTHS = (1, 1_003, 262_147)
_REPEATS = 5


def wrong_sums() -> list[str]:
    """All-reduces whose result is known; → what is wrong with this rank's. Every rank calls.

    Element i of rank r is (i + 7 r) mod 61: all sums are whole numbers that the type holds exactly.
    """
    n, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    faults = []
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        # bf16 has 8 bits: up to 256 it counts exactly (beyond 128 ranks little is left of this one).
        modulus = 61 if dtype != torch.bfloat16 else max(1, 257 // n)
        for length in _LENGTHS:
            position = torch.arange(length, device=device)
            mine = ((position + 7 * rank) % modulus).to(dtype)
            expected = sum(((position + 7 * r) % modulus) for r in range(n))
            distributed.all_reduce_sum(mine)
            wrong = int((mine.to(torch.int64) != expected).sum())
            if wrong:
                faults.append(f"all-reduce of {length} {str(dtype).removeprefix('torch.')}: {wrong} sums are wrong")
    return faults


def all_reduce_bandwidth(size: int) -> tuple[float, float]:
    """Median seconds of an all-reduce of `size` bytes of fp32, and its bus bandwidth in bytes a second.

    Bus bandwidth, as nccl-tests count it: 2 (n − 1)/n · size / seconds, what each link carries in a ring.
    """
    n = distributed.world_size()
    vector = torch.ones(size // 4, device=distributed.device())
    seconds = _median(lambda: distributed.all_reduce_sum(vector))
    return seconds, 2 * (n - 1) / n * size / seconds


def rounds(players: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, everyone at most once a round: the circle method."""
    circle: list[int | None] = [*players] + ([None] if len(players) % 2 else [])
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def link_bandwidths(players: Sequence[int], size: int) -> dict[tuple[int, int], float]:
    """Bytes a second, one way, of each pair of ranks while both send `size` bytes; the same on every rank."""
    rank, device = distributed.rank(), distributed.device()
    found: dict[tuple[int, int], float] = {}
    outgoing, incoming = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    for pairs in rounds(players):
        distributed.barrier()
        for pair in pairs:
            if rank in pair:
                other = pair[0] if rank == pair[1] else pair[1]

                def exchange(other: int = other) -> None:
                    works = [dist.P2POp(dist.isend, outgoing, other), dist.P2POp(dist.irecv, incoming, other)]
                    for work in dist.batch_isend_irecv(works):
                        work.wait()

                found[pair] = size / _median(exchange)
    # Both ends have timed it; the slower one counts.
    merged: dict[tuple[int, int], float] = {}
    for each in distributed.gather_objects(found):
        for pair, value in each.items():
            merged[pair] = min(value, merged.get(pair, value))
    return merged


def _median(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        distributed.wait_for_device()
        begun = time.perf_counter()
        action()
        distributed.wait_for_device()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])  # the first one connects


def nccl_version() -> str | None:
    """Of the library that is loaded, None on CPUs."""
    if distributed.device().type != "cuda":
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def measure(size: int) -> dict[str, Any]:
    """Everything, in JSON types; the same on every rank. size: bytes of the bandwidths' vectors."""
    n = distributed.world_size()
    mine = {"host": socket.gethostname(), "faults": wrong_sums(), "nccl": nccl_version()}
    said = distributed.gather_objects(mine)
    hosts = [each["host"] for each in said]
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    seconds, bus = all_reduce_bandwidth(size)
    # Ranks time it alike but for noise; rank 0's counts.
    seconds, bus = distributed.broadcast_object((seconds, bus))
    links = link_bandwidths(first if len(first) > 1 else range(n), size)
    return {
        "world_size": n,
        "bytes": size,
        "backend": str(dist.get_backend()),
        "faults": [f"rank {r} on {each['host']}: {fault}" for r, each in enumerate(said) for fault in each["faults"]],
        "nccl": [each["nccl"] for each in said],
        "hosts": hosts,
        "all_reduce_seconds": seconds,
        "bus_bytes_per_second": bus,
        "links": [{"ranks": list(pair), "bytes_per_second": links[pair]} for pair in sorted(links)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m maskvr_ds.runtime.interconnect", description="One rank of a preflight."
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON, written by rank 0")
    parser.add_argument("--bytes", type=int, help="of the bandwidths' vectors; default: 256 MiB on GPUs, 4 MiB on CPUs")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    def run() -> None:
        if distributed.world_size() == 1:
            raise ValueError("a world of one rank has no interconnect; give --hostfile more slots")
        size = arguments.bytes or (4 * MIB if distributed.device().type == "cpu" else 256 * MIB)
        result = measure(size)
        if distributed.rank() == 0:
            output = Path(arguments.output)
            atomic_write(output, json.dumps(result, indent=1))
        distributed.barrier()

    # RuntimeError: what a link that fails in the middle of a collective comes as.
    return distributed.run_as_rank(run, timeout=timedelta(minutes=2), errors=(ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
