"""What normalises an encoder, on real text: LayerNorm, RMSNorm, batch and population normalisation, three seeds each.

    python docs/experiments/normalizations.py --data CORPUS --output DIR [--minutes 9]

bert-tiny (2 layers, 128 hidden) on a corpus with a held-out part; the same seeds, batches and masks for each
normalisation, so that differences are paired by seed. One process on a CPU, about 25 minutes of one core; after
--minutes it stops between two runs, and the same command continues. Writes DIR/normalizations.json and prints the
table, complete or not.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskvr_ds import train
from maskvr_ds.config import RunConfig
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics_file import read_lines

SEEDS = (0, 1, 2)
STUDENT = 4.303  # 97.5% quantile of Student's t for three seeds
STEPS, BATCH = 300, 32
# ζ of gamma decay: that of the paper for a linear unit of unit Fisher information, 3/4 M, at 32 rows of 64 tokens is
# 0.0004; and a hundred times as much.
KINDS: dict[str, dict[str, Any]] = {
    "LayerNorm": {},
    "RMSNorm": {"normalization": "rms"},
    "batch": {"normalization": "batch"},
    "population": {"normalization": "population"},
    "population, ζ = 0.0004": {"normalization": "population", "gamma_decay": 0.0004},
    "population, ζ = 0.04": {"normalization": "population", "gamma_decay": 0.04},
}


def configuration(folder: Path, corpus: Path, kind: str, seed: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "seed": seed,
            "data": {"path": str(corpus)},
            "model": {"preset": "bert-tiny", **KINDS[kind]},
            "batch": {"global_size": BATCH, "micro_size": BATCH},
            "optimizer": {"name": "adamw", "lr": 2e-3},
            "schedule": {"warmup_share": 0.1},
            "training": {"steps": STEPS},
            "evaluation": {"every_steps": 100, "rows": 256},
            "checkpoint": {"every_steps": 0},
            "monitor": {"tensorboard": False},
            "deepspeed": "zero0_fp32",
        }
    )


def measure(config: RunConfig) -> dict[str, Any]:
    """Train; final losses in nats per masked token, the seconds of the median step, and how it ended."""
    ended = None
    try:
        train.train(config, "auto")
    except FloatingPointError as error:
        ended = str(error)
    lines = read_lines(config.output_dir / METRICS)
    held_out = [line["held_out_loss"] for line in lines if line.get("held_out_loss") is not None]
    return {
        "loss": statistics.fmean(line["loss"] for line in lines[-20:]),
        "held_out_loss": held_out[-1] if held_out and ended is None else None,
        "steps": lines[-1]["step"],
        "ended": ended,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over seeds; differences from LayerNorm are paired by seed, with Student's 95% interval of their mean."""
    lines = ["| normalisation | runs | training loss | held-out loss | held-out − LayerNorm, 95% interval | by seed |"]
    lines.append("|---|---:|---:|---:|---|---|")
    for kind in KINDS:
        runs = {s: results[f"{kind}/{s}"] for s in SEEDS if f"{kind}/{s}" in results}
        finished = {s: r for s, r in runs.items() if r["held_out_loss"] is not None}
        if not finished:
            lines.append(f"| {kind} | {len(runs)} | – | {'diverged' if runs else '–'} | | |")
            continue
        loss, held = (statistics.fmean(r[key] for r in finished.values()) for key in ("loss", "held_out_loss"))
        base = {s: results.get(f"LayerNorm/{s}", {}).get("held_out_loss") for s in SEEDS}
        pairs = [r["held_out_loss"] - base[s] for s, r in finished.items() if base[s] is not None]
        each = ", ".join(f"{difference:+.3f}" for difference in pairs)
        mean = ""
        if len(pairs) == len(SEEDS) and kind != "LayerNorm":
            middle, half = statistics.fmean(pairs), STUDENT * statistics.stdev(pairs) / len(pairs) ** 0.5
            mean = f"{middle:+.3f} ({middle - half:+.3f} to {middle + half:+.3f})"
        diverged = f" ({len(runs) - len(finished)} diverged)" if len(runs) > len(finished) else ""
        lines.append(f"| {kind} | {len(runs)}{diverged} | {loss:.3f} | {held:.3f} | {mean} | {each} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    stored = arguments.output / "normalizations.json"
    results: dict[str, dict[str, Any]] = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    train.plot_loss = lambda *_: None
    logging.disable(logging.WARNING)
    start = time.monotonic()

    def run() -> None:
        for seed in SEEDS:
            for number, kind in enumerate(KINDS):
                if f"{kind}/{seed}" in results or time.monotonic() - start > 60 * arguments.minutes:
                    continue
                config = configuration(arguments.output / f"run{number}-{seed}", arguments.data, kind, seed)
                results[f"{kind}/{seed}"] = measure(config)
                stored.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    status = distributed.run_as_rank(run)
    print(table(results))
    return status or int(len(results) < len(KINDS) * len(SEEDS))


if __name__ == "__main__":
    sys.exit(main())
