"""Exact match and F1 of answers, by the rules of SQuAD's evaluation scripts (Rajpurkar et al. 2016, 2018).

Answers are compared after normalisation: lower case, without ASCII punctuation, without the words a, an and the, and
with single spaces. A question's score is the maximum over its true answers. F1 is that of the words, counted with their
repetitions. In 2.0 a question without an answer has the true answer "", true answers that normalise to "" are ignored
if there are others, and with "" on either side F1 is 1 if both are "", else 0; in 1.1 F1 is 0 then.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# A bootstrap scores the same answers again and again.
@lru_cache(maxsize=200_000)
def normalise(answer: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def true_answers(texts: Sequence[str], *, unanswerable: bool) -> tuple[str, ...]:
    """The answers that a prediction is compared with. texts: of the file. unanswerable: by the rules of 2.0."""
    if not unanswerable:
        return tuple(texts)
    return tuple(text for text in texts if normalise(text)) or ("",)


def exact_match(truth: Sequence[str], predicted: str) -> float:
    """1 if a true answer equals the predicted one, else 0."""
    return float(any(normalise(answer) == normalise(predicted) for answer in truth))


def f1(truth: Sequence[str], predicted: str, *, unanswerable: bool) -> float:
    """Maximum F1 of the words of a true answer and the predicted one."""
    return max(_f1(normalise(answer).split(), normalise(predicted).split(), unanswerable) for answer in truth)


def _f1(truth: list[str], predicted: list[str], unanswerable: bool) -> float:
    if unanswerable and not (truth and predicted):
        return float(truth == predicted)
    common = (Counter(truth) & Counter(predicted)).total()
    return 2 * common / (len(truth) + len(predicted)) if common else 0.0
