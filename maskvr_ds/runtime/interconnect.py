"""Interconnect test of `python -m cluster preflight`: all-reduces correct and how fast, and the slowest link.

Collectives, all over the world group: all-reduces of int64, fp32 and bf16 vectors; barriers between rounds;
point-to-point transfers in both directions between one rank per host (all ranks if there is a single host) and each of
the others. In each round every rank is in at most one pair (a round-robin tournament), so that n/2 links are measured
at a time, as training uses them.
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
from maskvr_ds.runtime.numbers import integer

MIB = 2**20
_LENGTHS = (1, 1_003, 262_147)
_REPEATS = 5


def wrong_sums() -> list[str]:
    """Faults in all-reduces with a known result, as seen by this rank. Collective: call on all ranks.

    Element i of rank r is (i + 7 r) mod 61: all sums are integers that the type represents exactly.
    """
    n, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    faults = []
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        # bf16 has 8 bits: integers up to 256 are exact (beyond 128 ranks this check loses most of its power).
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
    """Median seconds of an all-reduce of `size` bytes of fp32, and its bus bandwidth in bytes per second.

    Bus bandwidth as in nccl-tests: 2 (n − 1)/n · size / seconds, the load of each link in a ring.
    """
    n = distributed.world_size()
    vector = torch.ones(size // 4, device=distributed.device())
    seconds = _median(lambda: distributed.all_reduce_sum(vector))
    return seconds, 2 * (n - 1) / n * size / seconds


def rounds(players: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """All pairs, each player at most once per round: the circle method."""
    circle: list[int | None] = [*players] + ([None] if len(players) % 2 else [])
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def link_bandwidths(players: Sequence[int], size: int) -> dict[tuple[int, int], float]:
    """Bytes per second, one way, of each pair of ranks while both send `size` bytes; identical on all ranks."""
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
    # Timed at both ends; the slower figure counts.
    merged: dict[tuple[int, int], float] = {}
    for each in distributed.gather_objects(found):
        for pair, value in each.items():
            merged[pair] = min(value, merged.get(pair, value))
    return merged


def _median(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        distributed.wait_for_device()
        started = time.perf_counter()
        action()
        distributed.wait_for_device()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first repeat connects


def nccl_version() -> str | None:
    """Version of the loaded library; None on CPUs."""
    if distributed.device().type != "cuda":
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def measure(size: int) -> dict[str, Any]:
    """All results, in JSON types, identical on all ranks. size: bytes of the vectors for bandwidths."""
    n = distributed.world_size()
    mine = {"host": socket.gethostname(), "faults": wrong_sums(), "nccl": nccl_version()}
    reports = distributed.gather_objects(mine)
    hosts = [each["host"] for each in reports]
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    seconds, bus = all_reduce_bandwidth(size)
    # Ranks differ by noise only; rank 0's figures count.
    seconds, bus = distributed.broadcast_object((seconds, bus))
    links = link_bandwidths(first if len(first) > 1 else range(n), size)
    return {
        "world_size": n,
        "bytes": size,
        "backend": str(dist.get_backend()),
        "faults": [
            f"rank {r} on {each['host']}: {fault}" for r, each in enumerate(reports) for fault in each["faults"]
        ],
        "nccl": [each["nccl"] for each in reports],
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
    parser.add_argument(
        "--bytes", type=integer(1, 2**40), help="size of the vectors; default: 256 MiB on GPUs, 4 MiB on CPUs"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    def run() -> None:
        if distributed.world_size() == 1:
            raise ValueError("a single rank has no interconnect; use a --hostfile with more slots")
        size = arguments.bytes or (4 * MIB if distributed.device().type == "cpu" else 256 * MIB)
        result = measure(size)
        if distributed.rank() == 0:
            atomic_write(Path(arguments.output), json.dumps(result, indent=1))
        distributed.barrier()

    # RuntimeError: raised when a link fails during a collective.
    return distributed.run_as_rank(run, timeout=timedelta(minutes=2), errors=(ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
