"""A masked language model of transformers with its prediction head evaluated only at the K masked positions.

Shapes: B sequences, L positions, K predictions per sequence, D hidden, V vocabulary. With L = 128 and K = 19, logits
[B, K, V] instead of [B, L, V] make large vocabularies affordable.

The model is transformers' own, whatever its architecture: a forward hook on its encoder (`base_model`) replaces the
last hidden state [B, L, D] by its K gathered rows [B, K, D], and the model's own forward applies its own head to them.
The head processes each position independently, so the logits are those of the untouched model at these positions.

Rows attend over all of their tokens, or within documents (models/documents.py). [MASK] may enter at a middle layer
(models/late_masks.py).

For sentence pairs the model is the architecture's ...ForPreTraining: a pooler, which reads the complete last hidden
state inside of the encoder, and a binary head on it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from maskvr_ds.config import ConfigError
from maskvr_ds.config.objectives import PAIR_CLASSES
from maskvr_ds.models import documents
from maskvr_ds.models.late_masks import LateMasks, Passage, StagedLayers, passing, staged_layers


class MaskedLanguageModel(nn.Module):
    """A masked language model whose forward takes the masked positions and returns the loss of each prediction.

    Args:
        model: transformers' configuration, for random weights, or a model, which is used as it is.
        activation_checkpointing: recompute activations in the backward pass; a number: of so many layers, the lowest.
        separator: id of the token that ends a document, to attend within documents (models/documents.py); None: rows.
        late: layer at which [MASK] enters (models/late_masks.py); None: at the first one, as the others.

    mlm: transformers' model. has_pair_head: whether it classifies sentence pairs (`ask_for_pair_head`).
    observer: called in every training forward pass with h [B, K, D], the input of the prediction head, and the losses
    [B, K], to register hooks on both (masking/gradient_norms.py); None to disable.
    is_compiled: whether parts of it were compiled (models/compiled.py).
    late_in_training: in training, in place of `late`; only of a model that was made with a `late` of its layer or a
    higher one. None: `late`.
    trims_late: whether the layers below `late` get rows of the same shorter length; None: in training only.

    Raises ConfigError if transformers cannot build the model or the architecture has no activation checkpointing, or
    fewer layers than that number, or cannot attend within documents, or has no list of layers or no layer for late
    mask tokens.
    """

    observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    late_in_training: LateMasks | None = None
    is_compiled: bool = False
    trims_late: bool | None = None

    def __init__(
        self,
        model: PreTrainedConfig | PreTrainedModel,
        *,
        activation_checkpointing: bool | int = False,
        separator: int | None = None,
        late: LateMasks | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            # Attention within documents is noted in the configuration: not in that of the caller.
            model = build(model if separator is None else copy.deepcopy(model))
        self.mlm: PreTrainedModel = model
        self.has_pair_head = type(self.mlm).__name__ in PAIR_CLASSES.values()
        self._positions: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        # The head's input is a leaf: the backward pass ends there.
        self._detach = False
        self.mlm.base_model.register_forward_hook(self._gather)
        if activation_checkpointing:
            self._checkpoint_activations(activation_checkpointing)
        self.separator = separator
        if separator is not None:
            documents.use_document_attention(self.mlm)
            self._first_position = documents.first_position(self.mlm.base_model)
        self.late = late
        if late is not None:
            self._staged = [staged_layers(self.mlm.base_model, late)]  # in a list: registered once

    def _checkpoint_activations(self, number: int) -> None:
        """number: of layers; True: all."""
        kind = self.mlm.config.model_type
        if not self.mlm.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.activation_checkpointing is {str(number).lower()}, and {kind} of transformers does not support "
                "gradient checkpointing; set it to false, and lower batch.micro_size if memory is short"
            )
        self.mlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if number is True:
            return
        layers = [module for module in self.mlm.modules() if isinstance(module, GradientCheckpointingLayer)]
        if number > len(layers):
            raise ConfigError(
                f"model.activation_checkpointing is {number}, and this {kind} has {len(layers)} layers; set it to true "
                "for all of them"
            )
        for layer in layers[number:]:
            layer.gradient_checkpointing = False

    def _gather(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the encoder."""
        if self._positions is None:
            return None
        last = output[0]
        hidden = last.gather(1, self._positions[..., None].expand(-1, -1, last.shape[-1]))
        if self._detach:
            hidden = hidden.detach().requires_grad_()
        self._hidden = hidden
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output[next(iter(output))] = hidden  # a ModelOutput: also sets the attribute
        return output

    @contextmanager
    def _gathering(
        self, positions: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Iterator[None]:
        """Within: a forward pass over the rows."""
        self._positions = positions
        try:
            with self._late_masks(positions, input_ids, attention_mask):
                yield
        finally:
            self._positions = self._hidden = None

    def _late_masks(
        self, positions: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> AbstractContextManager[None]:
        late = self.late_of_training if self.training else self.late
        if late is None:
            return nullcontext()
        numbers = None if self.separator is None else documents.starts(input_ids, self.separator).cumsum(1)
        passage = Passage(
            late,
            input_ids,
            attention_mask,
            predictions=positions.shape[1],
            trimmed=self.training if self.trims_late is None else self.trims_late,
            eager=self.mlm.config._attn_implementation == "eager",
            document_numbers=numbers,
        )
        return passing(self.layers, passage)

    @property
    def late_of_training(self) -> LateMasks | None:
        """Where [MASK] enters in a training step; None: at the first layer."""
        return self.late if self.late_in_training is None else self.late_in_training

    @property
    def layers(self) -> StagedLayers:
        """The encoder's layers; only of a model with late mask tokens."""
        return self._staged[0]

    @contextmanager
    def without_late_masks(self) -> Iterator[None]:
        """Within: [MASK] enters at the first layer, as in the exported model."""
        before = self.late, self.late_in_training
        self.late = self.late_in_training = None
        try:
            yield
        finally:
            self.late, self.late_in_training = before

    def _inputs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, Any]:
        """Arguments of transformers' model."""
        if self.separator is None:
            # Position ids are the model's own: RoBERTa's start at pad + 1.
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        varlen = documents.has_varlen(input_ids.device, next(self.mlm.parameters()).dtype)
        inputs = documents.document_inputs(input_ids, self.separator, self._first_position, varlen=varlen)
        return {"input_ids": input_ids, **inputs}

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Input of the head, h [B, K, D], for input_ids int64 [B, L], positions int64 [B, K], mask bool [B, L]."""
        with self._gathering(positions, input_ids, attention_mask):
            return self.mlm.base_model(**self._inputs(input_ids, attention_mask))[0]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_starts: torch.Tensor | None = None,
    ) -> Any:
        """Cross-entropy per prediction in nats, float32 [B, K], for labels int64 [B, K]; without labels, logits
        [B, K, V]. With segment_starts int64 [B] (a model with a head for pairs only), a pair of these and the logits of
        the sentence pairs, [B, 2]. With a `separator`, attention_mask is not needed: padding is a document of its own.

        Under ZeRO 3 all computation must go through this method: the hooks that gather a module's parameters expect a
        complete forward pass.
        """
        with self._gathering(positions, input_ids, attention_mask):
            inputs = self._inputs(input_ids, attention_mask)
            if segment_starts is not None:
                inputs["token_type_ids"] = token_types(input_ids, attention_mask, segment_starts)
            output = self.mlm(**inputs)
            # The first two outputs of all ...ForPreTraining classes; the names differ.
            logits, pair_logits = output[:2] if self.has_pair_head else (output.logits, None)
            if labels is None:
                return logits if segment_starts is None else (logits, pair_logits)
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            if self.observer is not None and self._hidden is not None and losses.requires_grad:
                self.observer(self._hidden, losses)
            return losses if segment_starts is None else (losses, pair_logits)

    @contextmanager
    def head_alone(self) -> Iterator[None]:
        """Within: the backward pass ends at the input of the head, which requires a gradient (for `observer`)."""
        self._detach = True
        try:
            yield
        finally:
            self._detach = False


def ordinary(module: nn.Module) -> AbstractContextManager[None]:
    """Within: a MaskedLanguageModel computes without late mask tokens, as other modules do anyway."""
    return module.without_late_masks() if isinstance(module, MaskedLanguageModel) else nullcontext()


def names_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter: tied parameters have several, and which is first depends on the architecture."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def token_types(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, segment_starts: torch.Tensor
) -> torch.Tensor:
    """1 in the second segment with its [SEP], 0 elsewhere, also on padding: int64 [B, L], as tokenizers number them."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    second = places >= segment_starts[:, None]
    return (second if attention_mask is None else second & attention_mask).long()


def ask_for_pair_head(config: PreTrainedConfig) -> None:
    """Have `build` add a pooler and a binary head. Stored in config.json, so that a checkpoint's model has them too.

    Raises ConfigError if the architecture has none.
    """
    if (name := PAIR_CLASSES.get(config.model_type)) is None:
        raise ConfigError(f"objectives: {config.model_type} of transformers has no binary head for sentence pairs")
    config.architectures = [name]


def asks_for_pair_head(config: PreTrainedConfig) -> bool:
    """Whether the model of this configuration has a pooler and a binary head."""
    return (config.architectures or [None])[0] == PAIR_CLASSES.get(config.model_type, "")


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes the model of this configuration."""
    return AutoModelForPreTraining if asks_for_pair_head(config) else AutoModelForMaskedLM


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture's masked language model with random weights, with a head for pairs if the configuration asks for
    one. Raises ConfigError if transformers cannot build it."""
    try:
        model = auto_class(config).from_config(config, dtype=torch.float32)
    # Whatever the class raises for values that contradict each other: sizes, activations, attention.
    except Exception as error:
        raise ConfigError(
            f"model: transformers cannot build a masked language model of type {config.model_type!r} with these "
            f"settings: {' '.join(str(error).split())}"
        ) from error
    if model.base_model is model:
        raise ConfigError(
            f"model.architecture {config.model_type!r}: {type(model).__name__} has no separate encoder "
            f"({model.base_model_prefix!r}); it cannot be trained here"
        )
    return model
