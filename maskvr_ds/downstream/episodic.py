"""Episodic training of an encoder on classes of its own, and accuracies of embeddings on episodes.

Training: one episode per step, AdamW with a linear warm-up over 10% of the steps and linear decay, as in fine-tuning.
At five points, and before the first step, the encoder is evaluated on episodes of the validation classes; the weights
with the highest accuracy are used, of equal ones the earliest. Test classes are seen by nothing but the test.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from maskvr_ds.downstream.embeddings import Embedder
from maskvr_ds.downstream.episodes import Episode, Pool, Shape
from maskvr_ds.downstream.fine_tuning import MAX_GRADIENT_NORM, WARMUP_SHARE, WEIGHT_DECAY
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.prototypes import episode_loss, nearest_prototype
from maskvr_ds.downstream.tasks import TaskError
from maskvr_ds.runtime.logs import is_quiet

_POINTS = 5
# Of validation: episodes, and the number of examples of a class that they draw from.
VALIDATION_EPISODES, _VALIDATION_EXAMPLES = 200, 30
# Episodes whose distances are computed at once.
_CHUNK = 50
# Of validation and of training episodes: not those of the test.
_VALIDATION_SEED, _TRAINING_SEED = 1, 2
Accuracies = NDArray[np.float64]


@dataclass(frozen=True)
class Training:
    """Episodic training. episodes: number of steps. queries: per class. weight, margin, normalised: of the large-margin
    term (`prototypes.episode_loss`)."""

    episodes: int = 300
    queries: int = 15
    learning_rate: float = 2e-5
    weight: float = 0.0
    margin: float = 0.0
    normalised: bool = True


def centroid_accuracies(embeddings: torch.Tensor, episodes: Sequence[Episode]) -> Accuracies:
    """Share of the queries whose nearest class mean (Euclidean) is their own: [n, D] → float64 [E]."""
    found = []
    for start in range(0, len(episodes), _CHUNK):
        chunk = episodes[start : start + _CHUNK]
        support = embeddings[torch.from_numpy(np.stack([e.support for e in chunk]))]
        query = embeddings[torch.from_numpy(np.stack([e.query for e in chunk]))]
        truth = torch.arange(query.shape[1]).repeat_interleave(query.shape[2])
        correct = nearest_prototype(support, query.flatten(1, 2)) == truth
        found.append(correct.double().mean(1).numpy())
    return np.concatenate(found)


def sparse_centroid_accuracies(features: sparse.csr_matrix, episodes: Sequence[Episode]) -> Accuracies:
    """`centroid_accuracies` of sparse features [n, words]."""
    found = []
    for episode in episodes:
        ways, queries = episode.query.shape
        centres = np.stack([np.asarray(features[ids].mean(axis=0))[0] for ids in episode.support])
        # ‖z − c‖² without ‖z‖², which is the same for all c.
        distances = (centres**2).sum(1) - 2 * (features[episode.query.ravel()] @ centres.T)
        found.append(float(np.mean(distances.argmin(1) == np.repeat(np.arange(ways), queries))))
    return np.array(found)


def probe_accuracies(embeddings: torch.Tensor, episodes: Sequence[Episode]) -> Accuracies:
    """Share of the queries that a logistic regression on the support examples (scikit-learn, C = 1) predicts correctly:
    [n, D] → float64 [E]."""
    features = embeddings.numpy()
    found = []
    for episode in tqdm(episodes, desc="linear probes", leave=False, disable=True if is_quiet() else None):
        ways, shots = episode.support.shape
        model = LogisticRegression(max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features[episode.support.ravel()], np.repeat(np.arange(ways), shots))
        truth = np.repeat(np.arange(ways), episode.query.shape[1])
        found.append(float(np.mean(model.predict(features[episode.query.ravel()]) == truth)))
    return np.array(found)


def train(
    encoder: Encoder, pool: Pool, shape: Shape, training: Training, *, max_length: int, seed: int, pool_seed: int
) -> tuple[Embedder, list[dict[str, Any]]]:
    """The encoder, trained on episodes of the training classes; and accuracies on the validation classes by step.

    pool_seed: of the validation episodes, the same for every training `seed`. Raises TaskError if the loss is not
    finite, or for lack of memory.
    """
    set_seed(seed)
    embedder = Embedder(encoder, max_length)
    model = embedder.model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    warmup = math.ceil(WARMUP_SHARE * training.episodes)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, training.episodes)
    validate = _Validation(pool, shape, pool_seed)
    best, weights = validate(embedder, 0), copy.deepcopy(model.state_dict())
    points = {round(training.episodes * i / _POINTS) for i in range(1, _POINTS + 1)}
    drawn = pool.episodes(
        "train", Shape(shape.ways, shape.shots, training.queries), training.episodes, _fold(seed, _TRAINING_SEED)
    )
    bar = tqdm(drawn, desc="training episodes", leave=False, disable=True if is_quiet() else None)
    for step, episode in enumerate(bar, 1):
        loss = _loss(embedder, pool, episode, training)
        if not math.isfinite(loss.item()):
            raise TaskError(
                f"{encoder.name}: the loss is not finite at training episode {step}; lower --train-learning-rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in points and (accuracy := validate(embedder, step)) > best:
            best, weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return embedder, validate.found


def _loss(embedder: Embedder, pool: Pool, episode: Episode, training: Training) -> torch.Tensor:
    ids = np.concatenate([episode.support, episode.query], axis=1)  # [N, K + Q]
    embeddings = embedder([pool.texts[i] for i in ids.ravel()]).unflatten(0, ids.shape)
    support, query = embeddings.split([episode.support.shape[1], episode.query.shape[1]], dim=1)
    return episode_loss(support, query, weight=training.weight, margin=training.margin, normalised=training.normalised)


def _fold(seed: int, stream: int) -> int:
    return seed * 10 + stream


class _Validation:
    """Mean accuracy of nearest prototypes on episodes of the validation classes. found: one entry per call."""

    def __init__(self, pool: Pool, shape: Shape, seed: int) -> None:
        maximum = max(_VALIDATION_EXAMPLES, shape.examples)
        self._episodes = pool.episodes(
            "validation", shape, VALIDATION_EPISODES, _fold(seed, _VALIDATION_SEED), maximum=maximum
        )
        self._texts, self._episodes = compact(pool, self._episodes)
        self.found: list[dict[str, Any]] = []

    def __call__(self, embedder: Embedder, step: int) -> float:
        accuracy = float(centroid_accuracies(embedder.all(self._texts), self._episodes).mean())
        self.found.append({"episodes": step, "accuracy": accuracy})
        return accuracy


def compact(pool: Pool, episodes: Sequence[Episode]) -> tuple[list[str], list[Episode]]:
    """The texts that occur in episodes, and the episodes with indices of these texts."""
    used = np.unique(np.concatenate([np.concatenate([e.support.ravel(), e.query.ravel()]) for e in episodes]))
    moved = [Episode(np.searchsorted(used, e.support), np.searchsorted(used, e.query)) for e in episodes]
    return [pool.texts[i] for i in used], moved
