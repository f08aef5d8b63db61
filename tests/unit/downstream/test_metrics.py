"""Metrics: equal to scikit-learn and scipy, to values by hand, and under weights to those of the repeated examples."""

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.downstream.metrics import METRICS, entities, score
from tests.reference.metrics import REFERENCE

# Those of answers to questions: test_squad_scoring.py.
assert set(METRICS) - set(REFERENCE) == {"exact_match", "squad_f1", "squad_v2_f1"}
TAGS = ("O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y")


def random_case(name: str, random: np.random.Generator, n: int) -> tuple[list[Any], list[Any]]:
    """Truth and predictions; numbers with ties, classes that may be missing on one side."""
    if name == "entity_f1":
        lengths = random.integers(1, 6, n)
        draw = lambda: [[TAGS[i] for i in random.integers(len(TAGS), size=length)] for length in lengths]  # noqa: E731
        return draw(), draw()
    if name in ("pearson", "spearman"):
        truth = random.integers(0, 6, n) / 2
        return truth.tolist(), (np.round(truth + random.normal(size=n), 1) * 1e3 + 1e6).tolist()
    classes = 2 if name == "f1" else random.integers(2, 5)
    return random.integers(classes, size=n).tolist(), random.integers(classes, size=n).tolist()


@pytest.mark.parametrize("name", REFERENCE)
def test_equal_to_the_reference(name: str) -> None:
    """2,000 random predictions, and as many cases of at most 8 examples, where zeros and ties are frequent."""
    random = np.random.default_rng(0)
    for n in (2000, *random.integers(1, 9, 200)):
        truth, predicted = random_case(name, random, int(n))
        if name in ("pearson", "spearman") and n < 2:
            continue  # scipy raises
        assert score(name, truth, predicted) == pytest.approx(REFERENCE[name](truth, predicted), abs=1e-9), (n, truth)


@pytest.mark.parametrize("name", REFERENCE)
def test_weights_repeat_examples(name: str) -> None:
    random = np.random.default_rng(1)
    for _ in range(30):
        truth, predicted = random_case(name, random, 12)
        weights = random.multinomial(12, np.full(12, 1 / 12), size=4)
        found = METRICS[name](truth, predicted, weights.astype(float))
        for value, counts in zip(found, weights, strict=True):
            repeated = [i for i, count in enumerate(counts) for _ in range(count)]
            expected = REFERENCE[name]([truth[i] for i in repeated], [predicted[i] for i in repeated])
            assert value == pytest.approx(expected, abs=1e-9)


def test_by_hand() -> None:
    # True positives 2, false positives 1, false negatives 1, true negatives 1.
    truth, predicted = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert score("accuracy", truth, predicted) == pytest.approx(3 / 5)
    assert score("f1", truth, predicted) == pytest.approx(4 / 6)
    assert score("matthews", truth, predicted) == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert score("macro_f1", truth, predicted) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert score("pearson", [1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    # Ranks 1, 2.5, 2.5 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert score("spearman", [0, 7, 7], [1, 10, 100]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman", "entity_f1"])
def test_a_constant_prediction_is_worth_nothing(name: str) -> None:
    truth: list[Any] = [["B-X"], ["O"], ["S-X"]] if name == "entity_f1" else [1, 0, 1]
    predicted: list[Any] = (
        [["O"]] * 3 if name == "entity_f1" else [0.1] * 3 if name in ("pearson", "spearman") else [0] * 3
    )
    assert score(name, truth, predicted) == 0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-X I-X O", [("X", 0, 1)]),
        ("I-X I-X B-X", [("X", 0, 1), ("X", 2, 2)]),  # IOB1: B only between neighbours
        ("B-X I-Y", [("X", 0, 0), ("Y", 1, 1)]),
        ("B-X E-X S-X O S-Y", [("X", 0, 1), ("X", 2, 2), ("Y", 4, 4)]),
        ("B-X E-X I-X", [("X", 0, 1), ("X", 2, 2)]),
        ("O O", []),
        ("B-A-B I-A-B", [("A-B", 0, 1)]),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_entities_of_all_short_sentences() -> None:
    """Every pair of sentences of two tags, against the one-pass count of conlleval."""
    for truth in itertools.product(TAGS, repeat=2):
        for predicted in itertools.product(TAGS, repeat=2):
            assert score("entity_f1", [truth], [predicted]) == pytest.approx(
                REFERENCE["entity_f1"]([truth], [predicted])
            )


@given(st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=7), min_size=1, max_size=4))
def test_entities_partition_what_is_not_o(sentences: list[list[str]]) -> None:
    for tags in sentences:
        covered = [i for _, first, last in entities(tags) for i in range(first, last + 1)]
        assert covered == [i for i, tag in enumerate(tags) if tag != "O"]


def test_many_classes_need_little_memory() -> None:
    """A table of all pairs of 2,000 classes would have 32 MB per resample."""
    n, classes = 4000, 2000
    truth = [i % classes for i in range(n)]
    predicted = [i // 2 % classes for i in range(n)]
    tracemalloc.start()
    try:
        found = METRICS["macro_f1"](truth, predicted, np.ones((50, n)))
        METRICS["matthews"](truth, predicted, np.ones((50, n)))
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert found == pytest.approx(REFERENCE["macro_f1"](truth, predicted), abs=1e-9)
