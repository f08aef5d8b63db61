"""`maskvr benchmark optimizer-step-time`: cost of an optimizer step on the flat fp32 partitions of a ZeRO engine.

The optimizers take turns on the same partitions and gradients, each with its own state. With several ranks, each has
its share of the model: `deepspeed --no_local_rank --module maskvr_ds.cli benchmark optimizer-step-time`.

Collective: one barrier before each timed step, so that ranks, which wait for each other in LAMB's all-reduce, start
simultaneously.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile

from maskvr_ds.config import BatchConfig, ConfigError, ModelConfig, OptimizerConfig, deepspeed_config_path
from maskvr_ds.config.base import faults_of
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.config.loading import assign
from maskvr_ds.engine.engine import create_engine
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.runtime import distributed

# Optimizer to compare LAMB with → whether it needs a GPU.
PEERS = {"adamw_foreach": False, "fused_adam": True, "fused_lamb": True}
_VOCABULARY = 30_522
_LR = 1e-6  # so low that weights hardly change


def lamb_cost(
    *,
    preset: str,
    deepspeed: str,
    against: list[str] | None,
    rounds: int,
    threads: int | None,
    assignments: Sequence[str] = (),
) -> Any:
    """Milliseconds per step of Lamb and its peers, their ratios round by round, and the extra memory of a step.

    On CPUs also ratios of the CPU time of all threads, which is less sensitive to other load than elapsed time.
    "extra_partitions" is the peak memory allocated during a step in addition to that held before, divided by the size
    of the partitions.

    against: names in PEERS; None for all that can run on this machine. threads: CPU threads per rank; None for the
    machine's cores divided by the number of ranks. assignments: settings of LAMB, as for `--set`: optimizer.fused=true.

    Raises ConfigError for other settings; ValueError if a peer needs a GPU and there is none, and for ZeRO stage 3.
    """
    optimizer_config = _optimizer_config(assignments)
    distributed.initialize()
    device = distributed.device()
    on_gpu = device.type == "cuda"
    if against is None:
        against = [name for name, needs_gpu in PEERS.items() if on_gpu or not needs_gpu]
    if refused := [name for name in against if PEERS[name] and not on_gpu]:
        raise ValueError(f"--against {', '.join(refused)}: a CUDA kernel of DeepSpeed, but there is no GPU")
    if threads is not None:
        torch.set_num_threads(threads)
    model = ModelConfig.model_validate({"preset": preset})
    engine = create_engine(
        transformers_config(model, vocab_size=_VOCABULARY, pad_id=0),
        read_deepspeed_config(deepspeed_config_path(deepspeed)),
        model=model,
        batch=BatchConfig(global_size=distributed.world_size(), micro_size=1),
        optimizer=optimizer_config,
        accumulation=1,
        seed=0,
    )
    groups = engine.basic_optimizer.param_groups
    partitions = [p for group in groups for p in group["params"]]
    if not partitions:
        raise ValueError(
            f"--deepspeed {deepspeed}: ZeRO 3 partitions tensors one by one and is not supported; use stage 0, 1 or 2"
        )
    torch.manual_seed(0)
    gradients = [torch.randn_like(p).mul_(1e-3) for p in partitions]
    restore_gradients = partial(_set_gradients, partitions, gradients)
    optimizers = {"lamb": engine.basic_optimizer}
    for name in against:
        optimizers[name] = _peer(name, [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups])

    step_of = _step_by_groups if _steps_by_groups(engine.optimizer) else _step
    steps = {name: partial(step_of, optimizer) for name, optimizer in optimizers.items()}
    for step in steps.values():
        restore_gradients()
        step()  # allocates the optimizer's state
    figures: dict[str, Any] = {
        "what": f"optimizer step, {preset}, {deepspeed}, rank 0 of {distributed.world_size()}",
        "partitions": ", ".join(f"{p.numel():,} elements" for p in partitions),
        "tensors": len(engine.basic_optimizer.tensor_names),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}",
        "settings": " ".join(assignments) or "none",
        "rounds": rounds,
    }
    size = sum(p.numel() * p.element_size() for p in partitions)
    for name, step in steps.items():
        figures[f"{name}_extra_partitions"] = _peak_bytes(step, device) / size
    elapsed, cpu_time = _timed(steps, restore_gradients, rounds)
    for name in optimizers:
        figures |= _spread(f"{name}_milliseconds", [1e3 * t for t in elapsed[name]])
    for name in against:
        figures |= _spread(f"lamb_over_{name}", _quotients(elapsed["lamb"], elapsed[name]))
        if not on_gpu:
            figures |= _spread(f"lamb_over_{name}_cpu_time", _quotients(cpu_time["lamb"], cpu_time[name]))
    return figures


def _timed(
    steps: Mapping[str, Callable[[], None]], restore_gradients: Callable[[], None], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each step in turn, elapsed and of CPU time, by name and round. Collective: call on all ranks."""
    elapsed: dict[str, list[float]] = {name: [] for name in steps}
    cpu_time: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            restore_gradients()
            distributed.barrier()
            distributed.wait_for_device()
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            distributed.wait_for_device()
            elapsed[name].append(time.perf_counter() - start)
            cpu_time[name].append(time.process_time() - cpu_start)
    return elapsed, cpu_time


def _optimizer_config(assignments: Sequence[str]) -> OptimizerConfig:
    """Raises ConfigError."""
    values: dict[str, Any] = {"optimizer": {}}
    for assignment in assignments:
        if not assignment.strip().startswith("optimizer."):
            raise ConfigError(f"--set {assignment}: optimizer-step-time takes settings of the section optimizer only")
        assign(values, assignment)
    try:
        config = OptimizerConfig.model_validate({**values["optimizer"], "lr": _LR})
    except ValidationError as error:
        raise ConfigError(f"--set: optimizer: {'; '.join(faults_of(error, OptimizerConfig))}") from None
    if config.name != "lamb":
        raise ConfigError(f"--set optimizer.name={config.name}: optimizer-step-time compares LAMB with others")
    return config


def _steps_by_groups(optimizer: Any) -> bool:
    """Whether an engine's optimizer makes a step for each group: ZeRO 1 and 2, unless it is BF16_Optimizer, or one rank
    holds the gradients (engine/one_rank.py)."""
    return type(optimizer).__name__ == "DeepSpeedZeroOptimizer" and not hasattr(optimizer, "held_gradients")


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def _step_by_groups(optimizer: torch.optim.Optimizer) -> None:
    """One parameter group at a time with the others hidden. LAMB then copies again into the model what it changes after
    a group's turn."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups


def _set_gradients(partitions: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """LAMB may have overwritten them."""
    for p, gradient in zip(partitions, gradients, strict=True):
        p.grad = gradient.clone() if p.grad is None else p.grad.copy_(gradient)


def _quotients(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _peer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "adamw_foreach":
        return torch.optim.AdamW(groups, lr=_LR, foreach=True)
    # Compiled on first use; needs nvcc.
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.lamb import FusedLamb

    return FusedAdam(groups, lr=_LR) if name == "fused_adam" else FusedLamb(groups, lr=_LR)


def _peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Peak memory in bytes on `device` during `step`, in addition to that held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # PyTorch has no memory statistics of the CPU; its profiler sees every allocation, also temporaries inside kernels.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_min": min(values), f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
