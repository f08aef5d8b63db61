"""Fine-tuning of an encoder on a task with one learning rate and one seed, and its predictions.

Training is transformers' Trainer with AdamW, a linear warm-up over 10% of the steps, linear decay and weight decay 0.01
(Devlin et al. 2019). Nothing is chosen here, except for the epoch at which early stopping takes the weights.
"""

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # Trainer needs it, and would raise an error that names no extra
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    set_seed,
)

from maskvr_ds.downstream import layers, spans
from maskvr_ds.downstream.baselines import main_score, targets
from maskvr_ds.downstream.encoding import Encoded, encoded, has_untagged, predict
from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.losses import DivergenceError, StepLoss, balanced_weights
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.spans import Windows
from maskvr_ds.downstream.tasks import Kind, Task
from maskvr_ds.runtime.files import PARTIAL, discard
from maskvr_ds.runtime.logs import is_quiet

WARMUP_SHARE, WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.1, 0.01, 1.0
_PREDICTION_BATCH = 64
# Steps between two looks at the loss: each waits for the device.
_CHECK_EVERY = 50
# Trainer's name of the score on the held-out part.
_SCORE = "held_out"


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned on a task, except for learning rate and seed.

    epochs may be a fraction; batch_size: examples of a step, in `accumulation` micro-batches; max_length in tokens;
    precision: fp32 or bf16 (autocast). stride: tokens that windows of a context, or of a long text, share; None if
    texts are truncated. layer_decay: of `layers.decayed`; freeze: of `layers.freeze`; class_weights: balanced;
    patience: epochs without a better score on the held-out part after which training stops. group_by_length: batches of
    examples of similar length. None: not used.
    """

    epochs: float
    batch_size: int
    max_length: int
    precision: str
    stride: int | None = None
    accumulation: int | None = None
    layer_decay: float | None = None
    freeze: int | None = None
    class_weights: str | None = None
    patience: int | None = None
    group_by_length: bool | None = None

    def identity(self) -> dict[str, Any]:
        """What decides a run's result. Without what is None, so that runs stored by earlier versions are found."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def described(self) -> str:
        """For the heading of a table."""
        parts = f" in {self.accumulation} parts" if self.accumulation else ""
        lowest = {None: "", 0: "embeddings frozen"}.get(self.freeze, f"embeddings and {self.freeze} layers frozen")
        stop = f"stopped after {self.patience} epoch{'s' * (self.patience != 1)} without a better held-out score"
        found = (
            f"{self.epochs:g} epochs",
            f"batches of {self.batch_size}{parts}",
            f"{self.max_length} tokens",
            f"windows that share {self.stride}" if self.stride is not None else "",
            self.precision,
            f"layer-wise decay {self.layer_decay:g}" if self.layer_decay is not None else "",
            lowest,
            f"{self.class_weights} class weights" if self.class_weights else "",
            stop if self.patience is not None else "",
            "batches of similar length" if self.group_by_length else "",
        )
        return ", ".join(part for part in found if part)


@dataclass(frozen=True)
class _HeldOut:
    """Scores a model in training as learning rates are chosen; questions without an answer at the best threshold."""

    task: Task
    labels: Sequence[str]
    items: Encoded | Windows

    def __call__(self, trainer: Trainer) -> float:
        truth = targets(self.task, self.labels, self.items.split)
        predictions = predict(trainer, self.items, self.labels)
        if self.task.unanswerable:
            return spans.choose_threshold(truth, [predictions])[1]
        is_span = self.task.kind is Kind.SPAN
        return main_score(self.task, truth, spans.final_answers(predictions, None) if is_span else predictions)


class _Trainer(Trainer):
    """Raises DivergenceError once the loss is not finite, which Trainer would train on with.

    step_loss: in place of the model's loss. layer_decay: of `layers.decayed`. score: of the model in training, on the
    held-out part, for early stopping.
    """

    control: TrainerControl
    _total: torch.Tensor | float = 0.0

    def __init__(
        self,
        *,
        step_loss: StepLoss | None,
        layer_decay: float | None,
        score: _HeldOut | None,
        **given: Any,
    ) -> None:
        # Trainer does not divide the loss by the number of micro-batches if it has a function for it.
        super().__init__(compute_loss_func=step_loss, **given)
        self._step_loss, self._layer_decay, self._score = step_loss, layer_decay, score
        self.scores: list[tuple[int, float, float]] = []  # step, epoch, score

    def create_optimizer(self, *args: Any, **given: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **given)
        if is_new and self._layer_decay is not None:
            optimizer.param_groups = layers.decayed(optimizer.param_groups, self.model, self._layer_decay)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._step_loss.items(batches) if self._step_loss and batches else items

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if self._step_loss is None or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = model(**inputs)
        loss = self._step_loss(output, inputs, num_items_in_batch)
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._total = self._total + loss.detach()
        if (self.state.global_step + 1) % _CHECK_EVERY == 0:
            self.check()
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.check()
        assert self._score is not None
        score = self._score(self)
        self.scores.append((self.state.global_step, self.state.epoch or 0.0, score))
        metrics = {f"eval_{_SCORE}": score}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check(self) -> None:
        if not math.isfinite(self._total):
            raise DivergenceError(f"the loss is not finite at step {self.state.global_step + 1}")

    def stopping(self) -> dict[str, Any]:
        """What early stopping saw: epoch of the weights that were kept, and [epoch, score] of every evaluation."""
        kept = next(epoch for step, epoch, _ in self.scores if step == self.state.best_global_step)
        return {"epoch": kept, "held_out_scores": [[epoch, score] for _, epoch, score in self.scores]}


class _StepBar(TrainerCallback):
    """A bar over the steps of a run, on a terminal only; not in the processes of --jobs, whose loggers are quiet."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        hidden = True if is_quiet() else None
        self._bar = tqdm(total=state.max_steps, desc="steps", unit="step", leave=False, disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


@dataclass(frozen=True)
class Outcome:
    """A fine-tuned model: predictions per evaluation set (`predict`), optimizer steps, seconds of training and of
    prediction, number of truncated examples per set, and `_Trainer.stopping` with early stopping."""

    predictions: dict[str, list[Any]]
    steps: int
    train_seconds: float
    predict_seconds: float
    truncated: dict[str, int]
    stopping: dict[str, Any] | None = None


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
    head: bool = True,
    held_out: Split | None = None,
    weights: Path | None = None,
) -> Outcome:
    """Fine-tune on `train` and predict the splits of `evaluate`; their labels are not read.

    keep: folder to which the model and its tokenizer are saved; without its head unless `head`. held_out: of the
    training set, for early stopping. weights: of `Encoder.load`. Raises DivergenceError, or TaskError for a model that
    cannot be loaded.
    """
    assert (held_out is None) == (settings.patience is None)
    common = encoder, task, tuple(labels)
    read = settings.max_length, settings.stride
    items = encoded(*common, train, *read, labelled=True)
    set_seed(seed)  # the head's initial values
    model = encoder.load(task.kind, labels, weights)
    if settings.freeze is not None:
        layers.freeze(model, settings.freeze)
    collator = DataCollatorForTokenClassification if task.kind is Kind.TOKENS else DataCollatorWithPadding
    stop = None if held_out is None else _HeldOut(task, labels, encoded(*common, held_out, *read, labelled=False))
    with tempfile.TemporaryDirectory(prefix="maskvr-") as scratch:
        trainer = _Trainer(
            model=model,
            args=_arguments(scratch, settings, learning_rate, seed),
            train_dataset=items,
            eval_dataset=stop and stop.items,
            data_collator=collator(encoder.tokenizer),
            callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience else None,
            step_loss=_step_loss(task, labels, settings, items),
            layer_decay=settings.layer_decay,
            score=stop,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_StepBar())
        start = time.perf_counter()
        with _write_errors(Path(scratch)):
            trainer.train()
        trainer.check()
        trained = time.perf_counter()
        predictions, truncated = {}, {"train": items.truncated}
        for name, split in evaluate.items():
            found = encoded(*common, split, *read, labelled=False)
            truncated[name] = found.truncated
            predictions[name] = predict(trainer, found, labels)
        if keep is not None:
            with _write_errors(keep):
                _save(trainer.model if head else trainer.model.base_model, encoder.tokenizer, keep)
    seconds = trained - start, time.perf_counter() - trained
    stopping = None if stop is None else trainer.stopping()
    return Outcome(predictions, trainer.state.global_step, *seconds, truncated, stopping)


def _step_loss(task: Task, labels: Sequence[str], settings: Settings, items: Any) -> StepLoss | None:
    """None for a batch in one part without weights, for which the model's own loss is the same, if it has one."""
    if settings.class_weights is not None:
        return StepLoss(task.kind, balanced_weights((items[i]["labels"] for i in range(len(items))), len(labels)))
    return StepLoss(task.kind) if settings.accumulation is not None or has_untagged(items) else None


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the new folder completely or not at all."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    discard(partial)  # of a killed process
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except BaseException:
        discard(partial)  # perhaps the disk is full
        raise


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """safetensors raises an error of its own if it cannot write: raise OSError naming the folder instead."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder}: the model cannot be written ({error})") from None


def _arguments(scratch: str, settings: Settings, learning_rate: float, seed: int) -> TrainingArguments:
    parts = settings.accumulation or 1
    stopping: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no"}
    if settings.patience is not None:
        stopping = {
            "eval_strategy": "epoch",
            "save_strategy": "best",
            "metric_for_best_model": _SCORE,
            "greater_is_better": True,
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            "save_only_model": True,
        }
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch_size // parts,
        gradient_accumulation_steps=parts,
        per_device_eval_batch_size=_PREDICTION_BATCH,
        num_train_epochs=settings.epochs,
        learning_rate=learning_rate,
        warmup_steps=WARMUP_SHARE,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRADIENT_NORM,
        bf16=settings.precision == "bf16",
        seed=seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **stopping,
    )
    # Of several visible GPUs Trainer would use all, and multiply the batch size by their number.
    assert arguments.device is not None
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
