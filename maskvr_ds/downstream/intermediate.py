"""Two-stage fine-tuning: the encoder is fine-tuned on an intermediate task with much data first (Phang et al. 2018,
"Sentence Encoders on STILTs", arXiv:1811.01088).

The encoder's weights are kept, the head is new in the second stage. There is one intermediate model per model and seed,
for all tasks, learning rates and repetitions of the command; none is chosen. It is stored in the output folder.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from maskvr_ds.downstream.examples import TaskData
from maskvr_ds.downstream.fine_tuning import Settings, fine_tune
from maskvr_ds.downstream.losses import DivergenceError
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.store import Content, RunStore
from maskvr_ds.downstream.tasks import TaskError
from maskvr_ds.runtime.files import discard


@dataclass
class Intermediate:
    """The intermediate task of a command. settings, learning_rate: of all seeds."""

    data: TaskData
    settings: Settings
    learning_rate: float
    _found: dict[tuple[str, int], Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.data.task.name

    def identity(self) -> Content:
        """What decides an intermediate model, beside the model that it starts from and the seed."""
        return {
            "task": self.name,
            "purpose": "intermediate",
            "kind": self.data.task.kind.value,
            "labels": list(self.data.labels),
            "train": self.data.train.digest,
            "learning_rate": self.learning_rate,
            **self.settings.identity(),
        }

    def described(self) -> str:
        examples = f"{len(self.data.train):,} examples"
        return f"{self.name} ({examples}, learning rate {self.learning_rate:g}, {self.settings.described()})"

    def stored(self, store: RunStore, encoder: Encoder, seed: int) -> Content | None:
        """The run of an intermediate model; None if it, or the model, is missing."""
        identity = self._identity(encoder, seed)
        return store.find(identity) if store.intermediate(identity).is_dir() else None

    def weights(
        self, store: RunStore, encoder: Encoder, seed: int, report: Callable[[str, Content, bool], None]
    ) -> Path:
        """Folder of the encoder after the first stage, which is computed if it is not stored.

        report: called once per encoder and seed with the run's label, its content, and whether it was stored. Raises
        TaskError if it diverges.
        """
        key = encoder.digest, seed
        if key in self._found:
            return self._found[key]
        identity = self._identity(encoder, seed)
        folder = store.intermediate(identity)

        def make() -> Content:
            discard(folder)  # of a process that was killed before it stored the run
            folder.parent.mkdir(exist_ok=True)
            try:
                outcome = fine_tune(
                    encoder, self.data.task, self.data.labels, self.data.train, {}, self.settings,
                    learning_rate=self.learning_rate, seed=seed, keep=folder, head=False,
                )  # fmt: skip
            except DivergenceError as error:
                raise TaskError(
                    f"{self.name}: {encoder.name} diverges on the intermediate task with seed {seed} ({error}); lower "
                    "--intermediate-learning-rate"
                ) from None
            return {"diverged": None, "train_seconds": outcome.train_seconds, "steps": outcome.steps}

        label = f"{Path(encoder.name).name}-intermediate-{self.learning_rate:g}-seed{seed}"
        content, stored = store.get(label, identity, make, repeat=not folder.is_dir())
        report(label, content, stored)
        self._found[key] = folder
        return folder

    def _identity(self, encoder: Encoder, seed: int) -> Content:
        return {**self.identity(), **encoder.identity, "seed": seed}
