"""Weights to begin with: those of a Hugging Face folder, as save_pretrained and `maskvr export` write it.

Rank 0 alone reads the folder, the others receive what it read: all begin with equal bits, and the folder may lie on one
host. Only safetensors are read, so nothing is unpickled; nothing is downloaded. A run that has a checkpoint needs the
folder no more: sizes, weights and the SHA-256 of what it began with stand there.

Collectives: `load`, one fp32 broadcast a parameter; `distributed.run_collectively` before it.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.config.model import BERT_CONFIG, read_bert_config
from maskvr_ds.data.vocabulary import token_ids
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import sha256

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
# Name in a file → the parameter that it shares its values with.
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# What a file may have that no masked language model computes with: pooler, next sentences, a buffer of old versions.
_NOT_USED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
# As the first BERTs were converted, bert-base-uncased among them.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 3


@dataclass(frozen=True)
class InitialWeights:
    """folder: as the configuration names it. sha256: of its model.safetensors when the run began."""

    folder: Path
    sha256: str


def weights_file(folder: Path) -> Path:
    """The folder's model.safetensors. Raises ConfigError where folder or file is missing, or of a kind not read."""
    where = f"model.initialize_from {folder}"
    if not folder.is_dir():
        raise ConfigError(
            f"{where}: no such folder; a local one expected, as save_pretrained and `maskvr export` write it "
            "(nothing is downloaded)"
        )
    for name in (WEIGHTS, BERT_CONFIG):
        if (folder / name).is_file():
            continue
        convert = f"BertForMaskedLM.from_pretrained('{folder}').save_pretrained('NEW')"
        if name == WEIGHTS and (folder / "pytorch_model.bin").is_file():
            raise ConfigError(
                f"{where}: its pytorch_model.bin is not read, since unpickling runs whatever code is in a file; "
                f"convert it where you trust it, and name the folder NEW: {convert}"
            )
        if name == WEIGHTS and (folder / f"{WEIGHTS}.index.json").is_file():
            raise ConfigError(
                f"{where}: its weights are in several files; write one, and name the folder NEW: {convert}"
            )
        raise ConfigError(f"{where}: has no {name}; save a BertForMaskedLM there with save_pretrained")
    return folder / WEIGHTS


def check_vocabulary(initial: InitialWeights, corpus: Corpus) -> None:
    """Raise ConfigError where the corpus' ids are not those that the weights were trained on.

    Sizes must agree, and, where the folder has a tokenizer too (tokenizer.json or vocab.txt), every token's id.
    """
    folder, size = initial.folder, corpus.manifest.vocab_size
    remedy = f"build the corpus with that model's tokenizer (--tokenizer {folder})"
    theirs = (read_bert_config(folder) or {}).get("vocab_size", 30522)
    if size != theirs:
        raise ConfigError(
            f"{corpus.folder}: its tokenizer has {size} tokens, the model in {folder} has {theirs}; {remedy}"
        )
    expected = token_ids(folder)
    found = token_ids(corpus.tokenizer_folder)
    if expected is None or found is None or expected == found:
        return
    differing = sorted({*expected, *found}, key=lambda token: expected.get(token, size))
    shown = [
        f"{token!r} is {found.get(token, 'missing')}, not {expected.get(token, 'in the model')}"
        for token in differing
        if found.get(token) != expected.get(token)
    ]
    raise ConfigError(f"{corpus.folder}: its tokenizer gives other ids than that of {folder} ({_few(shown)}); {remedy}")


def load(module: nn.Module, initial: InitialWeights) -> None:
    """Put the folder's weights into a BertForMaskedLM on the CPU, in fp32. Every rank calls, before DeepSpeed casts or
    cuts it. Rank 0 says what was loaded.

    Raises ConfigError (on the other ranks RemoteError) where tensors are missing, unexpected, of another shape, not
    finite, or the file is not the one that the run began with.
    """
    summary = distributed.run_on_rank0(lambda: _read(module, initial))
    for parameter in module.parameters():
        parameter.data.copy_(distributed.broadcast(parameter.data.to(distributed.device())))
    logger.info("%s", summary)


@torch.no_grad()
def _read(module: nn.Module, initial: InitialWeights) -> str:
    """Fill the module tensor by tensor; → what was loaded, in words."""
    file = weights_file(initial.folder)
    if (found := sha256(file)) != initial.sha256:
        raise ConfigError(
            f"{file}: changed since the run began (SHA-256 {initial.sha256[:12]}, now {found[:12]}); put it back"
        )
    # What is tied is one parameter.
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
                            f"{file}: {copy} and {name} differ, and are one tensor in the model trained here "
                            "(tie_word_embeddings); its head cannot be gone on with"
                        )
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a whole safetensors file: {error}") from None
    count = sum(parameter.numel() for parameter in parameters.values())
    unused = [stored[name] for name in stored if name.startswith(_NOT_USED)]
    return f"weights of {file}: {len(parameters)} tensors, {count:,} parameters, SHA-256 {initial.sha256[:12]}" + (
        f"; not used: {_few(unused)}" if unused else ""
    )


def _present_name(name: str) -> str:
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda match: _OLD_NAMES[match[1]], name)


def _check_names(file: Path, parameters: Iterable[str], stored: dict[str, str]) -> None:
    parameters = set(parameters)
    given = {_TIED.get(name, name) for name in stored}
    missing = sorted(parameters - given)
    unexpected = sorted(stored[name] for name in stored if _TIED.get(name, name) not in parameters)
    unexpected = [name for name in unexpected if not name.startswith(_NOT_USED)]
    faults = [
        f"{len(names)} {what} ({_few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise ConfigError(
            f"{file}: tensors are not those of a BertForMaskedLM of this config.json: {'; '.join(faults)}. Without its "
            "prediction head, or with another, a model cannot be gone on with: save it as BertForMaskedLM"
        )


def _check_tensor(file: Path, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    if tensor.shape != parameter.shape:
        raise ConfigError(
            f"{file}: {name} is {list(tensor.shape)}, {list(parameter.shape)} expected by {BERT_CONFIG}; they are not "
            "of one model"
        )
    if tensor.dtype not in _FLOATS:
        raise ConfigError(f"{file}: {name} is {tensor.dtype}; save the model in float32, bfloat16 or float16")
    if not tensor.isfinite().all():
        raise ConfigError(f"{file}: {name} has values that are not finite; the model is damaged")


def _few(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
