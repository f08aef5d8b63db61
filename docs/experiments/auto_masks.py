"""Uniform masks at 15% against masking.strategy auto (0.45 → 0.15): steps and CPU-seconds to one held-out loss.

    python docs/experiments/auto_masks.py --corpus demo_run/corpus --output auto_masks --steps 800 --seeds 0 1

The demo's recipe on one rank. The target of a seed is the last held-out loss of uniform masks on predictions behind
[MASK]: under 80/10/10 a tenth of the predictions is in plain sight, and a higher rate learns sooner to copy it.
CPU-seconds are counted from the costs that `auto` measured in one process, candidates taking turns, for both runs: the
steps at each rate, and for auto also its measurements and those of the costs. A run that is complete is not repeated.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from maskvr_ds.run_folder.layout import COMPLETED, MASK_COSTS, METRICS
from maskvr_ds.telemetry.metrics_file import read_events, read_lines

LOSS = "held_out_loss_mask"
AUTO = {"masking.strategy": "auto", "masking.rate": 0.45, "masking.final_rate": 0.15}


def train(folder: Path, arguments: argparse.Namespace, seed: int, settings: dict[str, Any]) -> None:
    """Start or resume a run."""
    if (folder / COMPLETED).exists():
        return
    given = {
        "data.path": arguments.corpus,
        "data.held_out_path": Path(arguments.corpus) / "held_out",
        "output_dir": folder,
        "seed": seed,
        "training.steps": arguments.steps,
        "evaluation.every_steps": arguments.steps // 16,
        "monitor.tensorboard": False,
        **settings,
    }
    words = [sys.executable, "-m", "maskvr_ds.cli", "train", "--config", "demo_cpu", "--num-gpus", "1"]
    words += ["--resume", "auto", *(word for key, value in given.items() for word in ("--set", f"{key}={value}"))]
    subprocess.run(words, check=True)


def curve(folder: Path, seconds: dict[float, float], rate: float, extra: float) -> list[tuple[int, float, float]]:
    """(step, CPU-seconds up to it, loss behind [MASK]) of every evaluation. extra: seconds before the first step."""
    events = {e["step"]: e for e in read_events(folder / METRICS) if e["event"] == "auto"}
    spent, found = extra, []
    for line in read_lines(folder / METRICS):
        spent += seconds[rate]
        if line.get(LOSS) is not None:
            found.append((line["step"], spent, line[LOSS]))
        if (event := events.get(line["step"])) is not None:
            spent, rate = spent + event["cpu_seconds"], event["rate"]
    return found


def reached(points: list[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """Step and CPU-seconds at which the loss falls to `target`, interpolated between evaluations; None if never."""
    for (step, spent, loss), (later, more, lower) in itertools.pairwise(points):
        if lower <= target < loss:
            share = (loss - target) / (loss - lower)
            return step + share * (later - step), spent + share * (more - spent)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        uniform, auto = (arguments.output / f"{name}-{seed}" for name in ("uniform", "auto"))
        train(uniform, arguments, seed, {})
        often = {"masking.auto.every_steps": arguments.steps // 16, "masking.auto.max_share": "null"}
        train(auto, arguments, seed, {**AUTO, **often})
        costs = json.loads((auto / MASK_COSTS).read_text(encoding="utf-8"))["phases"]["0"]
        seconds = dict(costs["uniform"])
        measuring = sum(e["seconds"] for e in read_events(auto / METRICS) if e["event"] == "auto_costs")
        of_uniform, of_auto = curve(uniform, seconds, 0.15, 0.0), curve(auto, seconds, 0.45, measuring)
        target = of_uniform[-1][2]
        events = [e for e in read_events(auto / METRICS) if e["event"] == "auto"]
        rows.append(
            {
                "seed": seed,
                "target": target,
                "uniform": of_uniform,
                "auto": of_auto,
                "seconds_per_step": costs["uniform"],
                "added": costs["added"],
                "auto_reached": reached(of_auto, target),
                "costs_seconds": measuring,
                "measurement_cpu_seconds": sum(e["cpu_seconds"] for e in events),
                "course": [[e["step"], e["strategy"], e["segments"], e["rate"], e["reason"]] for e in events],
            }
        )
        (arguments.output / "auto_masks.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("uniform", "auto")}, indent=1), flush=True)


if __name__ == "__main__":
    main()
