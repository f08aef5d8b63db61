"""Attention maps of a real model, labelled by eye, against the rule of `maskvr attention`.

    python docs/experiments/real_maps.py draw --model all-MiniLM-L6-v2 --sheets DIR
    python docs/experiments/real_maps.py table
    python docs/experiments/real_maps.py network

`draw` chooses 200 maps of five sentences (the same ones each time), writes them to
docs/results/attention/real_maps.npz, and contact sheets of 25 maps each, which show a map's number and nothing of what
the rule says. `table` compares the labels in docs/results/attention/labels.json with the rule, `network` with the
network of `maskvr attention --classifier network`, trained, as there, on the maps of which the rule is sure; it sees no
label. They need no model. The rule's thresholds, and the noise of the network's constructed maps, were chosen on the
maps with even numbers; those with odd ones test them.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskvr_ds.analysis.attention.patterns import CLASSES, classify

RESULTS = Path(__file__).parents[1] / "results/attention"
MAPS, LABELS = RESULTS / "real_maps.npz", RESULTS / "labels.json"
SENTENCES = (
    "The committee did not publish its report until the following spring, although most members had read it.",
    "She opened the window, looked at the empty street, and closed it again without a word.",
    "A ship that leaves the harbour at noon reaches the island before the sun has set; at night, the crossing takes "
    "longer, because the captain keeps away from the rocks.",
    "Water boils at a lower temperature on a mountain than at sea level. Pressure falls with height.",
    "In 1911 the two brothers sold the factory, bought a farm near the river, and never spoke about engines again.",
)
COUNT, PER_SHEET = 200, 25


def draw(model: str, sheets: Path) -> None:
    """Compute, choose, store and draw the maps."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    encoder = AutoModel.from_pretrained(model, local_files_only=True, attn_implementation="eager").eval()
    found: list[tuple[int, int, int, np.ndarray]] = []
    for number, sentence in enumerate(SENTENCES):
        with torch.no_grad():
            weights = encoder(**tokenizer(sentence, return_tensors="pt"), output_attentions=True).attentions
        for layer, maps in enumerate(weights):
            found += [(number, layer, head, a.numpy().astype(np.float16)) for head, a in enumerate(maps[0])]
    chosen = np.random.default_rng(0).permutation(len(found))[:COUNT]
    places = np.array([found[i][:3] for i in chosen], dtype=np.int16)
    maps = {f"map{n}": found[i][3] for n, i in enumerate(chosen)}
    np.savez_compressed(MAPS, places=places, **maps)
    sheets.mkdir(parents=True, exist_ok=True)
    for first in range(0, COUNT, PER_SHEET):
        _sheet([maps[f"map{n}"] for n in range(first, first + PER_SHEET)], first, sheets / f"sheet{first:03d}.png")


def _sheet(maps: list[np.ndarray], first: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(5, 5, figsize=(15, 15.6), dpi=80, layout="constrained")
    for number, (axes, attention) in enumerate(zip(panels.flat, maps, strict=True), first):
        axes.imshow(attention.astype(float), cmap="viridis", vmin=0, vmax=max(0.3, float(attention.max())))
        axes.set_title(str(number), fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)
    plt.close(figure)


def read() -> tuple[list[np.ndarray], list[str], list[dict[str, Any]]]:
    """Maps [L, L] float64 with rows that sum to 1, labels by eye, and entries with sentence, layer and head."""
    content = json.loads(LABELS.read_text(encoding="utf-8"))
    stored = np.load(MAPS)
    maps = [stored[f"map{n}"].astype(np.float64) for n in range(len(content["labels"]))]
    return [a / a.sum(1, keepdims=True) for a in maps], [e["label"] for e in content["labels"]], content["labels"]


def confusion(
    first: int = 0, step: int = 1, classifier: Callable[[np.ndarray], str] = classify
) -> tuple[np.ndarray, float]:
    """Counts by label (rows) and classifier (columns), in the order of CLASSES, and the share that agrees; of every
    `step`-th map from `first` on."""
    maps, labels, _ = read()
    counts = Counter(zip(labels[first::step], map(classifier, maps[first::step]), strict=True))
    table = np.array([[counts[label, rule] for rule in CLASSES] for label in CLASSES])
    return table, float(np.trace(table) / table.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--model", required=True)
    drawing.add_argument("--sheets", required=True, type=Path)
    commands.add_parser("table")
    commands.add_parser("network")
    arguments = parser.parse_args()
    if arguments.command == "draw":
        draw(arguments.model, arguments.sheets)
        return
    classifier, by = classify, "rule"
    if arguments.command == "network":
        from maskvr_ds.analysis.attention.network import train_on

        classifier, by = train_on(read()[0]).classify, "network"
    table, agreement = confusion(classifier=classifier)
    print(f"| by eye \\ {by} | " + " | ".join(CLASSES) + " | agrees |\n|---|" + "---:|" * (len(CLASSES) + 1))
    for name, row in zip(CLASSES, table, strict=True):
        share = f"{row[CLASSES.index(name)] / row.sum():.0%}" if row.sum() else "–"
        print(f"| {name} | " + " | ".join(map(str, row)) + f" | {share} |")
    even, odd = confusion(0, 2, classifier)[1], confusion(1, 2, classifier)[1]
    print(f"\n{agreement:.1%} of {table.sum()} maps; even numbers {even:.1%}, odd numbers {odd:.1%}")


if __name__ == "__main__":
    main()
