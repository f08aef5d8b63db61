"""Rows of the table that no encoder is needed for: the majority class, and a bag of words.

Their predictions have the form of a fine-tuned model's. Both are deterministic; the bag of words chooses its strength
of regularisation on the same held-out part of the training set as models their learning rate.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.metrics import score
from maskvr_ds.downstream.squad_scoring import normalise, true_answers
from maskvr_ds.downstream.tasks import Kind, Task, TaskError

MAJORITY, BAG_OF_WORDS = "majority", "bag of words"
# A word, or a punctuation mark.
TOKEN_PATTERN = r"(?u)\b\w+\b|[^\w\s]"
# Inverse strengths of L2 regularisation.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
_ITERATIONS = 1000
# Of the cosines on the held-out part: bounds that are tried.
_QUANTILES = np.linspace(0.05, 0.95, 19)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Predictions = dict[str, list[Any]]


def targets(task: Task, labels: Sequence[str], split: Split) -> list[Any]:
    """Labels in the form of predictions: class indices, numbers, or tags; of questions the true answers' texts."""
    if task.kind is Kind.SPAN:
        return [true_answers([text for text, _ in answers], unanswerable=task.unanswerable) for answers in split.labels]
    if task.kind is Kind.CLASSIFICATION:
        index = {name: i for i, name in enumerate(labels)}
        return [index[label] for label in split.labels]
    return list(split.labels)


def main_score(task: Task, truth: Sequence[Any], predicted: Sequence[Any]) -> float:
    """The mean of the task's metrics: what learning rates and strengths are chosen by."""
    return float(np.mean([score(name, truth, predicted) for name in task.metrics]))


def majority(data: TaskData) -> Predictions:
    """The most frequent class of the training set; the mean of a regression; the most frequent tag, or answer."""
    task = data.task
    truth = targets(task, data.labels, data.train)
    if task.kind is Kind.REGRESSION:
        mean = float(np.mean(truth))
        return {name: [mean] * len(split) for name, split in data.dev.items()}
    if task.kind is Kind.TOKENS:
        ((tag, _),) = Counter(tag for tags in truth for tag in tags).most_common(1)
        return {name: [[tag] * len(tags) for tags in split.labels] for name, split in data.dev.items()}
    if task.kind is Kind.SPAN:
        truth = [normalise(answers[0]) for answers in truth]
    ((label, _),) = Counter(truth).most_common(1)
    return {name: [label] * len(split) for name, split in data.dev.items()}


def needs_held_out(task: Task) -> bool:
    """Whether `bag_of_words` chooses something on the held-out part of the training set."""
    return task.kind in (Kind.CLASSIFICATION, Kind.REGRESSION) or task.unanswerable


def bag_of_words(data: TaskData) -> tuple[Predictions, float | None]:
    """Predictions, and the strength that was chosen on the held-out part of the training set.

    TF–IDF of words and word pairs with logistic or ridge regression; of two texts a and b, the features are a, b,
    |a−b|, a·b and their cosine. For token tasks: each word's most frequent tag in the training set, and no strength.
    For questions: the context's sentence with the highest cosine of TF–IDF, and the cosine below which there is no
    answer, chosen likewise; None if every question has one.
    """
    task = data.task
    if task.kind is Kind.TOKENS:
        return _tag_of_words(data), None
    if task.kind is Kind.SPAN:
        return _nearest_sentences(data)
    return choose_linear(data, lambda train: _vectoriser(task, train, (1, 2)))


def choose_linear(data: TaskData, vectorise: Callable[[Split], Any]) -> tuple[Predictions, float]:
    """Predictions of a linear model on features of words, and its strength of regularisation.

    vectorise: of a training set, → an object with `transform`, texts → sparse [n, V]. It is called without the held-out
    part, on which the strength is chosen, and then with the complete training set.
    """
    fit, held_out = hold_out(data.train, data.task)
    truth = targets(data.task, data.labels, held_out)
    words = vectorise(fit)
    predicted = {c: _linear(data, words, fit, {"held out": held_out}, c)["held out"] for c in _STRENGTHS}
    scores = {c: main_score(data.task, truth, found) for c, found in predicted.items()}
    best = max(_STRENGTHS, key=lambda c: (scores[c], -c))
    return _linear(data, vectorise(data.train), data.train, data.dev, best), best


def _linear(data: TaskData, words: Any, train: Split, evaluate: dict[str, Split], strength: float) -> Predictions:
    if data.task.kind is Kind.REGRESSION:
        model = Ridge(alpha=1 / strength)
    else:
        model = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        # Of weak regularisation; the held-out part judges the result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(_features(words, train), targets(data.task, data.labels, train))
    return {name: model.predict(_features(words, split)).tolist() for name, split in evaluate.items()}


def _vectoriser(task: Task, train: Split, ngrams: tuple[int, int]) -> TfidfVectorizer:
    words = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True, token_pattern=TOKEN_PATTERN)
    return fitted(words, task, train)


def fitted(words: TfidfVectorizer, task: Task, train: Split) -> TfidfVectorizer:
    """The vectoriser, fitted on the training texts. Raises TaskError if they have no word."""
    try:
        return words.fit([text for texts in train.texts for text in texts])
    except ValueError:
        raise TaskError(f"{task.name}: the training texts have no word") from None


def _features(words: Any, split: Split) -> Any:
    """Sparse matrix [n, features]. words: has `transform`, texts → sparse [n, V]."""
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


def _nearest_sentences(data: TaskData) -> tuple[Predictions, float | None]:
    words = _vectoriser(data.task, data.train, (1, 1))
    minimum = None
    if data.task.unanswerable:
        _, held_out = hold_out(data.train, data.task)
        found, truth = _nearest(words, held_out), targets(data.task, data.labels, held_out)
        scores = {
            bound: main_score(data.task, truth, _above(found, bound))
            for bound in (0.0, *np.quantile([cosine for _, cosine in found], _QUANTILES).tolist(), 2.0)
        }
        minimum = max(scores, key=lambda bound: (scores[bound], -bound))
    return {name: _above(_nearest(words, split), minimum) for name, split in data.dev.items()}, minimum


def _nearest(words: TfidfVectorizer, split: Split) -> list[tuple[str, float]]:
    """The sentence of each context that is nearest to the question, and the cosine."""
    sentences = {context: _SENTENCE_END.split(context.strip()) for _, context in split.texts}
    vectors = {context: words.transform(found) for context, found in sentences.items()}
    found = []
    for (_, context), question in zip(split.texts, words.transform([q for q, _ in split.texts]), strict=True):
        cosines = (vectors[context] @ question.T).toarray()[:, 0]
        best = int(cosines.argmax())
        found.append((sentences[context][best], float(cosines[best])))
    return found


def _above(found: Sequence[tuple[str, float]], minimum: float | None) -> list[str]:
    return [sentence if minimum is None or cosine >= minimum else "" for sentence, cosine in found]
