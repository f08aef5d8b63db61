"""Initialising from a pretrained model: a Hugging Face folder, as written by save_pretrained and `maskvr export`.

Only rank 0 reads the folder and broadcasts the weights, so all ranks start with the same bits and the folder may be on
a single host. Only safetensors files are read (nothing is unpickled), and nothing is downloaded. Once a run has a
checkpoint it no longer needs the folder: the checkpoint holds sizes, weights and the SHA-256 of the initial weights.

Collectives: `load`, one fp32 broadcast per parameter after `distributed.run_on_rank0`.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from maskvr_ds.config import ConfigError
from maskvr_ds.config.model import BERT_CONFIG
from maskvr_ds.models.initial_folder import InitialWeights, few, weights_file
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import sha256

logger = logging.getLogger(__name__)

# Tensor name in a file → the parameter that it is tied to.
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Tensors that masked-LM training ignores: pooler, next-sentence head, a buffer of old versions.
_UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
# Names in early conversions, bert-base-uncased among them.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load(module: nn.Module, initial: InitialWeights) -> None:
    """Load the folder's weights into an fp32 BertForMaskedLM on the CPU and log what was loaded.

    Collective: call on all ranks, before DeepSpeed casts or partitions the module. Raises ConfigError (RemoteError on
    the other ranks) if tensors are missing, unexpected, non-finite or of another shape, or if the file has changed
    since the run started.
    """
    summary = distributed.run_on_rank0(lambda: _read(module, initial))
    for parameter in module.parameters():
        parameter.data.copy_(distributed.broadcast(parameter.data.to(distributed.device())))
    logger.info("%s", summary)


@torch.no_grad()
def _read(module: nn.Module, initial: InitialWeights) -> str:
    """Copy the weights into the module; returns a summary for the log."""
    file = weights_file(initial.folder)
    if (found := sha256(file)) != initial.sha256:
        raise ConfigError(
            f"{file}: changed since the run started (SHA-256 {initial.sha256[:12]}, now {found[:12]}); restore it"
        )
    # Tied parameters appear once.
    parameters = dict(module.named_parameters())
    try:
        with safe_open(file, framework="pt") as content:
            stored = {_present_name(name): name for name in content.keys()}  # noqa: SIM118
            _check_names(file, parameters, stored)
            for name, parameter in parameters.items():
                copies = [n for n in (name, *(t for t, owner in _TIED.items() if owner == name)) if n in stored]
                tensor = content.get_tensor(stored[copies[0]])
                _check_tensor(file, stored[copies[0]], tensor, parameter)
                parameter.copy_(tensor)
                for copy in copies[1:]:
                    if not torch.equal(tensor, content.get_tensor(stored[copy])):
                        raise ConfigError(
                            f"{file}: {copy} and {name} differ, but are one tensor in the model trained here "
                            "(tie_word_embeddings); models with an untied head are not supported"
                        )
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a complete safetensors file: {error}") from None
    count = sum(parameter.numel() for parameter in parameters.values())
    unused = [stored[name] for name in stored if name.startswith(_UNUSED)]
    return f"weights of {file}: {len(parameters)} tensors, {count:,} parameters, SHA-256 {initial.sha256[:12]}" + (
        f"; unused: {few(unused)}" if unused else ""
    )


def _present_name(name: str) -> str:
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda match: _OLD_NAMES[match[1]], name)


def _check_names(file: Path, parameters: Iterable[str], stored: dict[str, str]) -> None:
    parameters = set(parameters)
    given = {_TIED.get(name, name) for name in stored}
    missing = sorted(parameters - given)
    unexpected = sorted(stored[name] for name in stored if _TIED.get(name, name) not in parameters)
    unexpected = [name for name in unexpected if not name.startswith(_UNUSED)]
    faults = [
        f"{len(names)} {what} ({few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise ConfigError(
            f"{file}: tensors do not match a BertForMaskedLM with this config.json: {'; '.join(faults)}. Training "
            "needs the prediction head: save the model as BertForMaskedLM"
        )


def _check_tensor(file: Path, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    if tensor.shape != parameter.shape:
        raise ConfigError(
            f"{file}: {name} has shape {list(tensor.shape)}, expected {list(parameter.shape)} by {BERT_CONFIG}; the "
            "files are from different models"
        )
    if tensor.dtype not in _FLOATS:
        raise ConfigError(f"{file}: {name} is {tensor.dtype}; save the model in float32, bfloat16 or float16")
    if not tensor.isfinite().all():
        raise ConfigError(f"{file}: {name} has non-finite values; the model is damaged")
