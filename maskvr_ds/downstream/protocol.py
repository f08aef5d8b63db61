"""Repeats of an evaluation and settings of its runs, for all of its tasks."""

from dataclasses import dataclass

from maskvr_ds.downstream import spans
from maskvr_ds.downstream.fine_tuning import Settings
from maskvr_ds.downstream.tasks import Kind, Task, TaskError


@dataclass(frozen=True)
class Protocol:
    """Repeats of an evaluation. None: the task's own. seeds: number, from 0. learning_rates: the grid; a single one
    needs no choice, except for a threshold. max_length: tokens per example; stride: tokens that two windows share;
    windows: of long texts, which are truncated otherwise. baselines: further rows, of WEIGHTED_ROWS. The
    others: of `Settings`."""

    seeds: int = 5
    selection_seeds: int = 1
    learning_rates: tuple[float, ...] | None = None
    epochs: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    precision: str = "fp32"
    stride: int | None = None
    windows: bool = False
    accumulation: int | None = None
    layer_decay: float | None = None
    freeze: int | None = None
    class_weights: str | None = None
    patience: int | None = None
    group_by_length: bool | None = None
    baselines: tuple[str, ...] = ()

    def settings(self, task: Task) -> Settings:
        """Raises TaskError, naming the option, for one that is impossible on this task or would do nothing."""
        epochs, batch_size = self.epochs or task.epochs, self.batch_size or task.batch_size
        if self.accumulation is not None and batch_size % self.accumulation:
            raise TaskError(
                f"--accumulation {self.accumulation}: {task.name} has batches of {batch_size} examples, which cannot "
                "be divided into as many equal parts; change it or --batch-size"
            )
        if self.patience is not None and self.patience >= epochs:
            raise TaskError(
                f"--early-stopping {self.patience}: {task.name} is trained for {epochs:g} epochs, so that nothing "
                "would be stopped; lower it, or raise --epochs"
            )
        if self.class_weights is not None and task.kind not in (Kind.CLASSIFICATION, Kind.TOKENS):
            raise TaskError(
                f"--class-weights: {task.name} has no classes; omit it, or evaluate this task in a command of its own"
            )
        length = self.max_length or task.max_length
        return Settings(
            epochs, batch_size, length, self.precision, self._stride(task, length), self.accumulation,
            self.layer_decay, self.freeze, self.class_weights, self.patience, self.group_by_length,
        )  # fmt: skip

    def _stride(self, task: Task, length: int) -> int | None:
        """Tokens that successive windows share; None if texts are truncated."""
        if self.windows and task.kind not in (Kind.CLASSIFICATION, Kind.REGRESSION):
            raise TaskError(
                f"--long-texts windows: {task.name} "
                + ("reads contexts in windows anyway" if task.kind is Kind.SPAN else "has a label per token")
                + "; omit it, or evaluate this task in a command of its own"
            )
        if task.kind is not Kind.SPAN and not self.windows:
            return None
        stride = spans.default_stride(length) if self.stride is None else self.stride
        if task.kind is Kind.SPAN:
            spans.check_stride(length, stride)
        elif len(task.texts) == 2:
            spans.check_stride(length, stride, "the other text", length)
        else:
            spans.check_stride(length, stride, "special tokens", 0)
        return stride

    def rates(self, task: Task) -> tuple[float, ...]:
        return tuple(sorted(set(self.learning_rates or task.learning_rates)))

    def chooses(self, task: Task) -> bool:
        """Whether something is chosen on the held-out part of the training set."""
        return len(self.rates(task)) > 1 or task.unanswerable

    def holds_out(self, task: Task) -> bool:
        """Whether a part of the training set is held out, for a choice or for early stopping."""
        return self.chooses(task) or self.patience is not None
