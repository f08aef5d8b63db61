"""Questions as a model reads them: windows over long contexts, and answers as spans of characters.

A window is the question and a part of the context, with as many of its tokens as fit into `max_length`; successive
windows share `stride` tokens. The target of a window without the answer, and of a question that has none, is the first
token ([CLS]), as in BERT (Devlin et al. 2019, section 4.2 and 4.3). All spans of at most MAX_ANSWER tokens compete over
all windows of a question; the score of a span is the sum of its start and end logit, that of "no answer" the minimum
over the windows of the sum at [CLS].

Shapes: W windows, L tokens of a window.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskvr_ds.downstream import squad_scoring
from maskvr_ds.downstream.examples import Split, first_placed
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.tasks import TaskError

# Tokens of an answer, and of a question (at most a third of a window).
MAX_ANSWER, MAX_QUESTION = 30, 64
# Special tokens of a pair; RoBERTa has most.
_SPECIAL = 4
# Answers that are stored for each question.
N_BEST = 5
# Questions tokenised at once: the tokenizer's own objects are large.
_BATCH = 1000

Prediction = dict[str, Any]
Floats = NDArray[np.float64]


def default_stride(max_length: int) -> int:
    """128 tokens at a length of 384, as in BERT."""
    return max_length // 3


def check_stride(max_length: int, stride: int, beside: str = "a question", maximum: int = MAX_QUESTION) -> None:
    """Raise TaskError if a window might have no room for new tokens beside those that it shares.

    beside: what else is in each window, of at most `maximum` tokens and a third of the window.
    """
    longest = max_length - min(maximum, max_length // 3) - _SPECIAL - 1
    if stride > longest:
        raise TaskError(
            f"--stride {stride}: windows of {max_length} tokens can share at most {longest}, beside {beside} and one "
            "new token; lower it, or raise --max-length"
        )


class Windows:
    """The windows of a split's questions, W items for a DataLoader, with targets if `labelled`.

    With targets, questions whose answer is not at its offset are skipped. truncated: number of questions that are cut.
    windows: (question, whether its tokens are of the context [L], characters [L, 2]) of each item.
    """

    def __init__(self, encoder: Encoder, split: Split, max_length: int, stride: int, *, labelled: bool) -> None:
        self.split = split
        self.truncated = 0
        self.items: list[dict[str, Any]] = []
        self.windows: list[tuple[int, NDArray[np.bool_], NDArray[np.int64]]] = []
        for start in range(0, len(split), _BATCH):
            indices = range(start, min(start + _BATCH, len(split)))
            if labelled:
                indices = [i for i in indices if not split.labels[i] or _target(split, i)]  # type: ignore[assignment]
            if indices:
                self._add(encoder, indices, max_length, stride, labelled=labelled)

    def _add(self, encoder: Encoder, indices: Sequence[int], max_length: int, stride: int, *, labelled: bool) -> None:
        questions = self._shortened(encoder, [self.split.texts[i][0].strip() for i in indices], max_length)
        found = encoder.tokenizer(
            questions,
            [self.split.texts[i][1] for i in indices],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        inputs = [key for key in found if key in encoder.tokenizer.model_input_names]
        for window, source in enumerate(found["overflow_to_sample_mapping"]):
            i = indices[source]
            context = np.array([part == 1 for part in found.sequence_ids(window)])
            characters = np.array(found["offset_mapping"][window])
            item = {key: found[key][window] for key in inputs}
            if labelled:
                answer = _target(self.split, i)
                item["start_positions"], item["end_positions"] = _positions(context, characters, answer)
            else:
                self.windows.append((i, context, characters))
            self.items.append(item)

    def _shortened(self, encoder: Encoder, questions: list[str], max_length: int) -> list[str]:
        """Questions of at most MAX_QUESTION tokens and a third of a window; counts those that are cut."""
        limit = min(MAX_QUESTION, max_length // 3)
        found = encoder.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for i, offsets in enumerate(found["offset_mapping"]):
            if len(offsets) > limit:
                self.truncated += 1
                questions[i] = questions[i][: offsets[limit - 1][1]]
        return questions

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.items[i]

    def answers(self, start_logits: NDArray[Any], end_logits: NDArray[Any]) -> list[Prediction]:
        """For each question: `answers`, the N_BEST spans as [text, score], best first, and `null`, the score of "no
        answer". start_logits, end_logits: float [W, ≥ L]."""
        spans: list[list[tuple[float, int, int]]] = [[] for _ in range(len(self.split))]
        null = [np.inf] * len(self.split)
        for (i, context, characters), starts, ends in zip(self.windows, start_logits, end_logits, strict=True):
            null[i] = min(null[i], float(starts[0]) + float(ends[0]))
            positions = np.flatnonzero(context)
            for score, first, last in best_spans(starts[positions], ends[positions]):
                spans[i].append((score, int(characters[positions[first], 0]), int(characters[positions[last], 1])))
        return [
            {
                "answers": [[self.split.texts[i][1][a:b], score] for score, a, b in _distinct(found)],
                "null": null[i],
            }
            for i, found in enumerate(spans)
        ]


def _target(split: Split, i: int) -> tuple[int, int] | None:
    return first_placed(split.texts[i][1], split.labels[i])


def _positions(
    context: NDArray[np.bool_], characters: NDArray[np.int64], answer: tuple[int, int] | None
) -> tuple[int, int]:
    """First and last token of an answer; (0, 0) if the window does not contain all of it."""
    positions = np.flatnonzero(context)
    if answer is None or not len(positions):
        return 0, 0
    starts, ends = characters[positions].T
    if not starts[0] <= answer[0] < answer[1] <= ends[-1]:
        return 0, 0
    first = int(np.searchsorted(ends, answer[0], side="right"))
    last = int(np.searchsorted(starts, answer[1], side="left")) - 1
    return (int(positions[first]), int(positions[last])) if first <= last else (0, 0)


def best_spans(starts: NDArray[Any], ends: NDArray[Any]) -> Iterator[tuple[float, int, int]]:
    """The N_BEST spans of at most MAX_ANSWER tokens as (score, first, last token), best first.

    starts, ends: logits of the n tokens of the context.
    """
    n = len(starts)
    if not n:
        return
    padded = np.concatenate([ends.astype(np.float64), np.full(MAX_ANSWER - 1, -np.inf)])
    # scores[i, k]: of the span from token i to token i + k.
    scores = starts.astype(np.float64)[:, None] + np.lib.stride_tricks.sliding_window_view(padded, MAX_ANSWER)
    for flat in np.argsort(-scores, axis=None, kind="stable")[:N_BEST]:
        first, extent = divmod(int(flat), MAX_ANSWER)
        if first + extent < n:
            yield float(scores[first, extent]), first, first + extent


def _distinct(found: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """The N_BEST spans of all windows, which may have some in common."""
    best: dict[tuple[int, int], float] = {}
    for score, first, end in sorted(found, key=lambda span: -span[0]):
        best.setdefault((first, end), score)
    return [(score, *span) for span, score in list(best.items())[:N_BEST]]


def final_answers(predictions: Sequence[Prediction], threshold: float | None) -> list[str]:
    """The answer that is given: the best span, or "" if "no answer" scores more than `threshold` above it.

    threshold: None if every question has an answer.
    """
    return [
        prediction["answers"][0][0]
        if prediction["answers"] and (threshold is None or _advantage(prediction) <= threshold)
        else ""
        for prediction in predictions
    ]


def _advantage(prediction: Prediction) -> float:
    """Score of "no answer" minus that of the best span."""
    return float(prediction["null"] - prediction["answers"][0][1])


def choose_threshold(truth: Sequence[Sequence[str]], runs: Sequence[Sequence[Prediction]]) -> tuple[float, float]:
    """The threshold of `final_answers` with the highest mean of exact match and F1 (2.0) over all runs, and that mean.

    truth: true answers of n questions; runs: n predictions each. In the middle between two advantages of "no answer";
    of equal ones the lowest.
    """
    entries, fixed = [], 0.0
    for run in runs:
        for answers, prediction in zip(truth, run, strict=True):
            empty = _score(answers, "")
            if prediction["answers"]:
                entries.append((_advantage(prediction), _score(answers, prediction["answers"][0][0]) - empty))
            fixed += empty
    total = len(truth) * len(runs)
    if not entries:
        return 0.0, fixed / total
    entries.sort()
    advantages = np.array([advantage for advantage, _ in entries])
    # gains[k]: of answering the k questions with the lowest advantages.
    gains = np.concatenate([[0.0], np.cumsum([gain for _, gain in entries])])
    edges = np.concatenate([[advantages[0] - 1], (advantages[1:] + advantages[:-1]) / 2, [advantages[-1] + 1]])
    # Equal advantages cannot be told apart.
    possible = np.concatenate([[True], advantages[1:] > advantages[:-1], [True]])
    best = int(np.argmax(np.where(possible, gains, -np.inf)))
    return float(edges[best]), float((fixed + gains[best]) / total)


def _score(truth: Sequence[str], answer: str) -> float:
    return (squad_scoring.exact_match(truth, answer) + squad_scoring.f1(truth, answer, unanswerable=True)) / 2
