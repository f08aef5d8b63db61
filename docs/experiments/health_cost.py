"""Cost of `monitor.health_every` and of `maskvr health --at` against that of training, at BERT-base.

    python docs/experiments/health_cost.py --output docs/results/health/cost.json [--rounds 6]

CPU seconds (process time) of one process on one thread, fp32, random text of 128 tokens per row, 30,522 tokens:
forward and backward passes of training, a measurement of `monitor.health_every` on the two rows of its probe (each
round measures both, in turn), and the parts of `maskvr health --at` on its 8 rows, once. Of Lanczos' products with the
Hessian one is measured and counted 40 times, the maximum. The recipe bert_base_4k has 4,096 rows per step; the
optimizer's step is not counted, which makes the share of health larger. Ten minutes, 5 GiB; what the output file has is
not measured again.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.moments import Sample
from maskvr_ds.analysis.gradient_variance.moments import measure as moments
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.analysis.health.probe import copy_for_analysis, mean_loss, measure_signals
from maskvr_ds.analysis.health.spectra import hessian_product, largest_singular_value
from maskvr_ds.benchmarks.corpus import make_corpus
from maskvr_ds.config.model import ModelConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.training.health import HealthMonitor
from maskvr_ds.training.setup import encoder_config

LENGTH, PROBE_ROWS, TRAINED_ROWS, ROWS = 128, 2, 4, 8
GLOBAL, MICRO, EVERY, ITERATIONS, DRAWS = 4096, 256, 1000, 40, 2


def seconds(action: Callable[[], Any]) -> float:
    """CPU seconds."""
    began = time.process_time()
    action()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder) / "corpus", rows=16, sequence_length=LENGTH)
        found = measure(Corpus(Path(folder) / "corpus"), arguments.rounds, arguments.output)
    found["share"] = shares(found)
    write(arguments.output, found)
    print(table(found))


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(corpus: Corpus, rounds: int, output: Path) -> dict[str, Any]:
    """CPU seconds of rounds and parts; those in the output file are not measured again."""
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    model = MaskedLanguageModel(encoder_config(ModelConfig(preset="bert-base"), corpus, None))
    device = torch.device("cpu")
    masker = Masker.for_corpus(corpus.manifest, seed=0, device=device)

    def rows(count: int) -> MaskedBatch:
        chosen = np.arange(count)
        return masker(to_device(read_rows(corpus, chosen, np.zeros_like(chosen)), device))

    if "rounds" not in found:
        found["rounds"] = measure_rounds(model, rows(TRAINED_ROWS), rows(PROBE_ROWS), rounds)
        write(output, found)
    model = copy_for_analysis(model.mlm)
    batch, parameters = rows(ROWS), [p for p in model.parameters() if p.requires_grad]
    product = hessian_product(lambda: mean_loss(model, batch), parameters)
    sample = Sample(corpus, np.arange(ROWS), 0, 8, device, False)
    parts: dict[str, Callable[[], Any]] = {
        "one product with the Hessian": lambda: product([torch.randn_like(p) for p in parameters]),
        "singular values": lambda: [largest_singular_value(p.detach()) for p in parameters if p.dim() == 2],
        "signals and Jacobians": lambda: measure_signals(model, batch),
        "gradient noise": lambda: moments(sample, Sketcher(model, size=4001, seed=0), masker, draws=DRAWS, copies=1),
    }
    for name, action in parts.items():
        if name not in found.setdefault("parts", {}):
            found["parts"][name] = seconds(action)
            write(output, found)
    return found


def measure_rounds(
    model: MaskedLanguageModel, trained: MaskedBatch, probe: MaskedBatch, rounds: int
) -> list[dict[str, float]]:
    """CPU seconds of training, per row, and of a measurement of the monitor, in turn."""
    monitor = HealthMonitor(probe, EVERY)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        mean_loss(model.train(), trained).backward()

    found = []
    for _ in range(rounds + 1):
        row = seconds(train) / TRAINED_ROWS
        found.append({"training, per row": row, "monitor": seconds(lambda: monitor.figures(model))})
    model.zero_grad(set_to_none=True)
    return found[1:]


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Health every 1,000 steps over training, per rank: the rows of a step are shared among ranks, health is not."""
    row, monitor = (statistics.median(r[key] for r in found["rounds"]) for key in ("training, per row", "monitor"))
    parts = found["parts"]
    complete = sum(parts.values()) + (ITERATIONS - 1) * parts["one product with the Hessian"]
    found["cpu_seconds"] = {"training, per row": row, "monitor": monitor, **parts, "all of --at": complete}
    return {
        f"{name}, {ranks} rank{'s' if ranks > 1 else ''}": cost / (EVERY * GLOBAL / ranks * row)
        for name, cost in (("monitor", monitor), ("all of --at", complete))
        for ranks in (1, GLOBAL // MICRO)
    }


def table(found: dict[str, Any]) -> str:
    lines = ["| what | CPU seconds |", "|---|---:|"]
    lines += [f"| {name} | {value:,.3g} |" for name, value in found["cpu_seconds"].items()]
    lines += ["", f"| every {EVERY:,} steps | share of the time of training |", "|---|---:|"]
    lines += [f"| {name} | {value:.2g} |" for name, value in found["share"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
