"""Loss of one optimizer step over all of its micro-batches, with or without class weights.

Each micro-batch contributes the sum of its examples' losses, divided by the number (or total weight) of the examples,
or tokens, of the step: the gradients of A micro-batches add up to that of the undivided batch, also if these have
different numbers of tokens. transformers' Trainer does not normalise this way: most encoders' heads accept the step's
number of items, for which it trusts them to divide by it, and average over the micro-batch instead. Of questions the
softmax includes padding, as in transformers, and its amount depends on the micro-batch: there the gradients differ a
little.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from maskvr_ds.downstream.tasks import Kind

# Label of tokens without a tag of their own: PyTorch's cross-entropy ignores it.
IGNORED = -100


class DivergenceError(ArithmeticError):
    """The loss, or what the model computes, is not finite. The message names the step."""


def balanced_weights(labels: Iterable[int | Sequence[int]], classes: int) -> Tensor:
    """float32 [classes]: n / (k · n_c) of a class with n_c of the n training examples, or tokens, and k classes that
    occur ("balanced" of scikit-learn, after King and Zeng 2001); 0 of a class that does not occur."""
    found = np.concatenate([np.atleast_1d(np.asarray(label)) for label in labels])
    found = found[found != IGNORED]
    present = np.unique(found)
    weights = np.zeros(classes, np.float32)
    weights[present] = compute_class_weight("balanced", classes=present, y=found)
    return torch.from_numpy(weights)


class StepLoss:
    """weights: float [classes] of a classification of texts or tokens; None: 1 each."""

    def __init__(self, kind: Kind, weights: Tensor | None = None) -> None:
        self.kind, self.weights = kind, weights

    def items(self, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What the sums of a step's micro-batches are divided by: float32 scalar."""
        if self.kind is Kind.SPAN:
            return torch.tensor(float(sum(len(batch["start_positions"]) for batch in batches)))
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        if self.kind is Kind.REGRESSION:
            return torch.tensor(float(len(labels)))
        labels = labels[labels != IGNORED]
        return torch.tensor(float(len(labels))) if self.weights is None else self.weights[labels.cpu()].sum()

    def __call__(self, output: Any, batch: Mapping[str, Tensor], items: Tensor) -> Tensor:
        """Scalar, 0 if the step has no item. output: of a model with a task head; batch: its inputs, with labels."""
        if self.kind is Kind.SPAN:
            start = F.cross_entropy(output.start_logits.float(), batch["start_positions"], reduction="sum")
            total = (start + F.cross_entropy(output.end_logits.float(), batch["end_positions"], reduction="sum")) / 2
        elif self.kind is Kind.REGRESSION:
            total = F.mse_loss(output.logits.float().squeeze(-1), batch["labels"], reduction="sum")
        else:
            logits, labels = output.logits.float().flatten(0, -2), batch["labels"].flatten()
            weights = None if self.weights is None else self.weights.to(logits.device)
            total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum")
        items = items.to(total.device)
        return total / torch.where(items > 0, items, 1)
