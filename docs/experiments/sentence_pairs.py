"""Sentence objectives on pairs of real text: what they learn, and what they cost the masked loss.

    python docs/experiments/sentence_pairs.py --text gcide.txt --work DIR --output RESULTS.json

Text: the first 8 MB of a dictionary, one document per entry (GCIDE of DICT). BERT with next sentences (weight 0.5) and
ALBERT with the order of sentences (weight 0.5), two layers, hidden size 128, rows of 64 tokens, on two ranks; each with
and without the objective from the same seeds, whose differences in held-out masked loss are averaged. Interval: 95%, of
Student's t. Runs that are complete are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_lines

BYTES, LENGTH, VOCABULARY = 8_000_000, 64, 4096
OBJECTIVE = {"bert": "nsp", "albert": "sop"}
SEEDS = (1, 2, 3)
# 97.5% quantile of Student's t with two degrees of freedom.
QUANTILE = 4.303
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": LENGTH,
}


def run(*words: str | Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", *map(str, words)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def prepare(text: Path, work: Path) -> None:
    """Text, tokenizer, and a corpus of each kind of pairs."""
    source, tokenizer = work / "text.txt", work / "tokenizer"
    if not source.exists():
        source.write_text(text.read_bytes()[:BYTES].decode("utf-8", errors="ignore"), encoding="utf-8")
    if not tokenizer.exists():
        run("data_pipeline", "tokenizer", "--input", source, "--vocab-size", str(VOCABULARY), "--output", tokenizer)
    for packing in OBJECTIVE.values():
        if not (work / packing).exists():
            options = ("--tokenizer", tokenizer, "--sequence-length", str(LENGTH), "--packing", packing)
            run("data_pipeline", "build", "--input", source, *options, "--held-out", "0.05", "--output", work / packing)


def train(work: Path, architecture: str, seed: int, steps: int, *, pairs: bool) -> dict[str, float]:
    """Held-out figures of the last step."""
    packing = OBJECTIVE[architecture]
    folder = work / f"{architecture}-{packing if pairs else 'mlm'}-{seed}"
    metrics = folder / METRICS
    if not metrics.is_file() or (read_lines(metrics) or [{"step": 0}])[-1]["step"] != steps:
        values = {
            "output_dir": str(folder),
            "data": {"path": str(work / packing)},
            "deepspeed": "zero1_fp32",
            "seed": seed,
            "model": {
                "architecture": architecture,
                "settings": SIZES | ({"embedding_size": 128} if architecture == "albert" else {}),
            },
            "objectives": {"mlm": 1.0, packing: 0.5} if pairs else ["mlm"],
            "optimizer": {"name": "adam", "lr": 2e-3},
            "batch": {"global_size": 64, "micro_size": 32},
            "schedule": {"warmup_steps": 50},
            "training": {"steps": steps},
            "evaluation": {"every_steps": 100, "rows": 1024},
            "monitor": {"tensorboard": False},
        }
        config = work / f"{folder.name}.yaml"
        config.write_text(json.dumps(values), encoding="utf-8")
        run("maskvr_ds.cli", "train", "--config", config, "--num-gpus", "2", "--resume", "auto")
    last = read_lines(metrics)[-1]
    names = ("loss", "accuracy", "pair_loss", "pair_accuracy")
    return {name: round(last[f"held_out_{name}"], 4) for name in names if f"held_out_{name}" in last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.text, work)
    results: dict[str, Any] = {"steps": arguments.steps}
    for architecture, objective in OBJECTIVE.items():
        found: list[dict[str, Any]] = []
        for seed in SEEDS:
            both = [train(work, architecture, seed, arguments.steps, pairs=pairs) for pairs in (True, False)]
            found.append({"seed": seed, objective: both[0], "mlm": both[1]})
            print(json.dumps(found[-1]), flush=True)
        differences = [one[objective]["loss"] - one["mlm"]["loss"] for one in found]
        half = QUANTILE * statistics.stdev(differences) / len(differences) ** 0.5
        mean = statistics.mean(differences)
        interval = [round(mean - half, 4), round(mean + half, 4)]
        results[architecture] = {"runs": found, "difference": round(mean, 4), "interval": interval}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
