"""Strategies, rates, schedules, late mask tokens and auto at equal seconds: steps and seconds to uniform's last loss.

    python docs/experiments/masks.py --text wikitext.txt python.txt --work DIR --seeds 0 1 2 3 4
    python docs/experiments/masks_report.py DIR docs/results/masks

The first command builds tokenizer and corpus, tunes the learning rate of uniform masks on a seed of its own, measures
the CPU-seconds of a step of every case in one process, cases taking turns, and trains every case once per seed. It
resumes where it was stopped: WORK/runs/CASE-SEED.json exists for every complete run. Runs are ordered by seed, so that
an early end leaves complete seeds. Prints the remaining runs and the hours so far.

The recipe is `demo_cpu` on one rank, with [MASK] only (`mask_probability: 1`), which late mask tokens need. The
vocabulary has 2,048 entries: the head then takes 6% of the FLOPs of a step at 15%, BERT-base's 4%; with 4,096 a model
of this size would pay for a higher rate three times what BERT-base pays.

The target of a seed is the last held-out loss behind [MASK] of uniform masks at 15%. A step at which a case reaches it
is interpolated between evaluations. Seconds: steps × median CPU-seconds of a step, for auto also the CPU-seconds of its
measurements. Ratios are paired by seed, intervals are Student's t over seeds.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from masks_steps import measure

from maskvr_ds import train as training
from maskvr_ds.benchmarks.mask_costs import run_costs
from maskvr_ds.config import load_config
from maskvr_ds.run_folder.layout import COMPLETED, METRICS
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics_file import AUTO_EVENT, read_events, read_lines
from maskvr_ds.training.auto_choice import ladder

LENGTH, VOCABULARY, BATCH, STEPS, LAYERS = 64, 2048, 32, 500, 4
EVALUATIONS, MEASUREMENTS = 20, 7
LEARNING_RATES, TUNING_SEED = (0.005, 0.01, 0.02), 100
LOSS = "held_out_loss_mask"
BASELINE = "uniform_15"
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


def in_child(action: Callable[[], None]) -> float:
    """Run `action` as one rank in a fork of this process, which has imported everything and computed nothing; returns
    its CPU-seconds."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        os._exit(distributed.run_as_rank(action))
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"a run failed (status {os.waitstatus_to_exitcode(status)}); the same command continues")
    return usage.ru_utime + usage.ru_stime


def settings(work: Path, **more: Any) -> list[str]:
    """All runs' settings, and `more` of them, as assignments."""
    corpus = work / "corpus"
    values = {"data.path": corpus, "data.held_out_path": corpus / "held_out", **COMMON, **more}
    return [f"{key}={value}" for key, value in values.items()]


def build(work: Path, texts: list[Path]) -> None:
    pipeline = [sys.executable, "-m", "data_pipeline"]
    tokenizer = work / "tokenizer"
    if not tokenizer.exists():
        options = ["--vocab-size", str(VOCABULARY), "--output", str(tokenizer)]
        subprocess.run([*pipeline, "tokenizer", "--input", *map(str, texts), *options], check=True)
    options = ["--tokenizer", str(tokenizer), "--sequence-length", str(LENGTH), "--held-out", "0.1"]
    subprocess.run([*pipeline, "build", "--input", *map(str, texts), *options, "--output", work / "corpus"], check=True)


def train(work: Path, name: str, seed: int, values: dict[str, Any]) -> None:
    """A run, unless it is complete; writes WORK/runs/NAME-SEED.json."""
    result, folder = work / "runs" / f"{name}-{seed}.json", work / "runs" / f"{name}-{seed}"
    if result.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    if values.get("masking.strategy") == "auto":
        # Measured once: the five runs are of one machine.
        values = {**values, "masking.auto.costs": auto_costs(work, name, values)}
    config = load_config("demo_cpu", settings(work, output_dir=folder, seed=seed, **values))
    cpu = in_child(lambda: training.train(config, None))
    assert (folder / COMPLETED).exists(), f"{folder}: the run did not end"
    lines = read_lines(folder / METRICS)
    events = [event for event in read_events(folder / METRICS) if event["event"] == AUTO_EVENT]
    found = {
        "case": name,
        "seed": seed,
        "settings": values,
        "steps": lines[-1]["step"],
        "held_out": [[line["step"], line[LOSS], line["held_out_loss"]] for line in lines if LOSS in line],
        "auto": events,
        "process_cpu_seconds": cpu,
    }
    write(result, found)
    shutil.rmtree(folder)


def auto_costs(work: Path, name: str, values: dict[str, Any]) -> Path:
    """Seconds of auto's candidates, as `maskvr benchmark masks` measures them; WORK/NAME_costs_took.json has the
    CPU-seconds that it took."""
    file = work / f"{name}_costs.json"
    if not file.exists():
        assignments = settings(work, output_dir=work / "none", **values)
        cpu = in_child(lambda: write(file, run_costs("demo_cpu", assignments, 5)))
        write(work / f"{name}_costs_took.json", {"cpu_seconds": cpu})
    return file


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tuned(work: Path) -> float:
    """The learning rate at which uniform masks at 15% end lowest, on a seed that is not used otherwise."""
    for rate in LEARNING_RATES:
        train(work, f"lr_{rate:g}", TUNING_SEED, {**CASES[BASELINE], "optimizer.lr": rate})
    last = {rate: read(work / "runs" / f"lr_{rate:g}-{TUNING_SEED}.json")["held_out"][-1][1] for rate in LEARNING_RATES}
    print("learning rates, last loss:", ", ".join(f"{rate:g} {loss:.3f}" for rate, loss in last.items()), flush=True)
    return min(last, key=lambda rate: last[rate])


def measure_steps(work: Path, rounds: int) -> None:
    """WORK/step_seconds.json: CPU-seconds of a step of every case, and of uniform masks at every rate and layer of
    auto."""
    file = work / "step_seconds.json"
    if file.exists():
        return
    rates = ladder(AUTO["masking.rate"], AUTO["masking.final_rate"])
    cases = {name: values for name, values in CASES.items() if values is not AUTO}
    for rate, layer in itertools.product(rates, (0, LAYERS // 2)):
        cases[f"auto at {rate:g}, layer {layer}"] = {"masking.rate": rate, "masking.late_layer": layer}
    in_child(lambda: write(file, measure(settings(work, output_dir=work / "none"), cases, rounds)))


def hours(work: Path) -> float:
    return sum(read(path)["process_cpu_seconds"] for path in (work / "runs").glob("*.json")) / 3600


def run_all(work: Path, cases: list[str], seeds: list[int], rounds: int) -> None:
    lr = tuned(work)
    measure_steps(work, rounds)
    wanted = list(itertools.product(seeds, cases))
    for number, (seed, case) in enumerate(wanted):
        started = time.monotonic()
        train(work, case, seed, {**CASES[case], "optimizer.lr": lr})
        left = sum(not (work / "runs" / f"{c}-{s}.json").exists() for s, c in wanted[number + 1 :])
        took = time.monotonic() - started
        print(f"{case}-{seed}: {took:.0f} s; {left} runs left; {hours(work):.2f} CPU-hours so far", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="text files; without, WORK/corpus must exist")
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" ".join(CASES))
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each case (default: 40)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    training.plot_loss = lambda *_: None
    work = arguments.work.resolve()
    if not (work / "corpus").exists():
        if not arguments.text:
            parser.error(f"--text: there is no {work / 'corpus'} yet")
        build(work, arguments.text)
    run_all(work, arguments.cases, arguments.seeds, arguments.rounds)


if __name__ == "__main__":
    main()
