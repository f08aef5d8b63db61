"""Examples as a model reads them, and its predictions from its logits."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import Trainer

from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.spans import Windows
from maskvr_ds.downstream.tasks import Kind, Task

# Label of tokens without a tag of their own: PyTorch's cross-entropy ignores it.
_IGNORED = -100

Item = dict[str, Any]


class Encoded:
    """The examples of a split as a model reads them: n items for a DataLoader, with labels if `labelled`.

    truncated: number of examples with more than `max_length` tokens.
    """

    def __init__(
        self, encoder: Encoder, task: Task, labels: Sequence[str], split: Split, max_length: int, *, labelled: bool
    ) -> None:
        self.split, self.task = split, task
        words = task.kind is Kind.TOKENS
        texts = [encoder.words(texts) if words else texts[0] for texts in split.texts]
        pairs = [texts[1] for texts in split.texts] if not words and len(task.texts) == 2 else None
        found = encoder.tokenizer(texts, pairs, is_split_into_words=words, truncation=True, max_length=max_length)
        self.truncated = 0
        if full := [i for i, ids in enumerate(found["input_ids"]) if len(ids) == max_length]:
            texts, pairs = [texts[i] for i in full], pairs and [pairs[i] for i in full]
            complete = encoder.tokenizer(texts, pairs, is_split_into_words=words, verbose=False)["input_ids"]
            self.truncated = sum(len(ids) > max_length for ids in complete)
        self.items: list[Item] = [{key: found[key][i] for key in found} for i in range(len(split))]
        self.words = [_first_positions(found.word_ids(i)) for i in range(len(split))] if words else []
        if labelled:
            index = {name: i for i, name in enumerate(labels)}
            for i, item in enumerate(self.items):
                item["labels"] = self._targets(i, index)

    def _targets(self, i: int, index: dict[str, int]) -> Any:
        label = self.split.labels[i]
        if self.task.kind is Kind.REGRESSION:
            return float(label)
        if self.task.kind is Kind.CLASSIFICATION:
            return index[label]
        targets = [_IGNORED] * len(self.items[i]["input_ids"])
        for word, position in self.words[i].items():
            targets[position] = index[label[word]]
        return targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Item:
        return self.items[i]


def _first_positions(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Word -> position of its first token."""
    found: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            found.setdefault(word, position)
    return found


# Runs that differ in seed or learning rate read the same examples: a training set, and evaluation sets.
@lru_cache(maxsize=3)
def encoded(
    encoder: Encoder,
    task: Task,
    labels: tuple[str, ...],
    split: Split,
    max_length: int,
    stride: int | None,
    *,
    labelled: bool,
) -> Encoded | Windows:
    """The examples of a split. stride: of windows, for questions only."""
    if task.kind is Kind.SPAN:
        assert stride is not None
        return Windows(encoder, split, max_length, stride, labelled=labelled)
    return Encoded(encoder, task, labels, split, max_length, labelled=labelled)


def predict(trainer: Trainer, encoded: Encoded | Windows, labels: Sequence[str]) -> list[Any]:
    """A class index, a number, the tags of all tokens, or the best answers (`spans.Prediction`), for each example.

    Tokens beyond the maximum length have the tag O.
    """
    # By length: batches with little padding.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.items[i]["input_ids"]))
    items = [encoded.items[i] for i in order]
    raw = trainer.predict(items).predictions
    if isinstance(encoded, Windows):
        starts, ends = (side[np.argsort(order)] for side in raw[:2])
        return encoded.answers(starts, ends)
    output: list[Any] = [None] * len(encoded)
    logits = np.asarray(raw[0] if isinstance(raw, tuple) else raw)
    for row, i in zip(logits, order, strict=True):
        output[i] = prediction(row, encoded, labels, i)
    return output


def prediction(row: np.ndarray, encoded: Encoded, labels: Sequence[str], i: int) -> Any:
    """That of example i, of any kind but questions: a class index, a number, or tags.

    row: logits, [C] for C classes, [1], or for tokens [at least the example's tokens, C].
    """
    return _PREDICTION[encoded.task.kind](row, encoded, labels, i)


def _predicted_tags(row: np.ndarray, encoded: Encoded, labels: Sequence[str], i: int) -> list[str]:
    tags = ["O"] * len(encoded.split.texts[i])
    for word, position in encoded.words[i].items():
        tags[word] = labels[int(row[position].argmax())]
    return tags


_PREDICTION: dict[Kind, Callable[[np.ndarray, Encoded, Sequence[str], int], Any]] = {
    Kind.CLASSIFICATION: lambda row, *_: int(row.argmax()),
    Kind.REGRESSION: lambda row, *_: float(row[0]),
    Kind.TOKENS: _predicted_tags,
}
