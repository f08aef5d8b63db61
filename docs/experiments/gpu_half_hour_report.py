"""The results of gpu_half_hour.sh, compared with its goals: a line for each, and whether it was reached.

    python docs/experiments/gpu_half_hour_report.py results/*/*.json

Exit status 1 if a goal was missed or has no result.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, Any]
# Name → how it is read from the results, by name of file; limit; whether it must be at least that.
GOALS: dict[str, tuple[Callable[[Results], float], float, bool]] = {
    "BERT-base, 256 rows of 128: share of the matrix products' rate": (
        lambda r: max(r[name]["share_of_matrix_product_rate"] for name in ("base_fused", "base_layers", "base_model")),
        0.45,
        True,
    ),
    "BERT-large, L = 128: share of the matrix products' rate": (
        lambda r: max(r[name]["share_of_matrix_product_rate"] for name in ("large_128", "large_128_layers")),
        0.55,
        True,
    ),
    "BERT-large, L = 512: share of the matrix products' rate": (
        lambda r: max(r[name]["share_of_matrix_product_rate"] for name in ("large_512", "large_512_layers")),
        0.55,
        True,
    ),
    "fused LAMB ÷ FusedLamb, BERT-base": (lambda r: r["lamb_base_fused"]["lamb_over_fused_lamb_median"], 1.2, False),
    "fused LAMB ÷ FusedLamb, BERT-large": (lambda r: r["lamb_large_fused"]["lamb_over_fused_lamb_median"], 1.2, False),
    "MAPNet adds to a step": (lambda r: r["masks_128"]["mapnet_adds_median"], 0.03, False),
    "exact sampling adds to a step, L = 128": (lambda r: r["masks_128"]["frequency_exact_adds_median"], 0.01, False),
    "exact sampling adds to a step, L = 512": (lambda r: r["masks_512"]["frequency_exact_adds_median"], 0.01, False),
    "compiled layers ÷ eager, BERT-base": (
        lambda r: r["base_layers"]["tokens_per_second_median"] / r["base_fused"]["tokens_per_second_median"],
        1.0,
        True,
    ),
    "launches of a step, eager": (lambda r: r["base_fused"]["launches_per_step"], 750, False),
    "launches of a step, compiled layers": (lambda r: r["base_layers"]["launches_per_step"], 350, False),
    # Reading the metrics of the step before waits for events that have long passed.
    "host waits of a step, besides events": (lambda r: _waits(r["base_fused"]), 1, False),
}


def _waits(result: dict[str, Any]) -> float:
    """From "file:line × count, …"; those of telemetry are of the step before."""
    sites = result["synchronisations_in_each_step"].split(", ")
    counted = [site.rpartition(" × ") for site in sites if site != "none" and "telemetry/" not in site]
    return sum(float(count) for *_, count in counted)


def main() -> int:
    results: Results = {}
    for path in map(Path, sys.argv[1:]):
        results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    devices = {one["device"] for one in results.values() if isinstance(one, dict)}
    print(f"device: {', '.join(sorted(devices)) or 'no results'}")
    missed = 0
    for name, (read, limit, at_least) in GOALS.items():
        try:
            value = read(results)
        except KeyError as error:
            print(f"{name}: no result ({error.args[0]})")
            missed += 1
            continue
        reached = value >= limit if at_least else value <= limit
        missed += not reached
        print(f"{name}: {value:.4g}, {'≥' if at_least else '≤'} {limit:g} {'reached' if reached else 'MISSED'}")
    if {"base_before", "base_fused"} <= results.keys():
        before, now = (results[name]["tokens_per_second_median"] for name in ("base_before", "base_fused"))
        print(f"tokens per second, BERT-base: {before:,.0f} before, {now:,.0f} now, {now / before:.2f} times")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
