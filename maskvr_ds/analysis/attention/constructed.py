"""Attention maps of known classes, made of pure patterns and noise. Not by the features of the rule."""

import numpy as np

Floats = np.ndarray


def _normal(values: Floats) -> Floats:
    return values / values.sum(1, keepdims=True)


def vertical(random: np.random.Generator, length: int) -> Floats:
    columns = random.choice(length, random.integers(1, 3), replace=False)
    weights = np.zeros((length, length))
    weights[:, columns] = random.dirichlet(np.full(len(columns), 5.0)) * random.lognormal(0, 0.2, (length, 1))
    return _normal(weights)


def diagonal(random: np.random.Generator, length: int) -> Floats:
    offset, width = random.integers(-2, 3), random.uniform(0.2, 0.8)
    places = np.arange(length)
    return _normal(np.exp(-0.5 * ((places - places[:, None] - offset) / width) ** 2) + 1e-12)


def both(random: np.random.Generator, length: int) -> Floats:
    share = random.uniform(0.4, 0.6)
    return share * vertical(random, length) + (1 - share) * diagonal(random, length)


def block(random: np.random.Generator, length: int) -> Floats:
    parts = 2 if length < 32 else random.integers(2, 4)
    ends = np.cumsum(random.dirichlet(np.full(parts, 40.0)) * length).round().astype(int)
    number = np.searchsorted(ends[:-1], np.arange(length), side="right")
    return _normal((number[:, None] == number) * random.lognormal(0, 0.3, (length, length)))


def heterogeneous(random: np.random.Generator, length: int) -> Floats:
    return random.dirichlet(np.full(length, random.uniform(0.05, 2.0)), length)


MAKERS = {
    "vertical": vertical,
    "diagonal": diagonal,
    "vertical + diagonal": both,
    "block": block,
    "heterogeneous": heterogeneous,
}


def noisy(name: str, random: np.random.Generator, length: int, noise: float) -> Floats:
    """(1 − noise) × the pattern + noise × random attention."""
    background = random.dirichlet(np.full(length, 0.5), length)
    return (1 - noise) * MAKERS[name](random, length) + noise * background
