"""Pictures of heads: grid by class, scores without each head, example maps. Imports matplotlib when it draws."""

from pathlib import Path
from typing import Any

import numpy as np

from maskvr_ds.analysis.attention.measure import HeadFigures
from maskvr_ds.analysis.attention.patterns import CLASSES

_COLOURS = ("#1f77b4", "#2ca02c", "#17becf", "#ff7f0e", "#dddddd")
# Panels whose width the legend of the classes needs.
_LEGEND_COLUMNS = 3


def draw(figures: dict[str, HeadFigures], increases: np.ndarray | None, output: Path) -> None:
    """Write a PNG. figures: model -> figures, the first of which gives the example maps. increases: of the loss
    without each head of the first model, [N, H]; None if not measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    first = next(iter(figures.values()))
    shown_classes = [name for name in CLASSES if name in first.examples]
    columns = max(len(figures) + (increases is not None), len(shown_classes), _LEGEND_COLUMNS)
    figure, panels = plt.subplots(2, columns, figsize=(3.2 * columns, 7), dpi=110, squeeze=False, layout="constrained")
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (name, found) in zip(panels[0], figures.items(), strict=False):
        numbers = np.array([[CLASSES.index(c) for c in layer] for layer in found.of_heads()])
        axes.imshow(numbers, cmap=ListedColormap(_COLOURS), vmin=-0.5, vmax=len(CLASSES) - 0.5)
        _label(axes, f"class of each head\n{name}", numbers.shape)
    if increases is not None:
        axes = panels[0, len(figures)]
        largest = float(np.nanmax(np.abs(increases))) or 1.0
        shown = axes.imshow(increases, cmap="coolwarm", vmin=-largest, vmax=largest)
        _label(axes, "loss without the head\nminus loss with it (nats)", increases.shape)
        figure.colorbar(shown, ax=axes, shrink=0.7)
    for axes, name in zip(panels[1], shown_classes, strict=False):
        layer, head, attention = first.examples[name]
        axes.imshow(attention, cmap="viridis", vmin=0)
        axes.set_title(f"{name}\nlayer {layer}, head {head}")
    handles = [Patch(color=colour, label=name) for colour, name in zip(_COLOURS, CLASSES, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES))
    figure.savefig(output)
    plt.close(figure)


def _label(axes: Any, title: str, shape: tuple[int, ...]) -> None:
    axes.set_axis_on()
    axes.set_title(title)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(shape[1]))
    axes.set_yticks(range(shape[0]))


def draw_changes(changes: list[list[tuple[float, float, float]]], title: str, output: Path) -> None:
    """Write a PNG: a heat map of changes by layer and head, each (mean, low, high); a dot where the interval does not
    contain 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    means = np.array([[mean for mean, *_ in layer] for layer in changes])
    largest = float(np.abs(means).max()) or 1.0
    figure, axes = plt.subplots(figsize=(1.5 + 0.5 * means.shape[1], 1.5 + 0.5 * means.shape[0]), layout="constrained")
    shown = axes.imshow(means, cmap="coolwarm_r", vmin=-largest, vmax=largest)
    certain = [(h, n) for n, layer in enumerate(changes) for h, (_, low, high) in enumerate(layer) if low * high > 0]
    if certain:
        axes.scatter(*zip(*certain, strict=True), s=12, c="black")
    _label(axes, title, means.shape)
    figure.colorbar(shown, ax=axes)
    figure.savefig(output, dpi=110)
    plt.close(figure)
