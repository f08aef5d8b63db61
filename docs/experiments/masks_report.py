"""Report of masks.py: the runs' JSON → results.json and masks.png in a folder, and a Markdown table on stdout.

    python docs/experiments/masks_report.py WORK docs/results/masks

Every case has the seeds that it was run with, each paired with that of uniform masks. Definitions: masks.py.
"""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskvr_ds.analysis.gradient_variance.progress import student

BASELINE = "uniform_15"
LABELS = {
    BASELINE: "uniform, 0.15",
    "uniform_30": "uniform, 0.30",
    "uniform_45": "uniform, 0.45",
    "schedule_45_15": "uniform, 0.45 → 0.15",
    "late_45": "uniform, 0.45, late mask tokens",
    "fully_explored_15": "fully_explored, 0.15",
    "fully_explored_30": "fully_explored, 0.30",
    "auto": "auto, 0.45 to 0.15",
}
# A step of uniform masks at a rate and layer of auto.
_AUTO_STEP = "auto at {:g}, layer {}"

Point = tuple[float, float]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def spent(run: dict[str, Any], of_step: Callable[[str], float], added: dict[str, float]) -> list[float]:
    """What a run has spent after 0, 1, … steps, in the unit of `of_step` (of a case's step). added: by auto's
    strategies. Measurements of auto are not counted."""
    if not run["auto"]:
        return [of_step(run["case"]) * step for step in range(run["steps"] + 1)]
    events = {event["step"]: event for event in run["auto"]}
    # Before the first measurement: the highest rate, one mask of a row per batch, MAPNet off.
    rate, layer, strategy, trained, total = run["settings"]["masking.rate"], 0, "", False, [0.0]
    for step in range(run["steps"]):
        if (event := events.get(step)) is not None:
            rate, layer = event["rate"], event.get("late_layer", 0)
            strategy, trained = event["strategy"], event["proposal_trained"]
        more = added.get("mapnet", 0.0) if trained else added.get(strategy, 0.0)
        total.append(total[-1] + of_step(_AUTO_STEP.format(rate, layer)) + more)
    return total


def measuring(run: dict[str, Any]) -> list[float]:
    """CPU-seconds of auto's measurements before step 1, 2, …, and in all."""
    events = {event["step"]: event["cpu_seconds"] for event in run["auto"]}
    return list(itertools.accumulate(events.get(step, 0.0) for step in range(run["steps"] + 1)))


def reached(points: list[Point], target: float) -> float | None:
    """The place (first coordinate) at which the loss falls to `target`, interpolated; None if never."""
    for (place, loss), (later, lower) in itertools.pairwise(points):
        if lower <= target < loss:
            return place + (loss - target) / (loss - lower) * (later - place)
    return None


def interval(values: list[float]) -> dict[str, Any]:
    """Mean with a 95% interval by Student's t."""
    mean = statistics.fmean(values)
    width = math.nan
    if len(values) > 1:
        width = student(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - width, "high": mean + width, "values": values}


def evaluate(work: Path) -> dict[str, Any]:
    """All figures: per case, over its seeds."""
    runs = {(r["case"], r["seed"]): r for r in map(read, sorted((work / "runs").glob("*.json")))}
    steps = read(work / "step_seconds.json")
    auto_costs = read(work / "auto_costs.json")
    seeds = sorted(seed for name, seed in runs if name == BASELINE)
    base: dict[int, dict[str, Any]] = {}
    cases: dict[str, Any] = {}
    for name in LABELS:
        of_seeds = {seed: runs[name, seed] for seed in seeds if (name, seed) in runs}
        if not of_seeds:
            continue
        targets = {seed: runs[BASELINE, seed]["held_out"][-1][1] for seed in of_seeds}
        paired = {seed: _of_run(run, targets[seed], steps, auto_costs["added"]) for seed, run in of_seeds.items()}
        base = base or paired
        cases[name] = {"runs": list(paired.values())}
    for name, case in cases.items():
        own, of_base = case["runs"], [base[run["seed"]] for run in case["runs"]]
        case["final_loss"] = interval([run["final_loss"] for run in own])
        case["difference"] = interval([a["final_loss"] - b["final_loss"] for a, b in zip(own, of_base, strict=True)])
        case["reached"] = sum(run["steps"] is not None for run in own)
        for key in ("steps", "seconds", "seconds_with_measurements", "flops"):
            # A run that never reaches the target takes more than all that it has spent.
            taken = [run["total"][key] if run[key] is None else run[key] for run in own]
            found = interval([b[key] / a for a, b in zip(taken, of_base, strict=True)])
            case[f"fewer_{key}"] = {**found, "bound": case["reached"] < len(own)}
        if name in steps:
            case["step"] = steps[name]
    tuning = {n: r["held_out"][-1][1] for (n, _), r in runs.items() if n.startswith("lr_")}
    return {
        "seeds": seeds,
        "learning_rates": tuning,
        "lr": runs[BASELINE, seeds[0]]["settings"]["optimizer.lr"],
        "steps": runs[BASELINE, seeds[0]]["steps"],
        "step": steps,
        "auto_costs": auto_costs,
        "auto_costs_took": read(work / "auto_costs_took.json")["cpu_seconds"],
        "cpu_hours": sum(run["process_cpu_seconds"] for run in runs.values()) / 3600,
        "cases": cases,
    }


def _of_run(run: dict[str, Any], target: float, steps: dict[str, Any], added: dict[str, float]) -> dict[str, Any]:
    seconds = spent(run, lambda case: steps[case]["median"], added)
    flops = spent(run, lambda case: steps[case]["flops"], {})
    extra = measuring(run)
    curve = [(step, loss) for step, loss, _ in run["held_out"]]
    found: dict[str, Any] = {"seed": run["seed"], "target": target, "final_loss": curve[-1][1], "held_out": curve}
    units = {
        "steps": [float(step) for step in range(run["steps"] + 1)],
        "seconds": seconds,
        "seconds_with_measurements": [a + b for a, b in zip(seconds, extra, strict=True)],
        "flops": flops,
    }
    found |= {key: reached([(of[step], loss) for step, loss in curve], target) for key, of in units.items()}
    found["total"], found["measuring"] = {key: of[-1] for key, of in units.items()}, extra[-1]
    found["at"] = [seconds[step] + extra[step] for step, _ in curve]
    found["course"] = [
        [e["step"], e["strategy"], e["segments"], e["rate"], e.get("late_layer", 0), e["reason"]] for e in run["auto"]
    ]
    # The target is the baseline's own last loss: it reaches it there, though it may have been as low before.
    if run["case"] == BASELINE:
        found |= found["total"]
    return found


def cell(x: dict[str, Any], digits: int) -> str:
    """Mean and interval; of a bound, the mean alone."""
    if x.get("bound"):
        return f"≤ {x['mean']:.{digits}f}"
    bounds = f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]" if math.isfinite(x["low"]) else ""
    return f"{x['mean']:.{digits}f}{bounds}" if max(x["values"]) > min(x["values"]) else f"{x['mean']:.{digits}f}"


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    cases = figures["cases"]
    base = cases[BASELINE]["step"]["median"]
    lines = [
        "| masks | CPU-seconds of a step | last loss behind [MASK] | − uniform's | reached | × fewer steps | "
        "× fewer seconds | × fewer FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        step = f"{case['step']['median']:.4f} ({case['step']['median'] / base:.2f})" if "step" in case else "by rate"
        row = [LABELS[name], step, cell(case["final_loss"], 3), cell(case["difference"], 3)]
        row += [f"{case['reached']} of {len(case['runs'])}"]
        row += [cell(case[f"fewer_{key}"], 2) for key in ("steps", "seconds", "flops")]
        lines.append(f"| {' | '.join(row)} |")
    if "auto" in cases:
        took = cell(interval([run["measuring"] for run in cases["auto"]["runs"]]), 1)
        ratio = cell(cases["auto"]["fewer_seconds_with_measurements"], 2)
        lines += ["", f"auto with its measurements ({took} CPU-seconds per run): {ratio} × fewer seconds"]
        lines += [f"and its costs, measured once: {figures['auto_costs_took']:.0f} CPU-seconds"]
    return "\n".join(lines) + "\n"


def draw(figures: dict[str, Any], output: Path) -> None:
    """Mean held-out loss by steps and by CPU-seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    canvas, (by_step, by_second) = plt.subplots(1, 2, figsize=(12, 4.6), dpi=90, sharey=True)
    for number, (name, case) in enumerate(figures["cases"].items()):
        curves = [[loss for _, loss in run["held_out"]] for run in case["runs"]]
        mean = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
        places = [step for step, _ in case["runs"][0]["held_out"]]
        at = [statistics.fmean(x) for x in zip(*(run["at"] for run in case["runs"]), strict=True)]
        style = {"color": f"C{number}", "linewidth": 1.4, "label": LABELS[name]}
        by_step.plot(places, mean, **style)
        by_second.plot(at, mean, **style)
    target = figures["cases"][BASELINE]["final_loss"]["mean"]
    for axes, label in ((by_step, "step"), (by_second, "CPU-seconds, measurements of auto included")):
        axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    # Below the plateau of token frequencies; the first steps do not differ.
    lowest = min(case["final_loss"]["mean"] for case in figures["cases"].values())
    by_step.set(ylim=(lowest - 0.03, lowest + 0.5))
    by_step.set(ylabel="held-out loss behind [MASK] (nats)")
    by_step.legend(fontsize=8)
    counts = sorted({len(case["runs"]) for case in figures["cases"].values()})
    canvas.suptitle(f"Means of {counts[0]} {f'to {counts[-1]} ' if len(counts) > 1 else ''}seeds")
    canvas.tight_layout()
    canvas.savefig(output)
    plt.close(canvas)


def write_report(work: Path, folder: Path) -> str:
    """Write the three files; → the table."""
    figures = evaluate(work)
    if not figures["seeds"]:
        raise SystemExit(f"{work}: no run of uniform masks at 15% is complete yet")
    folder.mkdir(parents=True, exist_ok=True)
    text = table(figures)
    (folder / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(figures, folder / "masks.png")
    return text


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1]), Path(sys.argv[2])))
