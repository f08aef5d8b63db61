"""`maskvr benchmark training-speed`: the training command on synthetic rows, as a whole and by the parts of a step."""

import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from maskvr_ds import train
from maskvr_ds.benchmarks.corpus import make_corpus
from maskvr_ds.benchmarks.device_kernels import kernel_figures
from maskvr_ds.benchmarks.step_parts import PARTS, Kernels, StepParts, Traffic, recording, spread
from maskvr_ds.config import ConfigError, RunConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config, zero_stage
from maskvr_ds.config.loading import assign
from maskvr_ds.config.run import validated
from maskvr_ds.engine.deepspeed_patches import free_memory
from maskvr_ds.engine.ds_config import model_dtype
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.peak_rates import device_peak_tflops
from maskvr_ds.telemetry.metrics_file import read_lines

# Step whose kernels and collectives are counted, from 0: the first ones create state. It is not timed.
_COUNTED = 2
_MINIMUM_STEPS = 5
_WARM_UP = 10
# Of "parts"; cpu_median: CPU time of this process, on CPUs only.
PART_FIGURES = ("median", "min", "max", "cpu_median")
# Sections that are set by options of their own, or that belong to the benchmark.
_OWNED = ("output_dir", "deepspeed", "data", "batch", "training", "phases", "checkpoint", "evaluation", "monitor")


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


class _Counts:
    """What is counted in single steps: waits before each step, kernels within the step `_COUNTED`."""

    def __init__(self, device: torch.device, parts: StepParts, *, compiled: bool, waits: Callable[[], Counter[str]]):
        self._device, self._waits = device, waits
        self.before: list[Counter[str]] = []
        # A dispatch mode would run compiled regions without their graphs.
        self.kernels = None if compiled or device.type == "cuda" else Kernels(lambda: parts.current)
        self.on_device: dict[str, Any] = {}

    @contextmanager
    def around_steps(self) -> Iterator[None]:
        run_step = train.run_step

        def counted(*args: Any, **options: Any) -> Any:
            self.before.append(self._waits())
            if len(self.before) - 1 != _COUNTED:
                return run_step(*args, **options)
            if self._device.type != "cuda":
                with self.kernels or nullcontext():
                    return run_step(*args, **options)
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                result = run_step(*args, **options)
                torch.cuda.synchronize()
            self.on_device = kernel_figures(profile.events())
            return result

        with mock.patch.object(train, "run_step", counted):
            yield

    def figures(self) -> dict[str, Any]:
        """kernels_per_step (None: not counted), host_waits_per_step, by part or place."""
        if self._device.type != "cuda":
            kernels = self.kernels
            return {
                "kernels_per_step": None if kernels is None else kernels.launched.total(),
                "kernels_by_part": {} if kernels is None else dict(kernels.launched),
                "host_waits_per_step": None if kernels is None else kernels.reads.total(),
            }
        # From the step after the counted one on, whose profiler waits.
        first, last = self.before[_COUNTED + 1], self.before[-1]
        between = {site: (n - first[site]) / (len(self.before) - 2 - _COUNTED) for site, n in last.items()}
        each_step = {site: n for site, n in between.items() if n >= 1}
        return {
            **self.on_device,
            "host_waits_per_step": sum(each_step.values()),
            "synchronisations_in_each_step": ", ".join(f"{site} × {n:g}" for site, n in each_step.items()) or "none",
        }


def training_speed(
    *,
    preset: str,
    deepspeed: str,
    micro_size: int,
    steps: int,
    sequence_length: int,
    accumulation: int = 1,
    compiled: str = "none",
    peak_tflops: float | None = None,
    assignments: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the training command on synthetic rows; the first 10 steps, or half of them, are not timed.

    accumulation: micro-batches per rank and step. compiled: training.compile. peak_tflops: of a rank's device; None:
    of its data sheet, if it is in runtime/peak_rates.py. assignments: further settings, as for `--set`.

    Raises ConfigError for fewer than 5 steps and for settings that are options of the benchmark.
    """
    if steps < _MINIMUM_STEPS:
        raise ConfigError(f"--steps {steps}: at least {_MINIMUM_STEPS}, since the first ones are not timed")
    distributed.initialize()
    device, world_size = distributed.device(), distributed.world_size()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(distributed.broadcast_object(scratch))
        values = {
            "output_dir": str(folder / "run"),
            "deepspeed": deepspeed,
            "data": {"path": str(folder / "corpus")},
            "model": {"preset": preset, "max_position_embeddings": max(512, sequence_length)},
            "batch": {"global_size": micro_size * accumulation * world_size, "micro_size": micro_size},
            "optimizer": {"name": "lamb", "lr": 4e-3},
            "schedule": {"warmup_steps": min(10, steps)},
            "training": {"steps": steps, "compile": compiled},
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
            "monitor": {"tensorboard": False},
        }
        config = _configuration(values, assignments)
        if distributed.rank() == 0:
            make_corpus(folder / "corpus", rows=50_000, sequence_length=sequence_length)
        distributed.barrier()
        parts, traffic = StepParts(device), Traffic()
        with (
            _host_device_synchronisations(device) as waits,
            recording(parts, traffic, _COUNTED),
        ):
            counts = _Counts(device, parts, compiled=compiled != "none", waits=waits)
            with counts.around_steps():
                train.train(config)
        seconds = parts.seconds()
        lines = read_lines(folder / "run" / METRICS)
        distributed.barrier()
    timed = max(_COUNTED + 1, min(_WARM_UP, steps // 2))
    dtype = model_dtype(read_deepspeed_config(deepspeed_config_path(deepspeed)))
    figures = {
        "what": f"{preset}, L = {sequence_length}, {deepspeed}, {world_size} ranks × {micro_size} sequences",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": f"torch {torch.__version__}",
        "accumulation": accumulation,
        "compile": compiled,
        "zero_stage": zero_stage(read_deepspeed_config(deepspeed_config_path(deepspeed))),
        "settings": " ".join(assignments) or "none",
        **_speed(lines[timed:], dtype, device, peak_tflops),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        **counts.figures(),
        "collectives_per_step": traffic.figures(),
        "gigabytes_sent_per_rank_and_step": traffic.sent(world_size) / 1e9,
        **_memory(device),
        "parts": _parts(seconds[timed:]),
    }
    free_memory()
    return figures


def _configuration(values: dict[str, Any], assignments: Sequence[str]) -> RunConfig:
    """Raises ConfigError."""
    for assignment in assignments:
        name = assignment.partition("=")[0].partition(".")[0].strip()
        if name in _OWNED:
            raise ConfigError(f"--set {assignment}: {name} is set by the benchmark and its options")
        assign(values, assignment)
    return validated(values)


def _speed(
    lines: Sequence[dict[str, Any]], dtype: torch.dtype, device: torch.device, peak_tflops: float | None
) -> dict[str, Any]:
    """lines: of metrics.jsonl. The synthetic rows have no padding, so that all of their tokens are real."""
    product = matrix_product_tflops(dtype, device)
    tflops = statistics.median(line["model_tflops_per_rank"] for line in lines)
    peak = peak_tflops or device_peak_tflops(device, dtype)
    rate = spread([line["tokens_per_second"] for line in lines])
    return {
        "tokens_per_second_median": rate["median"],
        "tokens_per_second_min": rate["min"],
        "tokens_per_second_max": rate["max"],
        "model_tflops_per_rank": tflops,
        "matrix_product_tflops": product,
        "share_of_matrix_product_rate": tflops / product,
        "peak_tflops": peak,
        "mfu": None if peak is None else tflops / peak,
    }


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    # Of the process since its start, in KiB.
    return {"peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _parts(steps: Sequence[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Milliseconds per step by part, and their sum. steps: from `StepParts.seconds`."""
    found = {}
    for part in (*PARTS, "sum"):
        names = PARTS if part == "sum" else (part,)
        elapsed = [1e3 * sum(step[name][0] for name in names) for step in steps]
        cpu = [1e3 * sum(step[name][1] for name in names) for step in steps]
        found[part] = {**spread(elapsed), "cpu_median": statistics.median(cpu)}
    return found
