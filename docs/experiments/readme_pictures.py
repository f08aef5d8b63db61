"""Draw the two pictures of the README: losses of a demo run, trust ratios under ZeRO.

    make demo
    python docs/experiments/readme_pictures.py --run demo_run/run --unigram-entropy 6.136

The trust ratios are those of docs/results/lamb_under_zero/runs.jsonl (lamb_under_zero.py): 2 ranks, seed 0, lr 0.0125.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
RUNS = ROOT / "docs" / "results" / "lamb_under_zero" / "runs.jsonl"
COLOURS = {"matrices": "tab:blue", "LayerNorm weights": "tab:green", "biases": "tab:olive"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kind_of(name: str) -> str:
    if name.endswith("LayerNorm.weight"):
        return "LayerNorm weights"
    return "biases" if name.endswith("bias") else "matrices"


def draw_loss(run: Path, entropy: float, output: Path) -> None:
    lines = [line for line in read(run / "metrics.jsonl") if "loss" in line]
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=120)
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], linewidth=0.8, alpha=0.7, label="training loss")
    held_out = [(x["step"], x["held_out_loss"]) for x in lines if "held_out_loss" in x]
    axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held-out loss")
    axes.axhline(entropy, color="grey", linestyle="--", linewidth=0.8, label=f"unigram entropy {entropy:.2f}")
    axes.axvline(200, color="tab:red", linestyle=":", linewidth=1.2, label="resumed after SIGKILL from here")
    axes.set(xlabel="step", ylabel="nats per masked token", title="make demo: two CPU cores, about three minutes")
    finish(figure, axes, output)


def draw_trust_ratios(output: Path) -> None:
    chosen = {run["method"]: run for run in read(RUNS) if (run["ranks"], run["lr"], run["seed"]) == (2, 0.0125, 0)}
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=120)
    bound, unaware = chosen["bound"], chosen["unaware"]
    for name, values in bound["ratios"].items():
        axes.plot(bound["ratio_steps"], values, color=COLOURS[kind_of(name)], linewidth=0.6, alpha=0.7)
    for kind, colour in COLOURS.items():
        axes.plot([], [], color=colour, label=f"maskvr_ds, one per tensor: {kind}")
    for number, values in enumerate(unaware["ratios"].values()):
        label = "LAMB unaware of ZeRO: one per partition" if number == 0 else None
        axes.plot(unaware["ratio_steps"], values, color="tab:red", linewidth=2.2, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="trust ratio", title="LAMB's trust ratios, ZeRO-2 on two ranks")
    finish(figure, axes, output)


def finish(figure: Any, axes: Any, output: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of a demo; without it only the trust ratios are drawn")
    parser.add_argument("--unigram-entropy", type=float, default=6.136, help="as printed by the demo")
    arguments = parser.parse_args()
    if arguments.run is not None:
        draw_loss(arguments.run, arguments.unigram_entropy, IMAGES / "demo_loss.png")
    draw_trust_ratios(IMAGES / "trust_ratios.png")


if __name__ == "__main__":
    main()
