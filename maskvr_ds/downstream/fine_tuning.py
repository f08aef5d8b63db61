"""Fine-tuning of an encoder on a task with one learning rate and one seed, and its predictions.

Training is transformers' Trainer with AdamW, a linear warm-up over 10% of the steps, linear decay and weight decay 0.01
(Devlin et al. 2019). Nothing is chosen here.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # Trainer needs it, and would raise an error that names no extra
import numpy as np
import torch
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.tasks import Kind, Task
from maskvr_ds.runtime.files import PARTIAL, discard

WARMUP_SHARE, WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.1, 0.01, 1.0
_PREDICTION_BATCH = 64
# Label of tokens without a tag of their own: PyTorch's cross-entropy ignores it.
_IGNORED = -100
# Steps between two looks at the loss: each waits for the device.
_CHECK_EVERY = 50

Item = dict[str, Any]


class DivergenceError(ArithmeticError):
    """The loss is not finite. The message names the step."""


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned on a task, except for learning rate and seed. epochs may be a fraction; max_length in
    tokens; precision: fp32 or bf16 (autocast)."""

    epochs: float
    batch_size: int
    max_length: int
    precision: str


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
def _encoded(
    encoder: Encoder, task: Task, labels: tuple[str, ...], split: Split, max_length: int, *, labelled: bool
) -> Encoded:
    return Encoded(encoder, task, labels, split, max_length, labelled=labelled)


class _Trainer(Trainer):
    """Raises DivergenceError once the loss is not finite, which Trainer would train on with."""

    _total: torch.Tensor | float = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._total = self._total + loss.detach()
        if (self.state.global_step + 1) % _CHECK_EVERY == 0:
            self.check()
        return loss

    def check(self) -> None:
        if not math.isfinite(self._total):
            raise DivergenceError(f"the loss is not finite at step {self.state.global_step + 1}")


@dataclass(frozen=True)
class Outcome:
    """A fine-tuned model: predictions per evaluation set (`predict`), optimizer steps, seconds of training and of
    prediction, and number of truncated examples per set."""

    predictions: dict[str, list[Any]]
    steps: int
    train_seconds: float
    predict_seconds: float
    truncated: dict[str, int]


def fine_tune(
    encoder: Encoder,
    task: Task,
    labels: Sequence[str],
    train: Split,
    evaluate: dict[str, Split],
    settings: Settings,
    *,
    learning_rate: float,
    seed: int,
    keep: Path | None = None,
) -> Outcome:
    """Fine-tune on `train` and predict the splits of `evaluate`; their labels are not read.

    keep: folder to which the model and its tokenizer are saved. Raises DivergenceError, or TaskError for a
    model that cannot be loaded.
    """
    items = _encoded(encoder, task, tuple(labels), train, settings.max_length, labelled=True)
    set_seed(seed)  # the head's initial values
    model = encoder.load(task.kind, labels)
    collator = DataCollatorForTokenClassification if task.kind is Kind.TOKENS else DataCollatorWithPadding
    with tempfile.TemporaryDirectory(prefix="maskvr-") as scratch:
        trainer = _Trainer(
            model=model,
            args=_arguments(scratch, settings, learning_rate, seed),
            train_dataset=items,
            data_collator=collator(encoder.tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        trainer.check()
        trained = time.perf_counter()
        predictions, truncated = {}, {"train": items.truncated}
        for name, split in evaluate.items():
            encoded = _encoded(encoder, task, tuple(labels), split, settings.max_length, labelled=False)
            truncated[name] = encoded.truncated
            predictions[name] = predict(trainer, encoded, labels)
        if keep is not None:
            _save(trainer.model, encoder.tokenizer, keep)
    return Outcome(predictions, trainer.state.global_step, trained - start, time.perf_counter() - trained, truncated)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the new folder completely or not at all."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    discard(partial)  # of a killed process
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def _arguments(scratch: str, settings: Settings, learning_rate: float, seed: int) -> TrainingArguments:
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=_PREDICTION_BATCH,
        num_train_epochs=settings.epochs,
        learning_rate=learning_rate,
        warmup_steps=WARMUP_SHARE,
        lr_scheduler_type="linear",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRADIENT_NORM,
        bf16=settings.precision == "bf16",
        seed=seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    # Of several visible GPUs Trainer would use all, and multiply the batch size by their number.
    assert arguments.device is not None
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def predict(trainer: Trainer, encoded: Encoded, labels: Sequence[str]) -> list[Any]:
    """A class index, a number, or the tags of all tokens, for each example.

    Tokens beyond the maximum length have the tag O.
    """
    # By length: batches with little padding.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.items[i]["input_ids"]))
    items = [encoded.items[i] for i in order]
    output: list[Any] = [None] * len(encoded)
    raw = trainer.predict(items).predictions
    logits = np.asarray(raw[0] if isinstance(raw, tuple) else raw)
    for row, i in zip(logits, order, strict=True):
        output[i] = _PREDICTION[encoded.task.kind](row, encoded, labels, i)
    return output


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
