"""Report of lamb_under_zero.py: runs.jsonl → summary.json, summary.md and lamb_under_zero.png.

python docs/experiments/lamb_under_zero_report.py docs/results/lamb_under_zero     # redraws the plot
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RUNS = "runs.jsonl"
COLOURS = {"plain": "black", "bound": "tab:blue", "unaware": "tab:red"}
# Names of the methods in the plot.
LABELS = {"plain": "plain LAMB", "bound": "maskvr_ds LAMB", "unaware": "ZeRO-unaware LAMB"}
_SMOOTHING = 10  # steps averaged per point of the training curves


class Job(NamedTuple):
    """One training run."""

    method: str
    ranks: int
    lr: float
    seed: int


def read_runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / RUNS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def job_of(run: dict[str, Any]) -> Job:
    return Job(*(run[field] for field in Job._fields))


def write_report(runs: list[dict[str, Any]], folder: Path, *, ranks: int, versions: dict[str, str]) -> str:
    """Write the three files; → the tables. ranks: number of ranks of the sweep."""
    figures = {"versions": versions, **summary(runs, ranks)}
    (folder / "summary.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = tables(figures)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    draw(runs, figures, folder / "lamb_under_zero.png")
    return text


def best_rate(runs: list[dict[str, Any]], method: str, ranks: int) -> float:
    """The learning rate with the lowest final held-out loss on average over seeds; diverged runs count as infinite."""
    finals: dict[float, list[float]] = {}
    for run in runs:
        if (run["method"], run["ranks"]) == (method, ranks):
            last = run["held_out"][-1][1]
            finals.setdefault(run["lr"], []).append(math.inf if last is None else last)
    return min(finals, key=lambda lr: sum(finals[lr]) / len(finals[lr]))


def summary(runs: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """The figures of the tables and of docs/explanation/lamb-under-zero.md. ranks: number of ranks of the sweep."""
    by_job = {job_of(run): run for run in runs}
    best = {method: best_rate(runs, method, ranks) for method in ("bound", "unaware")}
    held_out: dict[str, dict[str, Any]] = {}
    for job, run in sorted(by_job.items()):
        entry = held_out.setdefault(f"{job.method}, {job.ranks} ranks, lr {job.lr:g}", {**job._asdict(), "by_seed": []})
        entry["by_seed"].append(run["held_out"][-1][1])
    for entry in held_out.values():
        entry.pop("seed")
        entry |= _spread(entry["by_seed"])

    def difference(one: Job, other: Job) -> float:
        """Largest difference of two runs' training losses at any step."""
        pairs = zip(by_job[one]["losses"], by_job[other]["losses"], strict=False)
        return max(abs(a - b) for a, b in pairs)

    trajectories: dict[str, Any] = {}
    for job in sorted(by_job):
        reference = job._replace(method="plain", ranks=1, lr=best["bound"])
        if job.method != "plain" and job.lr == best["bound"]:
            key = f"{job.method} on {job.ranks} ranks from plain"
            trajectories.setdefault(key, []).append(difference(job, reference))
        if job.method == "unaware" and job.lr == best["unaware"] and job.ranks != ranks:
            key = f"unaware on {job.ranks} ranks from unaware on {ranks}"
            trajectories.setdefault(key, []).append(difference(job, job._replace(ranks=ranks)))
    seeds = sorted({job.seed for job in by_job})

    def gaps(lr_bound: float, lr_unaware: float, ranks_unaware: int = ranks) -> list[float]:
        finals = [
            [by_job[Job(method, n, lr, seed)]["held_out"][-1][1] for seed in seeds]
            for method, n, lr in (("unaware", ranks_unaware, lr_unaware), ("bound", ranks, lr_bound))
        ]
        return [u - b for u, b in zip(*finals, strict=True)]

    rates = sorted({job.lr for job in by_job if job.ranks == ranks})
    return {
        "best_lr": best,
        "final_held_out_loss": held_out,
        "unaware_minus_bound": {
            f"best of {ranks} ranks against best": _spread(gaps(best["bound"], best["unaware"])),
            **{
                f"unaware on {n} ranks at that rate": _spread(gaps(best["bound"], best["unaware"], n))
                for n in sorted({job.ranks for job in by_job if job.method == "unaware"} - {ranks})
            },
            **{f"both at lr {lr:g}": _spread(gaps(lr, lr)) for lr in rates},
        },
        "largest_training_loss_difference": {key: _spread(values) for key, values in trajectories.items()},
        "trust_ratios": ratio_figures(
            by_job[Job("bound", ranks, best["bound"], seeds[0])], by_job[Job("unaware", ranks, best["bound"], seeds[0])]
        ),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "n": len(values)}


def kind_of(name: str) -> str:
    if name.endswith("LayerNorm.weight"):
        return "LayerNorm weights"
    return "biases" if name.endswith("bias") else "matrices"


def ratio_figures(bound: dict[str, Any], unaware: dict[str, Any]) -> dict[str, Any]:
    """Trust ratios applied by `unaware` to partitions relative to the tensors' own, after the first recorded step.

    From one trajectory each: the weights of the two runs differ after the first steps.
    """
    quotients: dict[str, list[float]] = {}
    straddling: dict[str, Any] = {}
    for name, ratios in bound["ratios"].items():
        kind = kind_of(name)
        group = int(kind != "matrices")
        applied = [
            unaware["ratios"][f"rank {r}, group {group}"] for r, on in enumerate(unaware["tensors"]) if name in on
        ]
        for scales in applied:
            quotients.setdefault(kind, []).extend(a / b for a, b in zip(scales[1:], ratios[1:], strict=True))
        if len(applied) > 1:
            apart = [max(s) / min(s) for s in zip(*applied, strict=True)]
            straddling[name] = {"median": statistics.median(apart), "min": min(apart), "max": max(apart)}
    return {
        "applied_over_true": {
            kind: {"median": statistics.median(x), "min": min(x), "max": max(x)} for kind, x in quotients.items()
        },
        "tensors_cut_between_ranks": straddling,
    }


def tables(figures: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["| optimizer | ranks | lr | held-out loss: mean (min to max over seeds) |", "|---|---|---|---|"]
    for entry in figures["final_held_out_loss"].values():
        mark = " (best)" if figures["best_lr"].get(entry["method"]) == entry["lr"] else ""
        lines.append(f"| {entry['method']} | {entry['ranks']} | {entry['lr']:g}{mark} | {_shown(entry, '.3f')} |")
    lines += ["", "| final held-out loss, unaware − bound, same seed | mean (min to max) |", "|---|---|"]
    lines += [f"| {key} | {_shown(x, '+.3f')} |" for key, x in figures["unaware_minus_bound"].items()]
    lines += ["", "| largest difference of the training loss at any step | mean (min to max over seeds) |", "|---|---|"]
    lines += [f"| {key} | {_shown(x, '.2g')} |" for key, x in figures["largest_training_loss_difference"].items()]
    lines += ["", "| ratio applied by unaware ÷ ratio of the tensor | median (min to max) |", "|---|---|"]
    lines += [f"| {key} | {_shown(x, '.2g')} |" for key, x in figures["trust_ratios"]["applied_over_true"].items()]
    lines += ["", "| tensor split between two ranks | larger ÷ smaller scale: median (min to max) |", "|---|---|"]
    cut = figures["trust_ratios"]["tensors_cut_between_ranks"]
    lines += [f"| `{key}` | {_shown(x, '.3g')} |" for key, x in cut.items()]
    return "\n".join(lines) + "\n"


def _shown(x: dict[str, float], form: str) -> str:
    return f"{x['mean' if 'mean' in x else 'median']:{form}} ({x['min']:{form}} to {x['max']:{form}})"


def draw(runs: list[dict[str, Any]], figures: dict[str, Any], output: Path) -> None:
    """Plot trust ratios, loss curves, learning rates, and differences from plain LAMB as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_job = {job_of(run): run for run in runs}
    best = figures["best_lr"]
    seeds = sorted({job.seed for job in by_job})
    ranks = next(job.ranks for job in by_job if job.method == "bound")
    canvas, ((ratios, losses), (sweep, apart)) = plt.subplots(2, 2, figsize=(12, 8.4), dpi=90)

    true, applied = (by_job[Job(method, ranks, best["bound"], seeds[0])] for method in COLOURS if method != "plain")
    styles = {"matrices": "tab:blue", "LayerNorm weights": "tab:green", "biases": "tab:olive"}
    for name, values in true["ratios"].items():
        ratios.plot(true["ratio_steps"], values, color=styles[kind_of(name)], linewidth=0.6, alpha=0.7)
    for kind, colour in styles.items():
        ratios.plot([], [], color=colour, label=f"{LABELS['bound']}: {kind}")
    for (name, values), line in zip(applied["ratios"].items(), ("-", "--", "-.", ":") * ranks, strict=False):
        ratios.plot(
            applied["ratio_steps"], values, color="tab:red", linestyle=line, linewidth=2, label=f"ZeRO-unaware: {name}"
        )
    title = f"trust ratios, {ranks} ranks, learning rate {best['bound']:g}"
    ratios.set(yscale="log", title=title, xlabel="optimizer step", ylabel="trust ratio")
    ratios.legend(fontsize=7, ncols=2)

    for method, lr in best.items():
        group = [by_job[Job(method, ranks, lr, seed)] for seed in seeds]
        length = min(len(run["losses"]) for run in group)
        length -= length % _SMOOTHING
        smooth = np.array([run["losses"][:length] for run in group]).reshape(len(group), -1, _SMOOTHING).mean(2)
        steps = _SMOOTHING * np.arange(1, smooth.shape[1] + 1)
        colour = COLOURS[method]
        losses.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.2, linewidth=0)
        losses.plot(steps, smooth.mean(0), color=colour, linewidth=1, label=f"{LABELS[method]}, lr {lr:g}: training")
        held_out = [list(zip(*run["held_out"], strict=True)) for run in group]
        mean = [statistics.fmean(x) for x in zip(*(loss for _, loss in held_out), strict=True)]
        label = f"{LABELS[method]}, lr {lr:g}: held-out"
        losses.plot(held_out[0][0], mean, "o--", color=colour, markersize=4, label=label)
    title = f"loss at each optimizer's best learning rate, {len(seeds)} seeds"
    losses.set(title=title, xlabel="optimizer step", ylabel="masked-LM loss (nats)")
    losses.legend(fontsize=8)

    for method in best:
        entries = [
            e
            for e in figures["final_held_out_loss"].values()
            if (e["method"], e["ranks"]) == (method, ranks) and math.isfinite(e["mean"])
        ]
        bars = [[e["mean"] - e["min"] for e in entries], [e["max"] - e["mean"] for e in entries]]
        rates, means = [e["lr"] for e in entries], [e["mean"] for e in entries]
        sweep.errorbar(rates, means, bars, color=COLOURS[method], marker="o", capsize=3, label=LABELS[method])
    title = "final held-out loss: mean, minimum and maximum over seeds"
    sweep.set(xscale="log", title=title, xlabel="learning rate", ylabel="held-out loss (nats)")
    sweep.set_xticks(rates, [f"{lr:g}" for lr in rates], minor=False)
    sweep.minorticks_off()
    sweep.legend()

    reference = by_job[Job("plain", 1, best["bound"], seeds[0])]["losses"]
    for job, run in sorted(by_job.items()):
        if job.method != "plain" and (job.lr, job.seed) == (best["bound"], seeds[0]):
            difference = [abs(a - b) for a, b in zip(run["losses"], reference, strict=False)]
            line = {1: ":", 2: "-", 3: "--"}.get(job.ranks, "-.")
            label = f"{LABELS[job.method]}, {job.ranks} rank{'s' if job.ranks > 1 else ''}"
            # Losses are recorded to six digits.
            shown = [max(x, 1e-6) for x in difference]
            apart.plot(range(1, len(shown) + 1), shown, line, color=COLOURS[job.method], linewidth=0.9, label=label)
    title = f"training loss, difference from plain LAMB, lr {best['bound']:g}"
    apart.set(yscale="log", title=title, xlabel="optimizer step", ylabel="absolute difference (nats)")
    apart.legend(fontsize=8)
    for axes in (ratios, losses, sweep, apart):
        axes.grid(alpha=0.3)
    canvas.tight_layout()
    canvas.savefig(output)
    plt.close(canvas)


if __name__ == "__main__":
    results = Path(sys.argv[1])
    draw(read_runs(results), json.loads((results / "summary.json").read_text()), results / "lamb_under_zero.png")
