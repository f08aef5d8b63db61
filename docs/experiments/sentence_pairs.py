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
import tempfile
from pathlib import Path
from typing import Any

import transformers

from maskvr_ds.checkpoint.export import export
from maskvr_ds.config.objectives import PAIR_CLASSES
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.run_folder.status import completed
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


def run_folder(work: Path, architecture: str, seed: int, steps: int, *, pairs: bool) -> Path:
    return work / f"{architecture}-{OBJECTIVE[architecture] if pairs else 'mlm'}-{seed}-{steps}"


def train(work: Path, architecture: str, seed: int, steps: int, *, pairs: bool) -> dict[str, float]:
    """Held-out figures of the last step."""
    packing = OBJECTIVE[architecture]
    folder = run_folder(work, architecture, seed, steps, pairs=pairs)
    if not completed(folder, steps):
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
    last = read_lines(folder / METRICS)[-1]
    names = ("loss", "accuracy", "pair_loss", "pair_accuracy")
    return {name: round(last[f"held_out_{name}"], 4) for name in names if f"held_out_{name}" in last}


def check_export(folder: Path, architecture: str) -> dict[str, Any]:
    """Export the run with both heads and load it with transformers' class of both, which must miss nothing.

    `export` writes nothing unless this class reproduces both logits that the engine stored with the checkpoint;
    difference: its maximum.
    """
    with tempfile.TemporaryDirectory() as place:
        exported = export(folder, Path(place) / "export")
        cls = getattr(transformers, PAIR_CLASSES[architecture])
        _, report = cls.from_pretrained(Path(place) / "export", output_loading_info=True)
    faults = {name: sorted(map(str, names)) for name, names in report.items() if names}
    if exported.architecture != cls.__name__ or faults:
        raise RuntimeError(f"{folder}: exported as {exported.architecture}, {cls.__name__} loads it with {faults}")
    return {"class": cls.__name__, "difference": exported.difference}


def summary(found: list[dict[str, Any]], objective: str) -> dict[str, Any]:
    """Runs and the mean difference in held-out masked loss, with its interval if there is more than one seed."""
    differences = [one[objective]["loss"] - one["mlm"]["loss"] for one in found]
    mean = statistics.mean(differences)
    result: dict[str, Any] = {"runs": found, "difference": round(mean, 4)}
    if len(found) == len(SEEDS):
        half = QUANTILE * statistics.stdev(differences) / len(differences) ** 0.5
        result["interval"] = [round(mean - half, 4), round(mean + half, 4)]
    return result


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
    found: dict[str, list[dict[str, Any]]] = {architecture: [] for architecture in OBJECTIVE}
    # Seed by seed, so that whatever is complete can be read while the rest is running.
    for seed in SEEDS:
        for architecture, objective in OBJECTIVE.items():
            both = [train(work, architecture, seed, arguments.steps, pairs=pairs) for pairs in (True, False)]
            trained = run_folder(work, architecture, seed, arguments.steps, pairs=True)
            exported = check_export(trained, architecture)
            found[architecture].append({"seed": seed, objective: both[0], "mlm": both[1], "export": exported})
            print(json.dumps({"architecture": architecture, **found[architecture][-1]}), flush=True)
            results = {name: summary(runs, OBJECTIVE[name]) for name, runs in found.items() if runs}
            text = json.dumps({"steps": arguments.steps} | results, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
