"""`maskvr evaluate --shots`: encoders on N-way K-shot episodes over classes that nothing was trained on.

Methods, all on the same episodes:

- TF–IDF: nearest centroid of bags of words, idf from the training classes (no encoder);
- nearest centroid and linear probe on the frozen encoder;
- prototypical: the encoder trained on episodes of the training classes; large margin: with the margin term.

Runs are stored with the accuracy of every episode, so that differences are paired by episode. Intervals are those of a
mean over episodes: they do not cover which classes the test has nor, with a single seed, the training's randomness.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from tqdm import tqdm

from maskvr_ds.downstream import few_shot_report
from maskvr_ds.downstream.baselines import TOKEN_PATTERN
from maskvr_ds.downstream.embeddings import Embedder
from maskvr_ds.downstream.episodes import Episode, Pool, Shape, make_pool
from maskvr_ds.downstream.episodic import (
    Training,
    centroid_accuracies,
    compact,
    probe_accuracies,
    sparse_centroid_accuracies,
    train,
)
from maskvr_ds.downstream.files import read_labelled
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.store import FEW_SHOT, Content, RunStore, opened
from maskvr_ds.downstream.tasks import Kind, Task, TaskError
from maskvr_ds.runtime.logs import is_quiet

CENTROID, PROBE, PROTOTYPICAL, MARGIN = "centroid", "probe", "prototypical", "margin"
METHODS = {
    CENTROID: "nearest centroid",
    PROBE: "linear probe",
    PROTOTYPICAL: "prototypical",
    MARGIN: "prototypical, large margin",
}
TFIDF = "TF–IDF, nearest centroid"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """An evaluation on episodes. task: with the columns of the file `data`. shots: one evaluation each. seeds: number
    of trainings per trained method. seed: of the class split and the episodes. max_per_class: examples of a class that
    episodes draw from. training: with weight and margin of the large-margin method; the other one has weight 0."""

    task: Task
    data: Path
    output: Path
    shots: Sequence[int]
    ways: int = 5
    queries: int = 15
    episodes: int = 600
    seeds: int = 3
    seed: int = 0
    max_length: int = 128
    max_per_class: int = 200
    methods: Sequence[str] = tuple(METHODS)
    training: Training = field(default_factory=lambda: Training(weight=1.0, margin=0.5))

    def shape(self, shots: int) -> Shape:
        return Shape(self.ways, shots, self.queries)

    def settings(self) -> Content:
        values = asdict(self)
        del values["task"]
        return values | {"data": str(self.data), "output": str(self.output)}


def evaluate(models: Sequence[str], request: Request) -> str:
    """Evaluate models on episodes; returns the tables, which are also in the output folder.

    Raises TaskError, CheckpointError, ExportError or OSError; runs that are done by then are stored.
    """
    split = read_labelled(request.task, request.data)
    pool = make_pool(
        split,
        ways=request.ways,
        shots=max(request.shots),
        queries=max(request.queries, request.training.queries),
        seed=request.seed,
        maximum=request.max_per_class,
        name=str(request.data),
    )
    lengths = {Kind.CLASSIFICATION: request.max_length}
    with opened(request.output) as store, prepared(models, lengths) as encoders:
        trained = sum(method in (PROTOTYPICAL, MARGIN) for method in request.methods)
        frozen = len(request.methods) - trained
        total = len(request.shots) * (1 + len(encoders) * (frozen + trained * request.seeds))
        with tqdm(total=total, desc="runs", unit="run", leave=False, disable=True if is_quiet() else None) as bar:
            evaluator = Evaluator(store, pool, request, bar)
            rows = {shots: evaluator.rows(encoders, shots) for shots in dict.fromkeys(request.shots)}
        return few_shot_report.write(store, request.settings(), _describe(pool), rows)


def _describe(pool: Pool) -> Content:
    """The split of the classes, and counts, for the report."""
    return {
        "classes": {part: list(names) for part, names in pool.parts.items()},
        "examples": {name: len(ids) for name, ids in pool.examples.items()},
        "repeated_texts": pool.removed,
        "rare_classes": list(pool.rare),
    }


class Evaluator:
    """Runs of one evaluation. done: how many were computed; reused: how many were stored already."""

    def __init__(self, store: RunStore, pool: Pool, request: Request, bar: tqdm) -> None:
        self.store, self.pool, self.request, self._bar = store, pool, request, bar
        self.done = self.reused = 0
        self._frozen: dict[str, torch.Tensor] = {}

    def rows(self, encoders: Sequence[Encoder], shots: int) -> dict[str, list[Content]]:
        """Name of a row → its runs: one, or of trained methods one per seed."""
        found = {
            TFIDF: [self._run(TFIDF, shots, {}, lambda: sparse_centroid_accuracies(self._words, self._moved(shots)))]
        }
        for encoder in encoders:
            for method in self.request.methods:
                found[f"{encoder.name}: {METHODS[method]}"] = self._of_method(encoder, method, shots)
        return found

    def _of_method(self, encoder: Encoder, method: str, shots: int) -> list[Content]:
        common = {"model": encoder.digest, "max_length": self.request.max_length}
        label = f"{Path(encoder.name).name}-{method}-{shots}shot"
        if method in (CENTROID, PROBE):
            measure = centroid_accuracies if method == CENTROID else probe_accuracies
            identity = common | {"method": method}
            return [self._run(label, shots, identity, lambda: measure(self._embeddings(encoder), self._moved(shots)))]
        training = self.request.training
        if method == PROTOTYPICAL:
            training = Training(training.episodes, training.queries, training.learning_rate)
        return [self._train(label, encoder, method, shots, training, seed) for seed in range(self.request.seeds)]

    def _train(self, label: str, encoder: Encoder, method: str, shots: int, training: Training, seed: int) -> Content:
        request = self.request
        identity = {"model": encoder.digest, "max_length": request.max_length, "method": method, "seed": seed}

        def make() -> Content:
            try:
                embedder, validation = train(
                    encoder,
                    self.pool,
                    request.shape(shots),
                    training,
                    max_length=request.max_length,
                    seed=seed,
                    pool_seed=request.seed,
                )
                accuracies = centroid_accuracies(embedder.all(self._texts), self._moved(shots))
            except (MemoryError, torch.OutOfMemoryError):
                raise TaskError(
                    f"{label}: out of memory; lower --train-queries, --shots, --ways or --max-length"
                ) from None
            return {"accuracies": accuracies.tolist(), "validation": validation}

        return self._get(f"{label}-seed{seed}", shots, identity | {"training": asdict(training)}, make)

    def _run(self, label: str, shots: int, identity: Content, measure: Callable[[], np.ndarray]) -> Content:
        return self._get(label, shots, {"method": label, **identity}, lambda: {"accuracies": measure().tolist()})

    def _get(self, label: str, shots: int, identity: Content, make: Callable[[], Content]) -> Content:
        request = self.request
        full = {
            "task": FEW_SHOT,
            "pool": self._digest,
            "shape": asdict(request.shape(shots)),
            "episodes": request.episodes,
            "pool_seed": request.seed,
            **identity,
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        run, stored = self.store.get(label, full, lambda: {**make(), "versions": versions})
        self.reused += stored
        self.done += not stored
        self._bar.clear()
        accuracy = 100 * float(np.mean(run["accuracies"]))
        logger.info("%s: %.1f%%%s", label, accuracy, " (stored)" if stored else "")
        self._bar.update()
        return run

    @cached_property
    def _digest(self) -> str:
        return self.pool.digest

    @cached_property
    def _test(self) -> tuple[list[str], dict[int, list[Episode]]]:
        """Texts of the test episodes, and by shots these with indices of them."""
        request = self.request
        drawn = {
            shots: self.pool.episodes("test", request.shape(shots), request.episodes, request.seed)
            for shots in dict.fromkeys(request.shots)
        }
        texts, moved = compact(self.pool, [episode for episodes in drawn.values() for episode in episodes])
        return texts, {shots: moved[i * request.episodes : (i + 1) * request.episodes] for i, shots in enumerate(drawn)}

    @property
    def _texts(self) -> list[str]:
        return self._test[0]

    def _moved(self, shots: int) -> list[Episode]:
        return self._test[1][shots]

    def _embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Of the frozen encoder, computed once for all shots and methods."""
        if encoder.digest not in self._frozen:
            self._frozen[encoder.digest] = Embedder(encoder, self.request.max_length).all(self._texts)
        return self._frozen[encoder.digest]

    @cached_property
    def _words(self) -> sparse.csr_matrix:
        """TF–IDF of the test texts, of unit length, float64 [n, words]. Words that the training classes lack are rare,
        not unknown: hashing needs no vocabulary."""
        counts = HashingVectorizer(token_pattern=TOKEN_PATTERN, alternate_sign=False, norm=None)
        weigh = TfidfTransformer(sublinear_tf=True).fit(counts.transform(self._training_texts()))
        return weigh.transform(counts.transform(self._texts)).tocsr()

    def _training_texts(self) -> list[str]:
        names = self.pool.parts["train"]
        return [self.pool.texts[i] for name in names for i in self.pool.examples[name]]
