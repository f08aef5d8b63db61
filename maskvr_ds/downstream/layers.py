"""Depth of a model's parameters, and what depends on it: frozen parts, and learning rates that fall towards the input.

Depth of a model with L layers: 0 embeddings, l layer l = 1 … L, L + 1 everything above (pooler, final norm, head).
"""

from typing import Any

from torch import nn

from maskvr_ds.analysis.health.probe import layers_of
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.tasks import Kind, TaskError

# Relative positions are embeddings by another name (MPNet).
_EMBEDDINGS = ("embed", "relative_attention_bias")


def depths(model: Any) -> tuple[dict[str, int], int]:
    """Name of a parameter -> its depth; and the number of layers.

    model: an encoder of transformers with a task head. Raises ValueError if its layers are in no list, or share their
    weights (ALBERT), so that a parameter has no depth.
    """
    layers = layers_of(model)
    known = getattr(model.config, "num_hidden_layers", len(layers))
    if len(layers) != known:
        raise ValueError(f"{model.config.model_type}: its {known} layers share their weights")
    depth = {id(p): number for number, layer in enumerate(layers, 1) for p in layer.parameters()}
    inside = {id(p) for p in model.base_model.parameters()}
    for module in model.base_model.modules():
        if isinstance(module, nn.Embedding):
            depth.update({id(p): 0 for p in module.parameters() if id(p) not in depth})
    found = {}
    for name, parameter in model.named_parameters():
        embeds = id(parameter) in inside and any(word in name for word in _EMBEDDINGS)
        found[name] = depth.get(id(parameter), 0 if embeds else len(layers) + 1)
    return found, len(layers)


def freeze(model: Any, layers: int) -> None:
    """Freeze the embeddings and the lowest `layers` layers; 0: the embeddings alone. Dropout in them stays active."""
    for name, depth in depths(model)[0].items():
        if depth <= layers:
            model.get_parameter(name).requires_grad_(False)


def decayed(groups: list[dict[str, Any]], model: Any, decay: float) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, divided by depth d, with the learning rate lr · decay^(L + 1 − d).

    The head keeps lr, layer l has lr · decay^(L + 1 − l), the embeddings have lr · decay^(L + 1). Source: Clark et al.
    2020 (ELECTRA, appendix B: 0.8 for base, 0.9 for large models); the exponents are those of BEiT (Bao et al. 2022,
    `LayerDecayValueAssigner`), as ELECTRA's code has one more below the head.
    """
    depth, layers = depths(model)
    by_parameter = {id(parameter): depth[name] for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        for level in range(layers + 2):
            members = [p for p in group["params"] if by_parameter[id(p)] == level]
            if members:
                found.append({**group, "params": members, "lr": group["lr"] * decay ** (layers + 1 - level)})
    return found


def check(encoder: Encoder, kind: Kind, frozen: int | None, decay: float | None) -> None:
    """Raise TaskError if the model has no such layers, or nothing is left to which a decay of learning rates applies.

    frozen, decay: as `freeze` and `decayed` take them; None: not used.
    """
    if frozen is None and decay is None:
        return
    option = "--layer-decay" if frozen is None else "--freeze"
    try:
        _, layers = depths(encoder.load(kind, ("a", "b")))
    except ValueError as error:
        raise TaskError(f"{option}: {encoder.name}: {error}") from None
    if frozen is not None and frozen > layers:
        raise TaskError(f"--freeze {frozen}: {encoder.name} has {layers} layer{'s' * (layers != 1)}")
    if frozen == layers and decay is not None:
        raise TaskError(
            f"--layer-decay with --freeze {frozen}: all layers of {encoder.name} are frozen, so that there is nothing "
            "to decay; omit one of them"
        )
