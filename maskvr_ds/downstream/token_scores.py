"""`maskvr token-scores`: weights of a tokenizer's tokens on a labelled task, as scores for the masking strategy
`frequency`.

The weights of `term_weights` and `learning_to_weight`, with tokens in place of words. Tokens that the training set does
not have get the median of those that it has; a weight of 0 becomes the smallest positive one, since a score must be
positive.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from maskvr_ds.data.token_scores import write_token_scores
from maskvr_ds.data.vocabulary import read_tokenizer
from maskvr_ds.downstream.baselines import targets
from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.learning_to_weight import learn
from maskvr_ds.downstream.tasks import LEARNING_TO_WEIGHT, Task, TaskError
from maskvr_ds.downstream.term_weights import WEIGHTS, Array, TermCounts
from maskvr_ds.downstream.weighted_words import check_weightable, difference
from maskvr_ds.runtime.files import check_output_file, sha256

_FILE = "tokenizer.json"
# Of a corpus, and of a model.
_FOLDERS = ("tokenizer", ".")
_SHOWN = 10


@dataclass(frozen=True)
class Request:
    """weights: a name of WEIGHTED_ROWS. tokenizer: folder with tokenizer.json. output: file. seed: of `ltw`."""

    task: Task
    data: Path
    tokenizer: Path
    weights: str
    output: Path
    seed: int = 0


def write(request: Request) -> str:
    """Write the table of scores; returns a summary. Raises TaskError, OSError, or ValueError if the tokenizer is
    damaged."""
    check_output_file(request.output, "--output")
    check_weightable(request.task, (request.weights,))
    path = next((found for folder in _FOLDERS if (found := request.tokenizer / folder / _FILE).is_file()), None)
    if path is None:
        raise TaskError(f"--tokenizer {request.tokenizer}: has no {_FILE}; name the folder of a corpus or a model")
    data = read_task(request.task, request.data)
    tokenizer = read_tokenizer(path.parent)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    weights, seen = token_weights(data, tokenizer, request.weights, request.seed)
    origin = {"weights": request.weights, "task": request.task.name, "data": str(request.data), "seed": request.seed}
    write_token_scores(request.output, positive(weights, seen), sha256(path), origin)
    highest = [str(tokenizer.id_to_token(int(i))) for i in np.argsort(-np.where(seen, weights, -1))[:_SHOWN]]
    return (
        f"{request.output}: scores of {len(weights):,} tokens, of which the training set has {int(seen.sum()):,}; "
        f"highest: {' '.join(highest)}\n"
    )


def token_weights(data: TaskData, tokenizer: Any, name: str, seed: int) -> tuple[Array, np.ndarray]:
    """Weights of all tokens, float64 [V], and whether the training set has them, bool [V]."""
    number = len(data.labels)

    def side(split: Split) -> tuple[sparse.csr_matrix, list[int]]:
        return _features(split, tokenizer), targets(data.task, data.labels, split)

    features, classes = side(data.train)
    counts = TermCounts.of(features, classes, number)
    if name == LEARNING_TO_WEIGHT:
        fit, held_out = hold_out(data.train, data.task)
        weights = learn(*side(fit), *side(held_out), number=number, seed=seed).function.weights(counts)
    else:
        weights = WEIGHTS[name](counts)
    return weights, counts.present.sum(0) > 0


def positive(weights: Array, seen: np.ndarray) -> Array:
    """Scores from weights, as the head of this file says."""
    if not (weights[seen] > 0).any():
        raise TaskError("all tokens of the training set have weight 0: they say nothing about the classes")
    scores = np.where(seen, weights, np.median(weights[seen]))
    return np.maximum(scores, scores[scores > 0].min())


def _features(split: Split, tokenizer: Any) -> sparse.csr_matrix:
    """1 + log tf of the tokens, float64 [n, V]; of pairs of texts the absolute difference."""
    sides = []
    for texts in zip(*split.texts, strict=True):
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        counts = [Counter(encoding.ids) for encoding in encodings]
        rows = np.repeat(np.arange(len(counts)), [len(count) for count in counts])
        columns = np.array([i for count in counts for i in count], dtype=np.int64)
        values = 1 + np.log(np.array([value for count in counts for value in count.values()], dtype=np.float64))
        shape = (len(counts), tokenizer.get_vocab_size())
        sides.append(sparse.csr_matrix((values, (rows, columns)), shape))
    return difference(sides)
