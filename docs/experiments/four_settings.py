"""Comparison of strategies in four settings: batches of 32 and 1,024 rows, fresh data and ten epochs of a small corpus.

    python docs/experiments/four_settings.py --text linux.txt python.txt --small python.txt --output four
    python docs/experiments/four_settings.py --output four --settings fresh_32     # with existing corpora

Builds a tokenizer and corpora with rows of 34 tokens, then runs `maskvr compare` for every setting: uniform masks,
fully_explored with both placements, MAPNet, and auto; three seeds each, one rank. Completed runs are not repeated.
Prints the tables and writes them to OUTPUT/summary.md; OUTPUT/SETTING/ contains the output of `maskvr compare`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus

ALL_SEGMENTS = "fully_explored:placement=same_batch"
# Rows that are seen once have no second mask: across epochs, fully_explored is uniform.
FRESH = ("uniform", ALL_SEGMENTS, "mapnet", "auto")
SMALL = ("uniform", "fully_explored", ALL_SEGMENTS, "mapnet", "auto")
# A row has 32 maskable tokens: at this rate uniform masks and each of eight segments have four predictions. At most
# other rates and lengths segments have fewer than k = round(rate · n) predictions, which would bias the comparison.
LENGTH, RATE = 34, 1 / 8
EPOCHS = 10
# Tuned with uniform masks alone, over 0.004, 0.01, 0.02 and over 0.02, 0.05.
LEARNING_RATES = {32: 0.01, 1024: 0.02}
FRESH_STEPS = {32: 2000, 1024: 240}
# Share of the small text's documents that are held out of the corpus of ten epochs.
HELD_OUT = {32: 0.94, 1024: 0.75}


def run(words: list[str | Path]) -> None:
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def make_corpora(texts: list[Path], small: Path, output: Path) -> None:
    pipeline: list[str | Path] = [sys.executable, "-m", "data_pipeline"]
    tokenizer = output / "tokenizer"
    if not tokenizer.exists():
        run([*pipeline, "tokenizer", "--input", *texts, "--vocab-size", "4096", "--output", tokenizer])
    for name, inputs, held_out in (
        ("fresh", texts, 0.02),
        *((f"small_{size}", [small], share) for size, share in HELD_OUT.items()),
    ):
        build = [*pipeline, "build", "--input", *inputs, "--tokenizer", tokenizer, "--sequence-length", str(LENGTH)]
        run([*build, "--held-out", str(held_out), "--output", output / "corpora" / name])


def compare(output: Path, data: str, batch: int, seeds: list[int], strategies: list[str] | None) -> None:
    corpus = output / "corpora" / ("fresh" if data == "fresh" else f"small_{batch}")
    rows = Corpus(corpus).manifest.rows
    steps = FRESH_STEPS[batch] if data == "fresh" else EPOCHS * rows // batch
    assert data == "small" or steps * batch <= rows, "fresh rows are read only once"
    settings = {
        "data.path": corpus,
        "deepspeed": "zero0_fp32",
        "model.num_hidden_layers": 2,
        "model.hidden_size": 64,
        "model.num_attention_heads": 2,
        "model.max_position_embeddings": LENGTH,
        "masking.rate": RATE,
        "batch.global_size": batch,
        "batch.micro_size": min(batch, 256),
        "optimizer.lr": LEARNING_RATES[batch],
        "schedule.warmup_steps": steps // 10,
        "training.steps": steps,
        "evaluation.every_steps": steps // 24,
        "evaluation.rows": 1024,
        "checkpoint.every_steps": 0,
        "monitor.tensorboard": "false",
    }
    words: list[str | Path] = [
        sys.executable,
        "-m",
        "maskvr_ds.cli",
        "compare",
        "--config",
        "demo_cpu",
        "--num-gpus",
        "1",
    ]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    own = {
        "mapnet": "mapnet:layers=1,hidden=32",
        "auto": f"auto:every_steps={steps // 8},max_share=null,layers=1,hidden=32",
    }
    names = strategies or (FRESH if data == "fresh" else SMALL)
    words += ["--strategies", *(own.get(name, name) for name in names), "--seeds", *map(str, seeds)]
    run([*words, "--output", output / f"{data}_{batch}"])


def cell(spread: dict[str, float], digits: int) -> str:
    return "{mean:.{d}f} [{min:.{d}f}, {max:.{d}f}]".format(**spread, d=digits)


def is_auto(name: str) -> bool:
    return name.partition(":")[0] == "auto"


def of_best(strategies: dict[str, Any]) -> str:
    """Steps of auto relative to those of the fixed strategy with the fewest steps on average over seeds."""
    auto = next(x for name, x in strategies.items() if is_auto(name))
    best = max((x["fewer_steps"]["mean"], name) for name, x in strategies.items() if not is_auto(name))[1]
    theirs = {run["seed"]: run["fewer_steps"] for run in strategies[best]["runs"]}
    ratios = [theirs[run["seed"]] / run["fewer_steps"] for run in auto["runs"]]
    spread = {"mean": statistics.fmean(ratios), "min": min(ratios), "max": max(ratios)}
    return f"\nsteps of auto ÷ steps of {best}, the best fixed strategy on average: {cell(spread, 2)}"


def summary(output: Path) -> str:
    """Markdown tables, one per setting with one line per strategy: mean [minimum, maximum] over seeds."""
    lines = []
    for path in sorted(output.glob("*/compare.json")):
        result = json.loads(path.read_text())
        lines += [
            f"\n**{path.parent.name}**, {result['config']['training']['steps']} steps\n",
            "| strategy | seeds | held-out loss | − uniform, by seed | reached target | × fewer steps | × less time |",
            "|---|---|---|---|---|---|---|",
        ]
        strategies = {name: strategy for name, strategy in result["strategies"].items() if strategy["seeds"]}
        for name, strategy in strategies.items():
            loss, difference = cell(strategy["final"], 3), cell(strategy["difference"], 3)
            steps, time = cell(strategy["fewer_steps"], 2), cell(strategy["less_time"], 2)
            hits = f"{strategy['reached']} of {strategy['seeds']}"
            lines.append(f"| {name} | {strategy['seeds']} | {loss} | {difference} | {hits} | {steps} | {time} |")
        if any(map(is_auto, strategies)):
            lines.append(of_best(strategies))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="text files, documents separated by blank lines")
    parser.add_argument("--small", type=Path, help="text file of which the small corpora are a sample")
    parser.add_argument("--output", type=Path, required=True)
    names = [f"{data}_{batch}" for batch in LEARNING_RATES for data in ("fresh", "small")]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="SETTING", help=" ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", help="only these; the first is the baseline")
    arguments = parser.parse_args()
    if arguments.text:
        make_corpora(arguments.text, arguments.small, arguments.output)
    for name in arguments.settings:
        data, batch = name.split("_")
        compare(arguments.output, data, int(batch), arguments.seeds, arguments.strategies)
        (arguments.output / "summary.md").write_text(summary(arguments.output), encoding="utf-8")
    print(summary(arguments.output))


if __name__ == "__main__":
    main()
