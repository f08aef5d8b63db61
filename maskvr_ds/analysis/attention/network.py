"""A small convolutional network that classifies attention maps, after the rule of patterns.py (Kovaleva et al. 2019,
arXiv:1908.08593, section 4.1, trained theirs on maps labelled by eye).

It is trained where it is used, on the maps of which the rule is sure and on constructed ones, so that every class has
examples: seconds on one core, and the same network for the same maps. It sees maps of any length as images of 32 × 32.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from maskvr_ds.analysis.attention.constructed import noisy
from maskvr_ds.analysis.attention.patterns import CLASSES, Floats, classify_surely

_SIZE = 32
_CONSTRUCTED, _LENGTHS, _NOISE = 200, (8, 128), (0.0, 0.4)
# Maps of a class, of which a model may have thousands.
_MOST = 400
_STEPS, _BATCH, _RATE, _SEED = 600, 64, 3e-3, 0


def image(attention: Floats) -> torch.Tensor:
    """float32 [1, 32, 32] of a map [L, L]: means over cells of log(1 + attention relative to uniform attention's)."""
    relative = torch.from_numpy(np.asarray(attention, np.float32))[None] * len(attention)
    return F.adaptive_avg_pool2d(relative, _SIZE).log1p()


class SureMaps:
    """Collects maps of which the rule is sure, at most 400 of each class, and constructed ones."""

    def __init__(self) -> None:
        self._images: dict[str, list[torch.Tensor]] = {name: [] for name in CLASSES}

    def add(self, attention: Floats) -> None:
        """A map [L, L], if the rule is sure of it."""
        name = classify_surely(attention)
        if name is not None and len(self._images[name]) < _MOST:
            self._images[name].append(image(attention))

    @property
    def counts(self) -> dict[str, int]:
        """Maps of each class; without the constructed ones."""
        return {name: len(images) for name, images in self._images.items()}

    def train(self) -> "MapNetwork":
        """A network trained on these maps and 200 constructed ones of each class."""
        random = np.random.default_rng(_SEED)
        images, labels = [], []
        for number, name in enumerate(CLASSES):
            made = [
                noisy(name, random, int(random.integers(*_LENGTHS)), random.uniform(*_NOISE))
                for _ in range(_CONSTRUCTED)
            ]
            of_class = [*self._images[name], *map(image, made)]
            images += of_class
            labels += [number] * len(of_class)
        return MapNetwork(torch.stack(images), torch.tensor(labels))


class MapNetwork(nn.Module):
    """Three convolutions and a linear map, about 5,000 parameters, on the CPU.

    images: float32 [n, 1, 32, 32]; labels: int64 [n], numbers of CLASSES, with which it is trained.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(_SEED)
            widths = (1, 8, 16, 16)
            convolutions = [
                layer
                for before, after in itertools.pairwise(widths)
                for layer in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            ]
            self.layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * (_SIZE // 8) ** 2, len(CLASSES)))
            self._train(images, labels)
        self.eval().requires_grad_(False)

    def _train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Every class weighs the same."""
        weights = len(labels) / (len(CLASSES) * labels.bincount(minlength=len(CLASSES)).clamp(min=1))
        optimizer = torch.optim.AdamW(self.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
        for _ in range(_STEPS):
            chosen = torch.randint(len(labels), (_BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(self.layers(images[chosen]), labels[chosen], weight=weights.float()).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def classify(self, attention: Floats) -> str:
        """One of CLASSES for a map [L, L]."""
        return CLASSES[int(self.layers(image(attention)[None]).argmax())]


def train_on(maps: Iterable[Floats]) -> MapNetwork:
    """See `SureMaps`."""
    sure = SureMaps()
    for attention in maps:
        sure.add(attention)
    return sure.train()
