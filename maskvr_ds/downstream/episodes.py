"""N-way K-shot episodes (Vinyals et al. 2016): classes that are trained on, chosen by and evaluated on are disjoint.

An episode draws N classes, and of each K support and Q query examples without replacement. Shapes: N classes, K support
and Q query examples per class. Everything is a function of the examples and of the seed, so that all methods and models
see the same episodes. Loads no torch.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.tasks import TaskError

# Shares of the classes for validation and for the test.
VALIDATION_SHARE, TEST_SHARE = 0.2, 0.3
PARTS = ("train", "validation", "test")
_SHOWN = 5
# First elements of the seeds: of the split, of each class's examples, and of the episodes of a part.
_CLASSES, _EXAMPLES, _EPISODES = 0, 1, 2

logger = logging.getLogger(__name__)
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """Sizes of an episode: ways N, shots K, queries Q per class."""

    ways: int
    shots: int
    queries: int

    @property
    def examples(self) -> int:
        """Per class."""
        return self.shots + self.queries

    @property
    def truth(self) -> Indices:
        """Class of each query, by its place in the episode: int64 [N · Q]."""
        return np.repeat(np.arange(self.ways), self.queries)


@dataclass(frozen=True)
class Episode:
    """support: int64 [N, K], query: int64 [N, Q]: indices of examples, a row per class."""

    support: Indices
    query: Indices


@dataclass(frozen=True)
class Pool:
    """Distinct texts by class. examples: class → int64 [n], indices of its examples in `texts`. parts: train,
    validation, test → names of the classes. removed: repeated texts; rare: classes with too few examples."""

    texts: tuple[str, ...]
    examples: Mapping[str, Indices]
    parts: Mapping[str, tuple[str, ...]]
    removed: int
    rare: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of texts, classes and their split."""
        content = [self.texts, {name: ids.tolist() for name, ids in self.examples.items()}, dict(self.parts)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def episodes(self, part: str, shape: Shape, n: int, seed: int, *, maximum: int | None = None) -> list[Episode]:
        """n episodes over the classes of a part. maximum: of each class, only its first so many examples."""
        random = np.random.default_rng([_EPISODES, PARTS.index(part), seed, shape.ways, shape.shots, shape.queries])
        members = [self.examples[name][:maximum] for name in self.parts[part]]
        return [_draw(members, shape, random) for _ in range(n)]


def _draw(members: Sequence[Indices], shape: Shape, random: np.random.Generator) -> Episode:
    chosen = random.choice(len(members), shape.ways, replace=False)
    drawn = np.stack([random.choice(members[i], shape.examples, replace=False) for i in chosen])
    return Episode(drawn[:, : shape.shots], drawn[:, shape.shots :])


def make_pool(split: Split, *, ways: int, shots: int, queries: int, seed: int, maximum: int, name: str) -> Pool:
    """The pool of a labelled file: a fixed random subset of at most `maximum` examples of each class, the classes
    divided at random: 0.2 of them for validation, 0.3 for the test, the others for training, at least `ways` each.

    Classes are divided that suffice for one shot, so that no class changes its part with the number of shots; then
    those are removed that do not suffice for `shots`. name: of the file. A text that occurs again, with whatever label,
    is removed: it could be support and query of one episode. Raises TaskError if the classes do not suffice.
    """
    if empty := [i for i, texts in enumerate(split.texts) if not texts[0].strip()]:
        raise TaskError(f"{name}: {len(empty):,} texts are empty (the first: example {empty[0] + 1}); remove them")
    labels = set(split.labels)
    if len(labels) == 1:
        raise TaskError(f"{name}: all {len(split):,} examples have the label {min(labels)!r}; episodes need several")
    by_class: dict[str, list[str]] = {}
    seen: set[str] = set()
    for (text,), label in zip(split.texts, split.labels, strict=True):
        if text not in seen:
            seen.add(text)
            by_class.setdefault(label, []).append(text)
    needed = shots + queries
    common = {label for label, texts in by_class.items() if len(texts) >= needed}
    rare = tuple(sorted(labels - common))
    _check_classes(len(labels), len(common), rare, ways=ways, needed=needed, name=name)
    divided = sorted(label for label, texts in by_class.items() if len(texts) > queries)
    parts = _parts(divided, ways, seed)
    for part, names in parts.items():
        parts[part] = tuple(label for label in names if label in common)
        if len(parts[part]) < ways:
            raise TaskError(
                f"{name}: {len(parts[part])} of the {len(names)} classes for {part} have {needed} distinct texts "
                f"(shots + queries), and {ways}-way episodes need {ways}; lower --shots, --queries or --ways, or "
                "choose another --split-seed"
            )
    texts: list[str] = []
    examples: dict[str, Indices] = {}
    for i, label in enumerate(divided):
        if label not in common:
            continue
        order = np.random.default_rng([_EXAMPLES, seed, i]).permutation(len(by_class[label]))[: max(maximum, needed)]
        examples[label] = np.arange(len(texts), len(texts) + len(order))
        texts += [by_class[label][j] for j in order]
    pool = Pool(tuple(texts), examples, parts, len(split) - len(seen), rare)
    if pool.removed:
        logger.warning("%s: %d repeated texts are removed", name, pool.removed)
    if rare:
        logger.warning(
            "%s: %d classes with fewer than %d texts are not used: %s", name, len(rare), needed, ", ".join(rare)
        )
    return pool


def _check_classes(total: int, common: int, rare: Sequence[str], *, ways: int, needed: int, name: str) -> None:
    least = ways * len(PARTS)
    rule = f"{ways}-way episodes need {least}, {ways} each to train, to validate and to test on"
    if total < least:
        raise TaskError(f"{name}: has {total} classes, and {rule}; lower --ways")
    if common < least:
        raise TaskError(
            f"{name}: {common} of {total} classes have {needed} distinct texts (shots + queries), and {rule}; lower "
            f"--ways, --shots or --queries (too few: {', '.join(rare[:_SHOWN])}{', …' * (len(rare) > _SHOWN)})"
        )


def _parts(classes: Sequence[str], ways: int, seed: int) -> dict[str, tuple[str, ...]]:
    order = [classes[i] for i in np.random.default_rng([_CLASSES, seed]).permutation(len(classes))]
    test = max(ways, round(TEST_SHARE * len(order)))
    validation = max(ways, min(round(VALIDATION_SHARE * len(order)), len(order) - test - ways))
    test = min(test, len(order) - validation - ways)
    sizes = len(order) - validation - test, validation, test
    bounds = np.cumsum([0, *sizes]).tolist()
    return {
        part: tuple(sorted(order[low:high])) for part, low, high in zip(PARTS, bounds[:-1], bounds[1:], strict=True)
    }
