"""Strategies, rates, schedules, late mask tokens and auto at equal seconds: steps and seconds to uniform's last loss.

    python docs/experiments/masks.py --text wikitext.txt python.txt --work DIR --seeds 0 1 2 3 4
    python docs/experiments/masks_report.py DIR docs/results/masks
    python docs/experiments/masks.py --setting bert --text linux-doc.txt --work DIR --seeds 0 1 2 3 4
    python docs/experiments/masks_report.py DIR docs/results/masks/bert

The first command builds tokenizer and corpus, and runs what mask_runs.py describes. It resumes where it was stopped.

Two settings, of the recipe `demo_cpu` on one rank: `mask_only` has [MASK] only (`mask_probability: 1`), which late mask
tokens need, in a deeper model that reads a small text twice; `bert` has the recipe's own model, batches and steps, the
corruption of BERT (80/10/10) and a text that is read once. The vocabulary has 2,048 entries: the head then takes 6% of
the FLOPs of a step at 15%, BERT-base's 4%; with 4,096 models of this size would pay for a higher rate three times what
BERT-base pays.

The target of a seed is the last held-out loss behind [MASK] of uniform masks at 15%. A step at which a case reaches it
is interpolated between evaluations. Seconds: steps × median CPU-seconds of a step, for auto also the CPU-seconds of its
measurements. Ratios are paired by seed, intervals are Student's t over seeds.
"""

import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mask_runs import BASELINE, Benchmark, Settings, parser, pipeline, quiet

LENGTH, VOCABULARY = 64, 2048


@dataclass(frozen=True)
class Setting:
    """values: of all runs. cases: name → settings. learning_rates: the grid. tuned_as: case → the one whose learning
    rate it takes. layers: at which [MASK] may enter under auto."""

    values: Settings
    cases: dict[str, Settings]
    learning_rates: tuple[float, ...]
    tuned_as: dict[str, str]
    layers: tuple[int, ...] = (0,)


def common(steps: int, batch: int, evaluations: int) -> Settings:
    return {
        "deepspeed": "zero0_fp32",
        "model.max_position_embeddings": LENGTH,
        "batch.global_size": batch,
        "batch.micro_size": batch,
        "schedule.warmup_steps": steps // 10,
        "training.steps": steps,
        "evaluation.every_steps": steps // evaluations,
        "evaluation.rows": 640,
        "checkpoint.every_steps": 0,
        "monitor.tensorboard": False,
    }


UNIFORM: dict[str, Settings] = {
    BASELINE: {"masking.rate": 0.15},
    "uniform_30": {"masking.rate": 0.30},
    "uniform_45": {"masking.rate": 0.45},
    "schedule_45_15": {"masking.rate": 0.45, "masking.final_rate": 0.15},
}
AUTO: Settings = {"masking.strategy": "auto", "masking.rate": 0.45, "masking.final_rate": 0.15}
SETTINGS = {
    "mask_only": Setting(
        common(steps=500, batch=32, evaluations=20)
        | {
            "model.num_hidden_layers": 4,
            "model.hidden_size": 96,
            "model.num_attention_heads": 3,
            "masking.mask_probability": 1,
            "masking.random_probability": 0,
        },
        UNIFORM
        | {
            "late_45": {"masking.rate": 0.45, "masking.late_layer": 2},
            "fully_explored_15": {"masking.strategy": "fully_explored", "masking.rate": 0.15},
            "auto": AUTO
            | {
                "masking.auto.every_steps": 62,
                # The published runs measured without a limit.
                "masking.auto.max_share": "null",
                "masking.auto.late_layers": "[2]",
            },
        },
        (0.005, 0.01, 0.02),
        tuned_as={},
        layers=(0, 2),
    ),
    "bert": Setting(
        common(steps=800, batch=64, evaluations=16),
        UNIFORM | {"auto": AUTO | {"masking.auto.every_steps": 100}},
        (0.005, 0.01),
        # A higher rate has other gradients: the best of the grid for the highest one serves all of them.
        tuned_as=dict.fromkeys(("uniform_30", "schedule_45_15", "auto"), "uniform_45"),
    ),
}


def build(work: Path, texts: list[Path]) -> None:
    tokenizer = work / "tokenizer"
    if not tokenizer.exists():
        pipeline("tokenizer", "--input", *texts, "--vocab-size", str(VOCABULARY), "--output", tokenizer)
    options = ("--tokenizer", tokenizer, "--sequence-length", str(LENGTH), "--held-out", "0.1")
    pipeline("build", "--input", *texts, *options, "--output", work / "corpus")


def main() -> None:
    options = parser(__doc__, {case for setting in SETTINGS.values() for case in setting.cases})
    options.add_argument("--setting", choices=SETTINGS, default="mask_only")
    options.add_argument("--text", type=Path, nargs="+", help="text files; without, WORK/corpus must exist")
    arguments = options.parse_args()
    quiet()
    work = arguments.work.resolve()
    if not (work / "corpus").exists():
        if not arguments.text:
            options.error(f"--text: there is no {work / 'corpus'} yet")
        build(work, arguments.text)
    chosen = SETTINGS[arguments.setting]
    Benchmark(work, chosen.values, chosen.cases, chosen.learning_rates, chosen.tuned_as, chosen.layers).run_all(
        arguments
    )


if __name__ == "__main__":
    main()
