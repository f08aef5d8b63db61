"""Learning to Weight (Moreo, Esuli & Sebastiani, "Learning to Weight for Text Classification", TKDE 2020).

A network f maps the statistics of a term t to its weight, and is trained with a linear classifier on the task:

    w_t = softplus(f(tpr_t, fpr_t)),   x_dt = (1 + log tf_dt) · w_t / ‖·‖₂,   logits = W x_d + b,   cross-entropy

f has one hidden layer of ReLUs with dropout 0.2; its inputs are tpr and fpr of all C classes (of two, those of the
second). Adam; after each round of at least 50 steps the accuracy on held-out examples is measured, and training stops
once it has not improved for six rounds, with f of the best one. Then W is thrown away, and a linear model of
scikit-learn is trained on the weighted texts, as with any other weights.

Differences from the paper: it has one function per binary problem, with tpr and fpr of one class; here one function
serves all classes of a task. Features are words and word pairs, not words. Its statistics are those of the training
examples that the classifier sees as well, as in the paper.

Shapes: n examples, V terms, C classes, B examples of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import nn

from maskvr_ds.downstream.term_weights import Array, TermCounts

_HIDDEN, _DROPOUT = 64, 0.2
_LEARNING_RATE, _BATCH = 5e-3, 128
# A round is an epoch, or of a small training set as many epochs as have this many steps.
_ROUNDS, _PATIENCE, _STEPS = 60, 6, 50


def statistics(counts: TermCounts) -> Array:
    """Inputs of the network: tpr and fpr of all classes, of two classes those of the second: float64 [V, 2C or 2]."""
    tpr, fpr = counts.rates
    if len(tpr) == 2:
        tpr, fpr = tpr[1:], fpr[1:]
    return np.concatenate([tpr, fpr]).T


class WeightFunction(nn.Module):
    """f: statistics [V, inputs] → weights [V], positive."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, _HIDDEN)
        self.output = nn.Linear(_HIDDEN, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(F.relu(self.hidden(values)), _DROPOUT, self.training)
        return F.softplus(self.output(hidden)).squeeze(1)

    @torch.no_grad()
    def weights(self, counts: TermCounts) -> Array:
        """Weights of the terms of a training set, without dropout: float64 [V]."""
        self.eval()
        values = torch.from_numpy(_scaled(statistics(counts))).float()
        return self(values).double().numpy()


def _scaled(values: Array) -> Array:
    """Rates of terms are far below 1: their square roots spread over [0, 1]."""
    return np.sqrt(values)


@dataclass(frozen=True)
class Learned:
    """A trained function, the round it is of, and the accuracy on the held-out examples then."""

    function: WeightFunction
    round: int
    accuracy: float


def learn(
    features: sparse.csr_matrix,
    classes: Sequence[int],
    held_out: sparse.csr_matrix,
    held_out_classes: Sequence[int],
    *,
    number: int,
    seed: int,
) -> Learned:
    """Train f on features [n, V] (1 + log tf, not weighted) and class indices below `number`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _learn(features, np.asarray(classes), held_out, np.asarray(held_out_classes), number)


def _learn(
    features: sparse.csr_matrix, classes: np.ndarray, held_out: sparse.csr_matrix, truth: np.ndarray, number: int
) -> Learned:
    values = torch.from_numpy(_scaled(statistics(TermCounts.of(features, classes.tolist(), number)))).float()
    function = WeightFunction(values.shape[1])
    classifier = nn.Linear(features.shape[1], number)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.Adam([*function.parameters(), *classifier.parameters()], lr=_LEARNING_RATE)
    labels = torch.from_numpy(classes).long()
    best = Learned(function, 0, -1.0)
    state = {name: value.clone() for name, value in function.state_dict().items()}
    epochs = math.ceil(_STEPS / math.ceil(len(labels) / _BATCH))
    for number_of_round in range(1, _ROUNDS + 1):
        function.train()
        order = torch.cat([torch.randperm(len(labels)) for _ in range(epochs)]).numpy()
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            loss = F.cross_entropy(logits(features[chosen], function, values, classifier), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = _accuracy(held_out, truth, function, classifier, values)
        if accuracy > best.accuracy:
            best = Learned(function, number_of_round, accuracy)
            state = {name: value.clone() for name, value in function.state_dict().items()}
        elif number_of_round - best.round >= _PATIENCE:
            break
    function.load_state_dict(state)
    return best


def logits(
    features: sparse.csr_matrix, function: nn.Module, values: torch.Tensor, classifier: nn.Linear
) -> torch.Tensor:
    """W x + b with x of unit length: features [B, V], inputs of f [V, ·] → [B, C]. Weighs the batch's terms only."""
    used = np.unique(features.indices)
    rows = torch.from_numpy(features[:, used].toarray()).float()
    index = torch.from_numpy(used).long()
    return F.linear(F.normalize(rows * function(values[index]), dim=1), classifier.weight[:, index], classifier.bias)


@torch.no_grad()
def _accuracy(
    features: sparse.csr_matrix,
    truth: np.ndarray,
    function: WeightFunction,
    classifier: nn.Linear,
    values: torch.Tensor,
) -> float:
    function.eval()
    correct = 0
    for start in range(0, len(truth), _BATCH):
        found = logits(features[start : start + _BATCH], function, values, classifier).argmax(1).numpy()
        correct += int((found == truth[start : start + _BATCH]).sum())
    return correct / len(truth)
