"""Rows of the table that no encoder is needed for: the majority class, and a bag of words.

Their predictions have the form of a fine-tuned model's. Both are deterministic; the bag of words chooses its strength
of regularisation on the same held-out part of the training set as models their learning rate.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.metrics import score
from maskvr_ds.downstream.tasks import Kind, Task, TaskError

MAJORITY, BAG_OF_WORDS = "majority", "bag of words"
# Inverse strengths of L2 regularisation.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
_ITERATIONS = 1000

Predictions = dict[str, list[Any]]


def targets(task: Task, labels: Sequence[str], split: Split) -> list[Any]:
    """Labels in the form of predictions: class indices, numbers, or tags."""
    if task.kind is Kind.CLASSIFICATION:
        index = {name: i for i, name in enumerate(labels)}
        return [index[label] for label in split.labels]
    return list(split.labels)


def main_score(task: Task, truth: Sequence[Any], predicted: Sequence[Any]) -> float:
    """The mean of the task's metrics: what learning rates and strengths are chosen by."""
    return float(np.mean([score(name, truth, predicted) for name in task.metrics]))


def majority(data: TaskData) -> Predictions:
    """The most frequent class of the training set; the mean of a regression; the most frequent tag."""
    task = data.task
    truth = targets(task, data.labels, data.train)
    if task.kind is Kind.REGRESSION:
        mean = float(np.mean(truth))
        return {name: [mean] * len(split) for name, split in data.dev.items()}
    if task.kind is Kind.TOKENS:
        ((tag, _),) = Counter(tag for tags in truth for tag in tags).most_common(1)
        return {name: [[tag] * len(tags) for tags in split.labels] for name, split in data.dev.items()}
    ((label, _),) = Counter(truth).most_common(1)
    return {name: [label] * len(split) for name, split in data.dev.items()}


def bag_of_words(data: TaskData) -> tuple[Predictions, float | None]:
    """Predictions, and the strength that was chosen on the held-out part of the training set.

    TF–IDF of words and word pairs with logistic or ridge regression; of two texts a and b, the features are a, b,
    |a−b|, a·b and their cosine. For token tasks: each word's most frequent tag in the training set, and no strength.
    """
    task = data.task
    if task.kind is Kind.TOKENS:
        return _tag_of_words(data), None
    fit, held_out = hold_out(data.train, task)
    scores = {c: _held_out_score(data, fit, held_out, c) for c in _STRENGTHS}
    best = max(_STRENGTHS, key=lambda c: (scores[c], -c))
    return _linear(data, data.train, data.dev, best), best


def _held_out_score(data: TaskData, fit: Split, held_out: Split, strength: float) -> float:
    predicted = _linear(data, fit, {"held out": held_out}, strength)["held out"]
    return main_score(data.task, targets(data.task, data.labels, held_out), predicted)


def _linear(data: TaskData, train: Split, evaluate: dict[str, Split], strength: float) -> Predictions:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
    try:
        words.fit([text for texts in train.texts for text in texts])
    except ValueError:
        raise TaskError(f"{data.task.name}: the training texts have no word") from None
    if data.task.kind is Kind.REGRESSION:
        model = Ridge(alpha=1 / strength)
    else:
        model = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        # Of weak regularisation; the held-out part judges the result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(_features(words, train), targets(data.task, data.labels, train))
    return {name: model.predict(_features(words, split)).tolist() for name, split in evaluate.items()}


def _features(words: TfidfVectorizer, split: Split) -> Any:
    """Sparse matrix [n, features]."""
    sides = [words.transform(texts) for texts in zip(*split.texts, strict=True)]
    if len(sides) == 1:
        return sides[0]
    a, b = sides
    product = a.multiply(b)
    cosine = sparse.csr_matrix(product.sum(axis=1))
    return sparse.hstack([a, b, abs(a - b), product, cosine], format="csr")


def _tag_of_words(data: TaskData) -> Predictions:
    counts: dict[str, Counter[str]] = {}
    everything: Counter[str] = Counter()
    for tokens, tags in zip(data.train.texts, data.train.labels, strict=True):
        for token, tag in zip(tokens, tags, strict=True):
            counts.setdefault(token, Counter())[tag] += 1
            everything[tag] += 1
    ((unknown, _),) = everything.most_common(1)
    known = {token: tags.most_common(1)[0][0] for token, tags in counts.items()}
    return {
        name: [[known.get(token, unknown) for token in tokens] for tokens in split.texts]
        for name, split in data.dev.items()
    }
