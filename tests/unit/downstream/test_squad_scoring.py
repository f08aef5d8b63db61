"""Exact match and F1 of answers: known values by hand, and equality with a second implementation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.downstream.metrics import METRICS, score
from maskvr_ds.downstream.squad_scoring import exact_match, f1, normalise, true_answers
from tests.reference import squad as reference

# True answers, prediction, exact match, and F1 as (words in common, words of both) in 1.1 and 2.0.
CASES: list[tuple[list[str], str, int, tuple[int, int]]] = [
    (["Paris"], "Paris", 1, (1, 2)),
    (["Paris"], "paris", 1, (1, 2)),
    (["Paris"], "PARIS", 1, (1, 2)),
    (["Paris"], "London", 0, (0, 2)),
    (["Paris"], " Paris ", 1, (1, 2)),
    (["Paris"], "\tParis\n", 1, (1, 2)),
    # Articles.
    (["the Eiffel Tower"], "Eiffel Tower", 1, (2, 4)),
    (["Eiffel Tower"], "The Eiffel Tower", 1, (2, 4)),
    (["an apple"], "a apple", 1, (1, 2)),
    (["a man and the sea"], "man and sea", 1, (3, 6)),
    (["theory"], "the ory", 0, (0, 2)),
    (["another"], "an other", 0, (0, 2)),
    (["Vitamin A"], "vitamin", 1, (1, 2)),
    (["A."], "Vitamin A", 0, (0, 1)),
    (["A the"], "an", 1, (0, 0)),
    (["the 1990s"], "1990s", 1, (1, 2)),
    (["Los Angeles"], "the Los the Angeles", 1, (2, 4)),
    (["thea"], "the a", 0, (0, 1)),
    # Punctuation: removed, not replaced by a space.
    (["U.S."], "US", 1, (1, 2)),
    (["U.S."], "U S", 0, (0, 3)),
    (["well-known"], "wellknown", 1, (1, 2)),
    (["well-known"], "well known", 0, (0, 3)),
    (["$1,000"], "1000", 1, (1, 2)),
    (["50%"], "50", 1, (1, 2)),
    (["3.5"], "35", 1, (1, 2)),
    (["'Hello'"], "hello", 1, (1, 2)),
    (['"The Wall"'], "Wall", 1, (1, 2)),
    (["it's"], "its", 1, (1, 2)),
    (["a_b"], "ab", 1, (1, 2)),
    (["the-end"], "end", 0, (0, 2)),  # becomes "theend", which is no article
    (["(1965)"], "1965", 1, (1, 2)),
    (["rock & roll"], "rock roll", 1, (2, 4)),
    (["C++"], "C", 1, (1, 2)),
    (["A-ha"], "aha", 1, (1, 2)),
    (["a.m."], "am", 1, (1, 2)),
    (["..."], "!", 1, (0, 0)),
    # White space.
    (["New  York"], "New York", 1, (2, 4)),
    (["New\u00a0York"], "New York", 1, (2, 4)),
    (["New\u2003York"], "New York", 1, (2, 4)),
    (["New York"], "NewYork", 0, (0, 3)),
    (["New\u200bYork"], "New York", 0, (0, 3)),  # a zero-width space is none
    # Unicode: only ASCII punctuation is removed, and nothing is decomposed.
    (["Beyoncé"], "beyoncé", 1, (1, 2)),
    (["Beyoncé"], "Beyonce", 0, (0, 2)),
    (["ÉCOLE"], "école", 1, (1, 2)),
    (["caf\u00e9"], "cafe\u0301", 0, (0, 2)),
    (["Straße"], "STRASSE", 0, (0, 2)),
    (["“Wall”"], "Wall", 0, (0, 2)),
    (["1939–1945"], "19391945", 0, (0, 2)),
    (["1939-1945"], "19391945", 1, (1, 2)),
    (["東京"], "東京", 1, (1, 2)),
    (["東京都"], "東京", 0, (0, 2)),
    (["a–b"], "–b", 1, (1, 2)),  # the en dash ends the word "a"
    (["Москва"], "МОСКВА", 1, (1, 2)),
    (["5 µm"], "5 μm", 0, (1, 4)),  # micro sign and mu
    (["½"], "1/2", 0, (0, 2)),
    (["e\u0301a"], "e\u0301", 1, (1, 2)),  # a combining accent is no letter: "a" is a word
    # Words in common, with repetitions.
    (["the cat sat on the mat"], "cat on mat", 0, (3, 7)),
    (["New York City"], "New York", 0, (2, 5)),
    (["New York"], "York New", 0, (2, 4)),
    (["ha ha ha"], "ha", 0, (1, 4)),
    (["ha"], "ha ha ha", 0, (1, 4)),
    (["ha ha"], "ha ha ha", 0, (2, 5)),
    (["one two"], "two three", 0, (1, 4)),
    (["10 July 1856"], "1856", 0, (1, 4)),
    # Several true answers: the best one counts.
    (["Rome", "Paris"], "Paris", 1, (1, 2)),
    (["Rome", "Paris France"], "Paris", 0, (1, 3)),
    (["in Paris France", "Paris France"], "Paris", 0, (1, 3)),
    (["Rome", "Rome", "Rome"], "Paris", 0, (0, 2)),
    (["July", "10 July 1856", "1856"], "10 July", 0, (1, 3)),  # 2/3, and 4/5 of the second: see below
]
# (True answers, prediction, exact match, F1) by the rules of 2.0 only.
NO_ANSWER: list[tuple[list[str], str, int, float]] = [
    ([], "", 1, 1.0),
    ([], "Paris", 0, 0.0),
    ([], "the", 1, 1.0),
    ([], "?!", 1, 1.0),
    ([], "\u200b", 0, 0.0),
    (["Paris"], "", 0, 0.0),
    (["Paris"], "the", 0, 0.0),
    (["the"], "", 1, 1.0),  # normalises to "no answer"
    (["the", "Paris"], "", 0, 0.0),  # … which is ignored beside another
    (["the", "Paris"], "a", 0, 0.0),
    (["...", "Paris"], "Paris", 1, 1.0),
    ([""], "Paris", 0, 0.0),
]


@pytest.mark.parametrize(("truth", "predicted", "exact", "words"), CASES)
def test_by_hand(truth: list[str], predicted: str, exact: int, words: tuple[int, int]) -> None:
    common, both = words
    expected = 2 * common / both if common else 0.0
    if truth[0] == "July":
        expected = 4 / 5
    assert exact_match(truth, predicted) == exact
    assert f1(truth, predicted, unanswerable=False) == pytest.approx(expected)
    # 2.0 differs where nothing is left on both sides.
    assert f1(truth, predicted, unanswerable=True) == pytest.approx(expected if both else 1.0)


@pytest.mark.parametrize(("texts", "predicted", "exact", "f"), NO_ANSWER)
def test_no_answer(texts: list[str], predicted: str, exact: int, f: float) -> None:
    truth = true_answers(texts, unanswerable=True)
    assert exact_match(truth, predicted) == exact
    assert f1(truth, predicted, unanswerable=True) == f


def test_there_are_sixty_cases() -> None:
    assert len({(tuple(truth), predicted) for truth, predicted, *_ in CASES + NO_ANSWER}) >= 60


def test_normalisation_is_idempotent_without_articles() -> None:
    assert normalise("  The U.S.A.,  a  'Union'! ") == "usa union"


TEXT = st.text(st.sampled_from("aAnthe THE.,-'_ \u00a0é\u0301ß½–東\n1"), max_size=12)


@given(st.lists(TEXT, max_size=4), TEXT, st.sampled_from([1, 2]))
def test_equal_to_the_reference(golds: list[str], predicted: str, version: int) -> None:
    golds = golds or ([] if version == 2 else ["x"])
    truth = true_answers(golds, unanswerable=version == 2)
    found = exact_match(truth, predicted), f1(truth, predicted, unanswerable=version == 2)
    assert found == pytest.approx(reference.question_scores(golds, predicted, version))


@given(st.text(max_size=20), st.text(max_size=20))
def test_equal_to_the_reference_on_any_text(gold: str, predicted: str) -> None:
    assert normalise(gold).split() == reference.words(gold)
    assert exact_match([gold], predicted) == reference.exact(gold, predicted)


@pytest.mark.parametrize(("metric", "version"), [("squad_f1", 1), ("squad_v2_f1", 2)])
def test_two_thousand_questions(metric: str, version: int) -> None:
    """Means over questions, and over repeated ones."""
    random = np.random.default_rng(version)
    vocabulary = np.array(["the", "a", "New", "York", "new", "York.", "1,000", "1000", "é", "-", "Paris"])
    draw = lambda: " ".join(random.choice(vocabulary, random.integers(0, 4)))  # noqa: E731
    golds = [[draw() for _ in range(random.integers(version == 1, 4))] for _ in range(2000)]
    predicted = [draw() for _ in range(2000)]
    truth = [true_answers(answers, unanswerable=version == 2) for answers in golds]
    expected = np.array([reference.question_scores(g, p, version) for g, p in zip(golds, predicted, strict=True)])
    assert 0.05 < expected[:, 0].mean() < 0.95
    for column, name in enumerate(("exact_match", metric)):
        assert score(name, truth, predicted) == pytest.approx(expected[:, column].mean(), abs=1e-12)
        weights = random.multinomial(2000, np.full(2000, 1 / 2000), size=3).astype(float)
        found = METRICS[name](truth, predicted, weights)
        assert found == pytest.approx(weights @ expected[:, column] / 2000, abs=1e-12)
