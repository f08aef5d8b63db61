"""FLOPs of a training step by what it computes: slots per row and the layer at which [MASK] enters may change."""

from transformers import PreTrainedConfig

from data_pipeline.shards import Corpus
from maskvr_ds.config import RunConfig
from maskvr_ds.data.documents import document_lengths
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.runtime import distributed


class StepFlops:
    """Model FLOPs per rank and token of the global batch, by numbers of slots and late mask tokens; each counted once,
    in a second or so, by a forward pass without data. No collectives."""

    def __init__(self, config: RunConfig, encoder: PreTrainedConfig, corpus: Corpus) -> None:
        self._encoder, self._length, self._batch = encoder, corpus.sequence_length, config.batch.micro_size
        self._documents = document_lengths(corpus) if config.data.attention == "documents" else None
        self._known: dict[tuple[int, int, int], float] = {}

    def __call__(self, predictions: int, late: LateMasks | None) -> float:
        """predictions: K. late: in training; None: [MASK] enters at the first layer."""
        key = (predictions, *((0, 0) if late is None else (late.layer, late.hidden)))
        if key not in self._known:
            of_sequence = flops_per_sequence(
                self._encoder, self._length, predictions, batch=self._batch, documents=self._documents, late=late
            )
            self._known[key] = of_sequence / self._length / distributed.world_size()
        return self._known[key]
