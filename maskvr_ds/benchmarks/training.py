"""`maskvr benchmark`: dispatch and output, and the benchmark `loading-speed`, on synthetic rows.

The loader is measured in rows per CPU-second of one thread. Training: training_speed.py. Masking: masks.py. Optimizer
step: lamb.py.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.benchmarks.corpus import make_corpus, one_thread, rows_per_cpu_second
from maskvr_ds.benchmarks.lamb import lamb_cost
from maskvr_ds.benchmarks.mask_costs import run_costs
from maskvr_ds.benchmarks.masks import masking_speed, strategy_cost
from maskvr_ds.benchmarks.training_speed import PART_FIGURES, training_speed
from maskvr_ds.data.loader import Loader
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import check_output_file

# Options of training-speed only.
_OF_TRAINING = ("accumulation", "compile", "peak_tflops")
# Options that a run's configuration replaces, with their defaults.
_OF_NO_RUN = {"preset": "bert-base", "deepspeed": "zero1_bf16", "micro_size": [128], "sequence_length": 128}

# Endings of the names of figures over several rounds.
_SPREAD = ("median", "min", "max")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark `arguments.what`, print its results and write them as JSON if --output is given.

    Raises ValueError for options that the benchmark does not have.
    """
    what, length = arguments.what, arguments.sequence_length
    given = [name for name in _OF_TRAINING if getattr(arguments, name)]
    if what != "training-speed" and given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is an option of training-speed; remove it, or measure that")
    if arguments.config and what != "strategy-cost":
        raise ValueError("--config is an option of strategy-cost; remove it, or measure that")
    for name, default in _OF_NO_RUN.items() if arguments.config else ():
        if getattr(arguments, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is set by the run that --config names; remove it")
    if what not in ("training-speed", "optimizer-step-time") and arguments.assignments and not arguments.config:
        raise ValueError(
            "--set is an option of training-speed, of optimizer-step-time, and of strategy-cost with --config; "
            "remove it"
        )
    if arguments.output:
        check_output_file(arguments.output, "--output")
    sizes = arguments.micro_size
    if what != "training-speed" and len(sizes) > 1:
        raise ValueError(f"--micro-size: {len(sizes)} values; only training-speed takes several")
    results: list[dict[str, Any]] = []
    if what == "loading-speed":
        results.append(loader_speed(sequence_length=length))
    elif what == "masking-speed":
        results.append(masking_speed(strategy=arguments.strategy, sequence_length=length))
    elif arguments.config:
        results.append(run_costs(arguments.config, arguments.assignments or (), arguments.rounds))
    elif what == "strategy-cost":
        options = {"micro_size": sizes[0], "rounds": arguments.rounds, "sequence_length": length}
        results.append(_on(arguments, strategy_cost, threads=arguments.threads, **options))
    elif what == "optimizer-step-time":
        options = {"against": arguments.against, "rounds": arguments.rounds, "assignments": arguments.assignments or ()}
        results.append(_on(arguments, lamb_cost, threads=arguments.threads, **options))
    else:
        for size in sizes:
            found = _on(
                arguments,
                training_speed,
                micro_size=size,
                steps=arguments.steps,
                sequence_length=length,
                accumulation=arguments.accumulation or 1,
                compiled=arguments.compile or "none",
                peak_tflops=arguments.peak_tflops,
                assignments=arguments.assignments or (),
            )
            results.append(found)
            _show(found)
    if distributed.rank() != 0:
        return 0
    if what != "training-speed":
        _show(results[0])
    if arguments.output:
        content = results[0] if len(results) == 1 else results
        Path(arguments.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _on(arguments: argparse.Namespace, benchmark: Any, **options: Any) -> dict[str, Any]:
    """The benchmark of the model and the DeepSpeed configuration that the command line names."""
    found: dict[str, Any] = benchmark(preset=arguments.preset, deepspeed=arguments.deepspeed, **options)
    return found


def _show(figures: Mapping[str, Any]) -> None:
    """Print results, a line each; nested ones, and those with a median, minimum and maximum, as tables. Only on rank
    0."""
    if distributed.rank() != 0:
        return
    spread = [name.removesuffix("_median") for name in figures if name.endswith("_median")]
    spread = [name for name in spread if all(f"{name}_{column}" in figures for column in _SPREAD)]
    in_table = {f"{name}_{column}" for name in spread for column in _SPREAD}
    for name, value in figures.items():
        if name in in_table:
            continue
        if name == "parts":
            print(f"{'milliseconds per step':20}" + "".join(f"{column:>14}" for column in PART_FIGURES))
            for part, row in value.items():
                print(f"  {part:18}" + "".join(f"{row[column]:>14,.4g}" for column in PART_FIGURES))
        elif isinstance(value, Mapping):
            cells = ", ".join(f"{key} {_text(cell)}" for key, cell in value.items())
            print(f"{name:32} {cells or 'none'}")
        else:
            print(f"{name:32} {_text(value)}")
    width = max(map(len, spread), default=0)
    for number, name in enumerate(spread):
        if number == 0:
            print(" " * width + "".join(f"{column:>14}" for column in _SPREAD))
        print(f"{name:{width}}" + "".join(f"{_figure(name, figures[f'{name}_{column}']):>14}" for column in _SPREAD))
    if any(name.endswith("_adds") for name in spread):
        print("adds: to the time of a step with uniform masks; share: time of masking ÷ that of the rest of the step")


def _figure(name: str, value: Any) -> str:
    """A cell of a table; shares, and what is added, in percent."""
    if name.endswith(("_adds", "_adds_cpu_time")):
        return f"{value:+.1%}"
    return f"{value:.1%}" if name.endswith("_share") else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_text(cell)}" for key, cell in value.items()) + ")"
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def loader_speed(*, rows: int = 500_000, batch_size: int = 256, sequence_length: int = 128) -> dict[str, Any]:
    """Rows per CPU-second of one thread that reads shuffled rows of a memory-mapped corpus into batches on the host."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        corpus = Corpus(make_corpus(Path(folder) / "corpus", rows=rows, sequence_length=sequence_length))
        batches = Loader(corpus, seed=0, global_size=batch_size).batches()

        def round_() -> int:
            for _ in range(2000):
                next(batches)
            return 2000 * batch_size

        figures = rows_per_cpu_second(round_)
    return {"what": f"loader, L = {sequence_length}, batches of {batch_size}, {rows:,} rows", **figures}
