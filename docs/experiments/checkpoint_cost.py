"""CPU time of saving a checkpoint, of reading it back, and of comparing replicas, on one rank and one thread.

    python docs/experiments/checkpoint_cost.py bert-tiny bert-base

Each preset (vocabulary 30,522, fp32 at ZeRO stage 2) is trained for a few steps with a checkpoint after each. CPU time
is that of all threads of the process, so that other programs and the disk matter little; medians over checkpoints. A
comparison hashes all weights, as at ZeRO 0 to 2; a single rank would skip it, so that it is called here.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskvr_ds import train
from maskvr_ds.benchmarks.corpus import make_corpus
from maskvr_ds.checkpoint import save
from maskvr_ds.config import RunConfig
from maskvr_ds.engine import replicas
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.runtime import distributed, files

# What is measured: name → (where the function is, its name).
PARTS: dict[str, tuple[Any, str]] = {
    "save": (save, "save"),
    "read back and hash": (files, "_read_back"),
    "checksums of *.pt": (save, "_check_checksums"),
    "compare safetensors": (save, "_check_equal"),
    "read checkpoint.json": (checkpoints, "read_manifest"),
}


def measure(preset: str, steps: int, folder: Path) -> dict[str, Any]:
    """Medians over the checkpoints of a training, in CPU-seconds; `step` is a training step on one sequence."""
    spent: dict[str, list[float]] = defaultdict(list)
    now: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                now[name] += time.process_time() - started

        return call

    def one_checkpoint(*arguments: Any, **options: Any) -> Any:
        now.clear()
        saved = measured(*arguments, **options)
        started = time.process_time()
        for _, tensor in replicas.replicated_tensors(arguments[1]):
            replicas.bits_hash(tensor)
        now["compare replicas"] = time.process_time() - started
        for name, seconds in now.items():
            spent[name].append(seconds)
        return saved

    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, timed(name, originals[name]))
    measured, save.save = save.save, one_checkpoint
    try:
        train.train(configuration(preset, steps, folder))
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])
    (newest, *_) = reversed(checkpoints.complete_checkpoints(folder / preset))
    figures = {name: statistics.median(seconds) for name, seconds in spent.items()}
    return {"bytes": checkpoints.size(newest), "checkpoints": steps, "cpu_seconds": figures}


def configuration(preset: str, steps: int, folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": folder / preset,
            "deepspeed": "zero2_fp32",
            "data": {"path": folder / "corpus"},
            "model": {"preset": preset},
            "batch": {"global_size": 1, "micro_size": 1},
            "optimizer": {"lr": 1e-4},
            "schedule": {"warmup_steps": 1},
            "training": {"steps": steps},
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 1},
            "monitor": {"tensorboard": False},
        }
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="model.preset")
    parser.add_argument("--steps", type=int, default=5, help="checkpoints of each")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args(argv)
    results = {}

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_corpus(Path(folder) / "corpus", rows=64, sequence_length=32)
            for preset in arguments.presets:
                results[preset] = measure(preset, arguments.steps, Path(folder))

    if status := distributed.run_as_rank(run):
        return status
    for preset, result in results.items():
        print(f"{preset}: {result['bytes'] / 1e6:,.0f} MB, median of {result['checkpoints']} checkpoints")
        for name, seconds in result["cpu_seconds"].items():
            print(f"  {name:24} {seconds:8.3f} CPU-s  {seconds / result['cpu_seconds']['save']:7.1%} of save")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
