"""Fine-tuning of an encoder on a task with one learning rate and one seed, and its predictions.

Training is transformers' Trainer with AdamW, a linear warm-up over 10% of the steps, linear decay and weight decay 0.01
(Devlin et al. 2019). Nothing is chosen here.
"""

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # Trainer needs it, and would raise an error that names no extra
import torch
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from maskvr_ds.downstream.encoding import encoded, predict
from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.tasks import Kind, Task
from maskvr_ds.runtime.files import PARTIAL, discard

WARMUP_SHARE, WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.1, 0.01, 1.0
_PREDICTION_BATCH = 64
# Steps between two looks at the loss: each waits for the device.
_CHECK_EVERY = 50


class DivergenceError(ArithmeticError):
    """The loss is not finite. The message names the step."""


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned on a task, except for learning rate and seed. epochs may be a fraction; max_length in
    tokens; precision: fp32 or bf16 (autocast); stride: tokens that windows of a context share, None for other tasks."""

    epochs: float
    batch_size: int
    max_length: int
    precision: str
    stride: int | None = None

    def identity(self) -> dict[str, Any]:
        """What decides a run's result. Without what is None, so that runs stored by earlier versions are found."""
        return {key: value for key, value in asdict(self).items() if value is not None}


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
    common = encoder, task, tuple(labels)
    items = encoded(*common, train, settings.max_length, settings.stride, labelled=True)
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
            read = encoded(*common, split, settings.max_length, settings.stride, labelled=False)
            truncated[name] = read.truncated
            predictions[name] = predict(trainer, read, labels)
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
