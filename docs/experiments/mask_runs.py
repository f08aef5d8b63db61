"""Runs of several masking settings at equal seconds: what masks.py and masks_continued.py have in common.

`Benchmark.run_all` tunes the learning rate of uniform masks at 15%, and of cases that ask for it, on a seed of its own,
measures the CPU-seconds of a step of every case in one process, cases taking turns, and trains every case once per
seed. It resumes where it was stopped: WORK/runs/CASE-SEED.json exists for every complete run. Runs are ordered by seed,
so that an early end leaves complete seeds.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from masks_steps import measure

from maskvr_ds import train as training
from maskvr_ds.benchmarks.mask_costs import run_costs
from maskvr_ds.config import load_config
from maskvr_ds.run_folder.layout import COMPLETED, METRICS
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics_file import AUTO_EVENT, read_events, read_lines
from maskvr_ds.training.auto_choice import ladder

TUNING_SEED = 100
LOSS = "held_out_loss_mask"
BASELINE = "uniform_15"

Settings = dict[str, Any]


def parser(description: str | None, cases: Iterable[str]) -> argparse.ArgumentParser:
    """Options of both commands."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, help="folder for corpora and runs")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    found.add_argument("--cases", nargs="+", choices=list(cases), metavar="CASE", help=f"of {' '.join(cases)}")
    found.add_argument("--rounds", type=int, default=40, help="timed steps of each case (default: 40)")
    return found


def pipeline(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "data_pipeline", *map(str, words)], check=True)


def quiet() -> None:
    """One thread, no logs and pictures of runs: for processes whose CPU-seconds count."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    training.plot_loss = lambda *_: None


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


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Benchmark:
    """work: folder with `corpus`, and for the results. common: settings of all runs, on top of the recipe `demo_cpu`.
    cases: name → settings; the one of strategy auto has the name of its strategy. tuned_as: case → the one whose
    learning rate it takes; others take that of uniform masks at 15%. layers: at which [MASK] may enter under auto."""

    work: Path
    common: Settings
    cases: dict[str, Settings]
    learning_rates: tuple[float, ...]
    tuned_as: dict[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] = (0,)

    def settings(self, **more: Any) -> list[str]:
        """All runs' settings, and `more` of them, as assignments."""
        corpus = self.work / "corpus"
        values = {"data.path": corpus, "data.held_out_path": corpus / "held_out", **self.common, **more}
        return [f"{key}={value}" for key, value in values.items()]

    def train(self, name: str, seed: int, values: Settings) -> None:
        """A run, unless it is complete; writes WORK/runs/NAME-SEED.json."""
        result, folder = self.work / "runs" / f"{name}-{seed}.json", self.work / "runs" / f"{name}-{seed}"
        if result.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        if values.get("masking.strategy") == "auto":
            # Measured once: all runs are of one machine.
            values = {**values, "masking.auto.costs": self.auto_costs(values)}
        config = load_config("demo_cpu", self.settings(output_dir=folder, seed=seed, **values))
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

    def auto_costs(self, values: Settings) -> Path:
        """Seconds of auto's candidates, as `maskvr benchmark strategy-cost` measures them.

        WORK/auto_costs_took.json: the CPU-seconds that it took.
        """
        file = self.work / "auto_costs.json"
        if not file.exists():
            assignments = self.settings(output_dir=self.work / "none", **values)
            cpu = in_child(lambda: write(file, run_costs("demo_cpu", assignments, 5)))
            write(self.work / "auto_costs_took.json", {"cpu_seconds": cpu})
        return file

    def tuned(self, case: str) -> float:
        """The learning rate at which the case ends lowest, on a seed that is not used otherwise."""
        own = "" if case == BASELINE else f"_{case}"
        last = {}
        for rate in self.learning_rates:
            name = f"lr_{rate:g}{own}"
            self.train(name, TUNING_SEED, {**self.cases[case], "optimizer.lr": rate})
            last[rate] = read(self.work / "runs" / f"{name}-{TUNING_SEED}.json")["held_out"][-1][1]
        found = ", ".join(f"{rate:g} {x:.3f}" for rate, x in last.items())
        print(f"{case}: learning rates, last loss: {found}", flush=True)
        return min(last, key=lambda rate: last[rate])

    def measure_steps(self, rounds: int) -> None:
        """WORK/step_seconds.json: CPU-seconds of a step of every case, and of uniform masks at every rate and layer of
        auto."""
        file, auto = self.work / "step_seconds.json", self.cases["auto"]
        if file.exists():
            return
        rates = ladder(auto["masking.rate"], auto["masking.final_rate"])
        cases = {name: values for name, values in self.cases.items() if values is not auto}
        for rate, layer in itertools.product(rates, self.layers):
            cases[f"auto at {rate:g}, layer {layer}"] = {"masking.rate": rate, "masking.late_layer": layer}
        in_child(lambda: write(file, measure(self.settings(output_dir=self.work / "none"), cases, rounds)))

    def hours(self) -> float:
        return sum(read(path)["process_cpu_seconds"] for path in (self.work / "runs").glob("*.json")) / 3600

    def run_all(self, arguments: argparse.Namespace) -> None:
        """Everything that is missing. Prints the remaining runs and the hours so far. arguments: of `parser`."""
        tuned = {case: self.tuned(case) for case in (BASELINE, *sorted(set(self.tuned_as.values())))}
        self.measure_steps(arguments.rounds)
        wanted = list(itertools.product(arguments.seeds, arguments.cases or self.cases))
        for number, (seed, case) in enumerate(wanted):
            started = time.monotonic()
            lr = tuned[self.tuned_as.get(case, case if case in tuned else BASELINE)]
            self.train(case, seed, {**self.cases[case], "optimizer.lr": lr})
            left = sum(not (self.work / "runs" / f"{c}-{s}.json").exists() for s, c in wanted[number + 1 :])
            took = time.monotonic() - started
            print(f"{case}-{seed}: {took:.0f} s; {left} runs left; {self.hours():.2f} CPU-hours so far", flush=True)
