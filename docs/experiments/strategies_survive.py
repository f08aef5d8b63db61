"""Exact resume with every strategy: the demo's training on two ranks, uninterrupted and killed.

    python docs/experiments/strategies_survive.py --corpus CORPUS --output DIR [--steps 200] [--strategies NAME …]

CORPUS as built by `maskvr demo`. Each strategy trains twice: uninterrupted, and killed with SIGKILL (launcher and
ranks) shortly after its first checkpoint, then resumed. Writes one line per strategy to DIR/strategies.jsonl;
strategies in it are not repeated. Exits with 1 if a resumed run differs from the uninterrupted one in a digest, a loss
or a gradient norm.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from maskvr_ds.demo import kill_when_saved
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_lines
from maskvr_ds.telemetry.plots import plot_loss

STRATEGIES: dict[str, list[str]] = {
    "uniform": [],
    "uniform, rate 0.30 to 0.15": ["masking.rate=0.3", "masking.final_rate=0.15"],
    "uniform, [MASK] only": ["masking.mask_probability=1", "masking.random_probability=0"],
    "fully_explored, across_epochs": ["masking.strategy=fully_explored"],
    "fully_explored, same_batch": [
        "masking.strategy=fully_explored",
        "masking.fully_explored.placement=same_batch",
        "masking.fully_explored.segments_per_sequence=4",
    ],
    "whole_word": ["masking.strategy=whole_word"],
    "span": ["masking.strategy=span"],
    "frequency": ["masking.strategy=frequency", "masking.frequency.power=0.3"],
    "frequency, Hájek": [
        "masking.strategy=frequency",
        "masking.frequency.power=0.3",
        "masking.frequency.sampler=conditional_poisson",
        "masking.frequency.estimator=hajek",
    ],
    "mapnet": ["masking.strategy=mapnet", "masking.mapnet.gate=always"],
    "auto": [
        "masking.strategy=auto",
        "masking.auto.every_steps=60",
        "masking.auto.max_share=null",
        "masking.auto.rows=16",
        "masking.auto.draws=2",
    ],
}
SAME = ("step", "data_digest", "mask_digest", "loss", "grad_norm")


def train(corpus: Path, run: Path, steps: int, settings: list[str]) -> list[str]:
    """The command that starts or resumes a run."""
    words = [sys.executable, "-m", "maskvr_ds.cli", "train", "--config", "demo_cpu", "--num-gpus", "2"]
    fixed = [f"data.path={corpus}", f"output_dir={run}", f"training.steps={steps}", "training.schedule_steps=800"]
    often = [
        f"checkpoint.every_steps={steps // 2}",
        f"evaluation.every_steps={steps // 2}",
        "monitor.tensorboard=false",
    ]
    for assignment in (*fixed, *often, *settings):
        words += ["--set", assignment]
    return [*words, "--resume", "auto"]


def run(words: list[str]) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)


def measure(corpus: Path, output: Path, name: str, steps: int) -> dict[str, Any]:
    folders = {
        kind: output / f"{name.replace(', ', '-').replace(' ', '_')}-{kind}" for kind in ("uninterrupted", "killed")
    }
    run(train(corpus, folders["uninterrupted"], steps, STRATEGIES[name]))
    killed = train(corpus, folders["killed"], steps, STRATEGIES[name])
    kill_when_saved(killed, folders["killed"])
    killed_at = read_lines(folders["killed"] / METRICS)[-1]["step"]
    run(killed)
    uninterrupted, resumed = (
        [[line[key] for key in SAME] for line in read_lines(folder / METRICS)] for folder in folders.values()
    )
    lines = read_lines(folders["uninterrupted"] / METRICS)
    plot_loss(folders["uninterrupted"] / METRICS, folders["uninterrupted"] / "loss.png")
    return {
        "strategy": name,
        "steps": len(uninterrupted),
        "resumed_equal": uninterrupted == resumed,
        "killed_at": killed_at,
        "loss_first": round(sum(line["loss"] for line in lines[:10]) / 10, 3),
        "loss_last": round(sum(line["loss"] for line in lines[-10:]) / 10, 3),
        "held_out_loss": round(lines[-1]["held_out_loss"], 3),
        "variance_ratio": lines[-1].get("variance_ratio"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "strategies.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for name in arguments.strategies:
        if name in {entry["strategy"] for entry in done}:
            continue
        done.append(measure(arguments.corpus, arguments.output, name, arguments.steps))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
        print(json.dumps(done[-1], ensure_ascii=False), flush=True)
    return 0 if all(entry["resumed_equal"] for entry in done) else 1


if __name__ == "__main__":
    sys.exit(main())
