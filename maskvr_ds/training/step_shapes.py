"""What a training step computes by the stage of the masking rate: slots per row, late mask tokens, FLOPs."""

from dataclasses import replace

from transformers import PreTrainedConfig

from data_pipeline.shards import Corpus
from maskvr_ds.config import MaskingConfig, RunConfig
from maskvr_ds.data.documents import document_lengths
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.rates import Stage, hidden_in
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.runtime import distributed


def late_in_stage(masking: MaskingConfig, corpus: Corpus, late: LateMasks | None, stage: Stage) -> LateMasks | None:
    """`late`, of the complete schedule, in the training steps of a stage."""
    return None if late is None else replace(late, hidden=hidden_in(masking, corpus.sequence_length, stage))


class StepShapes:
    """Sets the late mask tokens of a step, and counts its FLOPs. No collectives."""

    def __init__(self, config: RunConfig, encoder: PreTrainedConfig, corpus: Corpus) -> None:
        self._masking, self._batch = config.masking, config.batch.micro_size
        self._corpus, self._encoder = corpus, encoder
        self._documents = document_lengths(corpus) if config.data.attention == "documents" else None
        self._known: dict[tuple[int, int, int], float] = {}

    def enter(self, stage: Stage, module: MaskedLanguageModel) -> None:
        """Set the model to a stage of a schedule of the rate."""
        module.late_in_training = late_in_stage(self._masking, self._corpus, module.late, stage)

    def count(self, masker: Masker, module: MaskedLanguageModel) -> None:
        """Count the FLOPs of all stages of a schedule and of the present step, which takes time: not while a step is
        timed."""
        for stage in masker.stages if len(masker.stages) > 1 else ():
            self.token_flops(stage.slots, late_in_stage(self._masking, self._corpus, module.late, stage))
        self.token_flops(masker.stage.slots, module.late_of_training)

    def token_flops(self, slots: int, late: LateMasks | None) -> float:
        """Model FLOPs per rank and token of the global batch: counted once, by a forward pass without data.

        slots: K. late: in training; None: [MASK] enters at the first layer.
        """
        key = (slots, *((0, 0) if late is None else (late.layer, late.hidden)))
        if key not in self._known:
            length = self._corpus.sequence_length
            of_sequence = flops_per_sequence(
                self._encoder, length, slots, batch=self._batch, documents=self._documents, late=late
            )
            self._known[key] = of_sequence / length / distributed.world_size()
        return self._known[key]
