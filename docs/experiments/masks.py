"""Strategies, rates, schedules, late mask tokens and auto at equal seconds: steps and seconds to uniform's last loss.

    python docs/experiments/masks.py --text wikitext.txt python.txt --work DIR --seeds 0 1 2 3 4
    python docs/experiments/masks_report.py DIR docs/results/masks

The first command builds tokenizer and corpus, and runs what mask_runs.py describes. It resumes where it was stopped.

The recipe is `demo_cpu` on one rank, with [MASK] only (`mask_probability: 1`), which late mask tokens need. The
vocabulary has 2,048 entries: the head then takes 6% of the FLOPs of a step at 15%, BERT-base's 4%; with 4,096 a model
of this size would pay for a higher rate three times what BERT-base pays.

The target of a seed is the last held-out loss behind [MASK] of uniform masks at 15%. A step at which a case reaches it
is interpolated between evaluations. Seconds: steps × median CPU-seconds of a step, for auto also the CPU-seconds of its
measurements. Ratios are paired by seed, intervals are Student's t over seeds.
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mask_runs import BASELINE, Benchmark, parser, pipeline, quiet

LENGTH, VOCABULARY, BATCH, STEPS, LAYERS = 64, 2048, 32, 500, 4
EVALUATIONS, MEASUREMENTS = 20, 7
LEARNING_RATES = (0.005, 0.01, 0.02)
COMMON: dict[str, Any] = {
    "deepspeed": "zero0_fp32",
    "model.num_hidden_layers": LAYERS,
    "model.hidden_size": 96,
    "model.num_attention_heads": 3,
    "model.max_position_embeddings": LENGTH,
    "masking.mask_probability": 1,
    "masking.random_probability": 0,
    "batch.global_size": BATCH,
    "batch.micro_size": BATCH,
    "schedule.warmup_steps": STEPS // 10,
    "training.steps": STEPS,
    "evaluation.every_steps": STEPS // EVALUATIONS,
    "evaluation.rows": 640,
    "checkpoint.every_steps": 0,
    "monitor.tensorboard": False,
}
AUTO: dict[str, Any] = {
    "masking.strategy": "auto",
    "masking.rate": 0.45,
    "masking.final_rate": 0.15,
    "masking.auto.every_steps": STEPS // (MEASUREMENTS + 1),
    # The published runs measured without a limit.
    "masking.auto.max_share": "null",
    "masking.auto.late_layers": f"[{LAYERS // 2}]",
}
CASES: dict[str, dict[str, Any]] = {
    BASELINE: {"masking.rate": 0.15},
    "uniform_30": {"masking.rate": 0.30},
    "uniform_45": {"masking.rate": 0.45},
    "schedule_45_15": {"masking.rate": 0.45, "masking.final_rate": 0.15},
    "late_45": {"masking.rate": 0.45, "masking.late_layer": LAYERS // 2},
    "fully_explored_15": {"masking.strategy": "fully_explored", "masking.rate": 0.15},
    "auto": AUTO,
}


def build(work: Path, texts: list[Path]) -> None:
    tokenizer = work / "tokenizer"
    if not tokenizer.exists():
        pipeline("tokenizer", "--input", *texts, "--vocab-size", str(VOCABULARY), "--output", tokenizer)
    options = ("--tokenizer", tokenizer, "--sequence-length", str(LENGTH), "--held-out", "0.1")
    pipeline("build", "--input", *texts, *options, "--output", work / "corpus")


def main() -> None:
    options = parser(__doc__, CASES)
    options.add_argument("--text", type=Path, nargs="+", help="text files; without, WORK/corpus must exist")
    arguments = options.parse_args()
    quiet()
    work = arguments.work.resolve()
    if not (work / "corpus").exists():
        if not arguments.text:
            options.error(f"--text: there is no {work / 'corpus'} yet")
        build(work, arguments.text)
    Benchmark(work, COMMON, CASES, LEARNING_RATES, layers=(0, LAYERS // 2)).run_all(arguments)


if __name__ == "__main__":
    main()
