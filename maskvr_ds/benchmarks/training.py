"""`maskvr benchmark`: dispatch, and the benchmarks `loading-speed` and `training-speed`, on synthetic rows.

The loader is measured in rows per CPU-second of one thread; training in tokens per second, in model FLOPs, and relative
to the speed of large matrix products on this machine. Masking: masks.py. Optimizer step: lamb.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data_pipeline.shards import Corpus
from maskvr_ds import train
from maskvr_ds.benchmarks.corpus import make_corpus, one_thread, rows_per_cpu_second
from maskvr_ds.benchmarks.lamb import lamb_cost
from maskvr_ds.benchmarks.masks import masking_speed, strategy_cost
from maskvr_ds.config import RunConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.ds_config import model_dtype
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics_file import read_lines


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark `arguments.what`, print its results and write them as JSON if --output is given."""
    length = arguments.sequence_length
    if arguments.what == "loading-speed":
        figures = loader_speed(sequence_length=length)
    elif arguments.what == "masking-speed":
        figures = masking_speed(strategy=arguments.strategy, sequence_length=length)
    elif arguments.what == "strategy-cost":
        figures = strategy_cost(
            preset=arguments.preset,
            deepspeed=arguments.deepspeed,
            micro_size=arguments.micro_size,
            rounds=arguments.rounds,
            sequence_length=length,
            threads=arguments.threads,
        )
    elif arguments.what == "optimizer-step-time":
        figures = lamb_cost(
            preset=arguments.preset,
            deepspeed=arguments.deepspeed,
            against=arguments.against,
            rounds=arguments.rounds,
            threads=arguments.threads,
        )
    else:
        figures = training_speed(
            preset=arguments.preset,
            deepspeed=arguments.deepspeed,
            micro_size=arguments.micro_size,
            steps=arguments.steps,
            sequence_length=length,
        )
    if distributed.rank() != 0:
        return 0
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def loader_speed(*, rows: int = 500_000, batch_size: int = 256, sequence_length: int = 128) -> dict[str, Any]:
    """Rows per CPU-second of one thread that reads shuffled rows of a memory-mapped corpus into batches on the host."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        corpus = Corpus(make_corpus(Path(folder) / "corpus", rows=rows, sequence_length=sequence_length))
        batches = Loader(corpus, seed=0, global_size=batch_size).batches()

        def round_() -> int:
            for _ in range(2000):
                next(batches)
            return 2000 * batch_size

        figures = rows_per_cpu_second(round_)
    return {"what": f"loader, L = {sequence_length}, batches of {batch_size}, {rows:,} rows", **figures}


def matrix_product_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """Speed of a large square matrix product (2n³ operations), in teraFLOP/s, best of 10."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        _wait(device)
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * n**3 / best / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _host_device_synchronisations(device: torch.device) -> Iterator[Callable[[], Counter[str]]]:
    """Yields a function that returns how often each "file:line" has made the host wait for the GPU so far, implicitly
    (by reading a value) or by synchronising.

    Does not see copies from pageable memory, which wait too.
    """
    sites: Counter[str] = Counter()
    if device.type != "cuda":
        yield lambda: sites
        return

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            sites[f"{caller.f_code.co_filename}:{caller.f_lineno}"] += 1
            return function(*args, **kwargs)

        return wrapper

    patches = [
        mock.patch.object(owner, "synchronize", counting(owner.synchronize))
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
    ]
    with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:

        def so_far() -> Counter[str]:
            implicit = (f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
            return sites + Counter(implicit)

        for patch in patches:
            stack.enter_context(patch)
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield so_far
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _before_each_step(count: Callable[[], Counter[str]]) -> Iterator[list[Counter[str]]]:
    """Yields a list to which the result of `count` is appended before each training step."""
    counts: list[Counter[str]] = []
    run_step = train.run_step

    def counted(*args: Any, **options: Any) -> Any:
        counts.append(count())
        return run_step(*args, **options)

    with mock.patch.object(train, "run_step", counted):
        yield counts


def training_speed(*, preset: str, deepspeed: str, micro_size: int, steps: int, sequence_length: int) -> dict[str, Any]:
    """Run the training command on synthetic rows, one micro-batch per rank and step; 10 warm-up steps are not timed.

    Raises ValueError for fewer than 3 steps.
    """
    if steps < 3:
        raise ValueError(f"--steps {steps}: must be at least 3, to count synchronisations per step")
    distributed.initialize()
    device, world_size = distributed.device(), distributed.world_size()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(distributed.broadcast_object(scratch))
        if distributed.rank() == 0:
            make_corpus(folder / "corpus", rows=50_000, sequence_length=sequence_length)
        distributed.barrier()
        values = {
            "output_dir": folder / "run",
            "deepspeed": deepspeed,
            "data": {"path": folder / "corpus"},
            "model": {"preset": preset, "max_position_embeddings": max(512, sequence_length)},
            "batch": {"global_size": micro_size * world_size, "micro_size": micro_size},
            "optimizer": {"name": "lamb", "lr": 4e-3},
            "schedule": {"warmup_steps": min(10, steps)},
            "training": {"steps": steps},
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
            "monitor": {"tensorboard": False},
        }
        with _host_device_synchronisations(device) as count, _before_each_step(count) as counts:
            train.train(RunConfig.model_validate(values))
        lines = read_lines(folder / "run" / METRICS)
        distributed.barrier()
    timed = lines[min(10, steps // 2) :]
    dtype = model_dtype(read_deepspeed_config(deepspeed_config_path(deepspeed)))
    peak = matrix_product_tflops(dtype, device)
    tflops = statistics.median(line["model_tflops_per_rank"] for line in timed)
    figures = {
        "what": f"{preset}, L = {sequence_length}, {deepspeed}, {world_size} ranks × {micro_size} sequences",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": f"torch {torch.__version__}",
        "tokens_per_second_median": statistics.median(line["tokens_per_second"] for line in timed),
        "tokens_per_second_min": min(line["tokens_per_second"] for line in timed),
        "tokens_per_second_max": max(line["tokens_per_second"] for line in timed),
        "model_tflops_per_rank": tflops,
        "matrix_product_tflops": peak,
        "share_of_matrix_product_rate": tflops / peak,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
    }
    if device.type == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        # From the second step on: the first allocates buffers.
        between = {site: (n - counts[1][site]) / (steps - 2) for site, n in counts[-1].items()}
        each_step = {site: n for site, n in between.items() if n >= 1}
        figures["synchronisations_in_each_step"] = (
            ", ".join(f"{site} × {n:g}" for site, n in each_step.items()) or "none"
        )
    return figures
