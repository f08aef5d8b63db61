"""Examples as a model reads them, and its predictions from its logits."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import Trainer

from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.losses import IGNORED, DivergenceError
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.spans import Windows
from maskvr_ds.downstream.tasks import Kind, Task

Item = dict[str, Any]


class Encoded:
    """The examples of a split as a model reads them: n items for a DataLoader, with labels if `labelled`.

    truncated: number of examples with more than `max_length` tokens; long: which they are. owners: the example of each
    item; None if there is one item per example.
    """

    owners: list[int] | None = None

    def __init__(
        self, encoder: Encoder, task: Task, labels: Sequence[str], split: Split, max_length: int, *, labelled: bool
    ) -> None:
        self.split, self.task = split, task
        words = task.kind is Kind.TOKENS
        texts = [encoder.words(texts) if words else texts[0] for texts in split.texts]
        pairs = [texts[1] for texts in split.texts] if not words and len(task.texts) == 2 else None
        found = encoder.tokenizer(texts, pairs, is_split_into_words=words, truncation=True, max_length=max_length)
        self.long: list[int] = []
        if full := [i for i, ids in enumerate(found["input_ids"]) if len(ids) == max_length]:
            texts, pairs = [texts[i] for i in full], pairs and [pairs[i] for i in full]
            complete = encoder.tokenizer(texts, pairs, is_split_into_words=words, verbose=False)["input_ids"]
            self.long = [i for i, ids in zip(full, complete, strict=True) if len(ids) > max_length]
        self.truncated = len(self.long)
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
        targets = [IGNORED] * len(self.items[i]["input_ids"])
        for word, position in self.words[i].items():
            targets[position] = index[label[word]]
        return targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Item:
        return self.items[i]


class TextWindows(Encoded):
    """The examples of a classification or regression, long ones as several windows of at most `max_length` tokens.

    Successive windows share `stride` tokens. Of a pair, the longer text is read in windows, each with the other one,
    which is cut to a third of a window and then counted as truncated. For training, every window is an example with the
    label of its text; predictions are made from the mean of its windows' logits. Examples that fit are as in Encoded.
    """

    def __init__(
        self, encoder: Encoder, task: Task, labels: Sequence[str], split: Split, max_length: int, stride: int, *,
        labelled: bool,
    ) -> None:  # fmt: skip
        super().__init__(encoder, task, labels, split, max_length, labelled=labelled)
        self.truncated = 0
        long, items = set(self.long), self.items
        self.items, self.owners = [], []
        for i, item in enumerate(items):
            found = self._windows(encoder, split.texts[i], max_length, stride) if i in long else [item]
            self.items += [{**item, **window} for window in found]
            self.owners += [i] * len(found)

    def _windows(self, encoder: Encoder, texts: Sequence[str], max_length: int, stride: int) -> list[Item]:
        tokenizer, longer = encoder.tokenizer, 0
        given = list(texts[: len(self.task.texts)])
        if len(given) == 2:
            offsets = tokenizer(given, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            counts = [len(side) for side in offsets["offset_mapping"]]
            longer, limit = int(counts[1] > counts[0]), max_length // 3
            if counts[1 - longer] > limit:
                self.truncated += 1
                given[1 - longer] = given[1 - longer][: offsets["offset_mapping"][1 - longer][limit - 1][1]]
        found = tokenizer(
            *given,
            truncation=("only_first", "only_second")[longer],
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
        )
        inputs = [key for key in found if key in tokenizer.model_input_names]
        return [{key: found[key][window] for key in inputs} for window in range(len(found["input_ids"]))]


def _first_positions(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Word -> position of its first token."""
    found: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            found.setdefault(word, position)
    return found


# Runs that differ in seed or learning rate read the same examples: a training set, its held-out part, and evaluation
# sets.
@lru_cache(maxsize=4)
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
    """The examples of a split. stride: of windows; None if long texts are truncated, as questions never are."""
    if task.kind is Kind.SPAN:
        assert stride is not None
        return Windows(encoder, split, max_length, stride, labelled=labelled)
    if stride is not None:
        return TextWindows(encoder, task, labels, split, max_length, stride, labelled=labelled)
    return Encoded(encoder, task, labels, split, max_length, labelled=labelled)


def has_untagged(encoded: Encoded | Windows) -> bool:
    """Whether some sentence has no tagged token: a batch of such sentences has no mean loss."""
    tags = [item["labels"] for item in encoded.items if isinstance(item.get("labels"), list)]
    return any(all(label == IGNORED for label in labels) for labels in tags)


def predict(trainer: Trainer, encoded: Encoded | Windows, labels: Sequence[str]) -> list[Any]:
    """A class index, a number, the tags of all tokens, or the best answers (`spans.Prediction`), for each example.

    Tokens beyond the maximum length have the tag O. Raises DivergenceError if logits are not finite, as after a last
    step whose loss was finite and whose gradient was not.
    """
    # By length: batches with little padding.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.items[i]["input_ids"]))
    items = [encoded.items[i] for i in order]
    # Trainer groups evaluated examples by length as those of training, and returns predictions in that order.
    strategy, trainer.args.train_sampling_strategy = trainer.args.train_sampling_strategy, "random"
    try:
        raw = trainer.predict(items).predictions
    finally:
        trainer.args.train_sampling_strategy = strategy
    if not all(np.isfinite(side).all() for side in (raw if isinstance(raw, tuple) else (raw,))):
        raise DivergenceError(f"the predictions after step {trainer.state.global_step} are not finite")
    if isinstance(encoded, Windows):
        starts, ends = (side[np.argsort(order)] for side in raw[:2])
        return encoded.answers(starts, ends)
    logits = np.asarray(raw[0] if isinstance(raw, tuple) else raw)[np.argsort(order)]
    if encoded.owners is not None:
        logits = window_means(logits, encoded.owners)
    return [prediction(row, encoded, labels, i) for i, row in enumerate(logits)]


def window_means(logits: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """Mean logits of each example, float32 [n, K]. logits: float32 [W, K], of windows; owners: their examples, in
    ascending order, each of 0 … n − 1 at least once."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return np.add.reduceat(logits, starts, axis=0) / np.diff([*starts, len(owners)])[:, None].astype(np.float32)


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
