"""Accuracy of `maskvr plan` on a CPU: peak memory and seconds of training steps against what is planned.

    cd docs/results/plan
    python ../../experiments/plan_accuracy.py --output cpu.json
    python ../../experiments/plan_accuracy.py --judge cpu.json --output cpu_judged.json

Each case is trained in processes of its own, one thread each. Memory: the largest resident set during three steps, less
that of the process when everything was imported. malloc maps every block separately, so that the resident set is
what is allocated. Seconds: least CPU time of a step after the first, so that other programs matter little; cases in
fp32 on one rank. There malloc keeps the memory that was freed, as the allocator of a GPU does: pages that the system
maps anew would take 0.5 ns per byte. Times are predicted without calibration, and calibrated on the first two cases of
the first list. Last, what a micro-batch takes the host at stage 3 in units of stage 1: by a model with next to no
arithmetic.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskvr_ds.config import ModelConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.planning.calibration import Measurement, fit, predicted, predictions
from maskvr_ds.planning.hardware import Gpu
from maskvr_ds.planning.memory import Pass, memory
from maskvr_ds.planning.sizes import encoder_sizes
from maskvr_ds.planning.step_time import Calibration
from maskvr_ds.planning.zero import zero_settings

CASES: list[dict[str, Any]] = [
    {"layers": 4, "hidden": 512, "length": 128, "micro": 8, "deepspeed": "zero1_fp32"},
    {"layers": 8, "hidden": 256, "length": 256, "micro": 4, "deepspeed": "zero1_fp32", "accumulation": 2},
    {"layers": 2, "hidden": 768, "length": 128, "micro": 4, "deepspeed": "zero0_fp32"},
    {"layers": 4, "hidden": 512, "length": 128, "micro": 16, "deepspeed": "zero2_fp32", "dropout": 0.0},
    {"layers": 4, "hidden": 512, "length": 128, "micro": 8, "deepspeed": "zero2_fp32", "ranks": 2},
    {"layers": 4, "hidden": 512, "length": 128, "micro": 8, "deepspeed": "zero3_fp32"},
    {"layers": 4, "hidden": 512, "length": 128, "micro": 8, "deepspeed": "zero1_bf16", "accumulation": 2},
    {"layers": 4, "hidden": 512, "length": 128, "micro": 32, "deepspeed": "zero1_fp32", "checkpointing": True},
]
# Cases that the formulas were not compared with before.
JUDGED: list[dict[str, Any]] = [
    {"layers": 6, "hidden": 384, "length": 64, "micro": 24, "deepspeed": "zero1_fp32", "accumulation": 2},
    {"layers": 3, "hidden": 640, "length": 256, "micro": 4, "deepspeed": "zero2_fp32"},
    {"layers": 2, "hidden": 1024, "length": 128, "micro": 2, "deepspeed": "zero2_bf16", "accumulation": 2},
    {"layers": 12, "hidden": 256, "length": 512, "micro": 2, "deepspeed": "zero3_fp32", "ranks": 2},
    {"layers": 5, "hidden": 512, "length": 256, "micro": 6, "deepspeed": "zero0_fp32"},
    {"layers": 12, "hidden": 256, "length": 512, "micro": 2, "deepspeed": "zero3_fp32"},
]
# Cases that times are calibrated on, of the first list.
CALIBRATED_ON = (0, 1)
VOCABULARY = 30_522
BLOCK_BY_BLOCK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
# Steps whose time is that of the host; seconds of a micro-batch are those of 8 more, divided by 8.
HOST: dict[str, Any] = {"layers": 12, "hidden": 64, "length": 8, "micro": 1}


def resident(key: str) -> int:
    """A size from /proc/self/status (VmRSS, VmHWM), in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def model_of(case: dict[str, Any]) -> ModelConfig:
    dropout = case.get("dropout", 0.1)
    return ModelConfig(
        num_hidden_layers=case["layers"],
        hidden_size=case["hidden"],
        num_attention_heads=case["hidden"] // 64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        activation_checkpointing=case.get("checkpointing", False),
    )


def measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train on this rank; bytes by which the resident set grew at most, seconds of CPU time of a step."""
    import torch

    from maskvr_ds.config import BatchConfig, OptimizerConfig
    from maskvr_ds.data.batch import MaskedBatch
    from maskvr_ds.engine import engine as engines
    from maskvr_ds.models.architectures import transformers_config
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed

    torch.set_num_threads(1)
    distributed.initialize()
    length, micro, accumulation = case["length"], case["micro"], case.get("accumulation", 1)
    model = model_of(case)
    count = predictions(length, 0.15)
    torch.ones(64, 64) @ torch.ones(64, 64)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    before = resident("VmRSS")
    engine = engines.create_engine(
        transformers_config(model, vocab_size=VOCABULARY, pad_id=0),
        read_deepspeed_config(deepspeed_config_path(case["deepspeed"])),
        model=model,
        batch=BatchConfig(global_size=accumulation * micro * distributed.world_size(), micro_size=micro),
        optimizer=OptimizerConfig(),
        accumulation=accumulation,
        seed=0,
    )
    engine.train()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        for index in range(accumulation):
            batch = MaskedBatch(
                torch.randint(1000, VOCABULARY, (micro, length)),
                torch.stack([torch.randperm(length)[:count] for _ in range(micro)]),
                torch.randint(1000, VOCABULARY, (micro, count)),
                torch.ones(micro, count),
            )
            loss = weighted_loss(engine, batch)
            engine.backward(loss / (micro * count))
            if index < accumulation - 1:
                engine.step()
        engines.step_and_norm(engine)
        seconds.append(time.process_time() - start)
    return {"memory": resident("VmHWM") - before, "step_seconds": min(seconds[1:])}


def rates() -> tuple[float, float]:
    """FLOP/s of a large matrix product, bytes/s of copies: of one thread, per second of CPU time."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big, copy = torch.randn(1 << 25), torch.randn(1 << 25)
    seconds = []
    for action, rounds in ((lambda: a @ b, 20), (lambda: copy.copy_(big), 5)):
        best = float("inf")
        for _ in range(rounds):
            start = time.process_time()
            action()
            best = min(best, time.process_time() - start)
        seconds.append(best)
    return 2 * 1024**3 / seconds[0], 2 * 4 * len(big) / seconds[1]


def in_processes(case: dict[str, Any], steps: int, environment: dict[str, str]) -> dict[str, Any]:
    """Measure a case on its ranks; the figures of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = case.get("ranks", 1)
    fixed = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--steps", str(steps), "--case", json.dumps(case)],
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case}: a rank failed")
    found: dict[str, Any] = json.loads(answers[0].splitlines()[-1])
    return found


def host_factor(steps: int) -> float:
    """Seconds of the host for a micro-batch at stage 3 ÷ at stage 1."""
    seconds = {
        (stage, accumulation): in_processes(
            {**HOST, "deepspeed": f"zero{stage}_fp32", "accumulation": accumulation}, steps, KEPT
        )["step_seconds"]
        for stage in (1, 3)
        for accumulation in (1, 9)
    }
    first, third = (seconds[stage, 9] - seconds[stage, 1] for stage in (1, 3))
    return third / first


def as_measurement(case: dict[str, Any], seconds: float, product_rate: float) -> Measurement:
    """The case for the model of maskvr_ds/planning."""
    accumulation, model = case.get("accumulation", 1), model_of(case)
    again = model.activation_checkpointing
    length = case["length"]
    return Measurement(
        path=json.dumps(case),
        device="cpu",
        sizes=encoder_sizes(model, VOCABULARY),
        zero=zero_settings(read_deepspeed_config(deepspeed_config_path(case["deepspeed"]))),
        work=Pass(length, predictions(length, 0.15), case["micro"], accumulation, again, on_cpu=True),
        ranks=case.get("ranks", 1),
        step_seconds=seconds,
        memory=None,
        product_rate=product_rate,
    )


def summarize(
    results: list[dict[str, Any]],
    product_rate: float,
    copy_rate: float,
    calibrating: list[dict[str, Any]],
) -> None:
    """Add predictions and their relative errors to the results. calibrating: the results to calibrate times on."""
    cpu = Gpu("CPU", 0, product_rate, product_rate, copy_rate, 0, 0)
    ones = [as_measurement(one, one.get("step_seconds", 0), product_rate) for one in results]
    fitted = [as_measurement(one, one["step_seconds"], product_rate) for one in calibrating]
    settings = {
        "uncalibrated": (replace(cpu, half_share=1.0, single_share=1.0), Calibration()),
        "calibrated": fit(fitted, cpu),
    }
    for one, result in zip(ones, results, strict=True):
        planned = memory(one.sizes, one.zero, one.work, ranks=one.ranks, fused=False).total
        result |= {"planned_memory": planned, "memory_error": planned / result["memory"] - 1}
        for name, (gpu, calibration) in settings.items():
            if "step_seconds" in result:
                result[f"{name}_error"] = predicted(one, gpu, calibration) / one.step_seconds - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--judge", type=Path, metavar="FILE", help="measure JUDGED; calibrate on the results in FILE")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(sys.argv[1:] if "--case" not in sys.argv else [*sys.argv[1:], "--output", ""])
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.steps)))
        return
    product_rate, copy_rate = rates()
    results = []
    for case in JUDGED if arguments.judge else CASES:
        found = in_processes(case, arguments.steps, BLOCK_BY_BLOCK)
        result = {**case, "memory": found["memory"]}
        if case.get("ranks", 1) == 1 and "fp32" in case["deepspeed"]:
            result["step_seconds"] = in_processes(case, arguments.steps, KEPT)["step_seconds"]
        results.append(result)
        print(json.dumps(result), flush=True)
    first = json.loads(arguments.judge.read_text(encoding="utf-8"))["cases"] if arguments.judge else results
    summarize(results, product_rate, copy_rate, [first[n] for n in CALIBRATED_ON])
    content = {
        "product_flops_per_second": product_rate,
        "copied_bytes_per_second": copy_rate,
        "calibrated_on": CALIBRATED_ON,
        "cases": results,
        "host_factor_of_stage_3": host_factor(2 * arguments.steps),
    }
    Path(arguments.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(json.dumps({key: round(value, 3) for key, value in result.items() if key.endswith("error")}))


if __name__ == "__main__":
    main()
