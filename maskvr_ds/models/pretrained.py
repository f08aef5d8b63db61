"""Initialising from a pretrained model: a Hugging Face folder, as written by save_pretrained and `maskvr export`.

Only rank 0 reads the folder and broadcasts the weights, so all ranks start with the same bits and the folder may be on
a single host. Only safetensors files are read (nothing is unpickled), and nothing is downloaded. Once a run has a
checkpoint it no longer needs the folder: the checkpoint holds sizes, weights and the SHA-256 of the initial weights.

Collectives: `load`, one fp32 broadcast per parameter after `distributed.run_on_rank0`.
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
_SHOWN = 3


@dataclass(frozen=True)
class InitialWeights:
    """folder: as given in the configuration. sha256: of its model.safetensors when the run started."""

    folder: Path
    sha256: str


def weights_file(folder: Path) -> Path:
    """Path of the folder's model.safetensors. Raises ConfigError if folder or file is missing or of another format."""
    where = f"model.initialize_from {folder}"
    if not folder.is_dir():
        raise ConfigError(
            f"{where}: no such folder; expected a local folder written by save_pretrained or `maskvr export` "
            "(nothing is downloaded)"
        )
    for name in (WEIGHTS, BERT_CONFIG):
        if (folder / name).is_file():
            continue
        convert = f"BertForMaskedLM.from_pretrained('{folder}').save_pretrained('NEW')"
        if name == WEIGHTS and (folder / "pytorch_model.bin").is_file():
            raise ConfigError(
                f"{where}: pytorch_model.bin is not read, because unpickling can run arbitrary code; if you trust the "
                f"file, convert it and use the folder NEW: {convert}"
            )
        if name == WEIGHTS and (folder / f"{WEIGHTS}.index.json").is_file():
            raise ConfigError(
                f"{where}: its weights are split into several files; write one file and use the folder NEW: {convert}"
            )
        raise ConfigError(f"{where}: has no {name}; save a BertForMaskedLM to it with save_pretrained")
    return folder / WEIGHTS


def check_vocabulary(initial: InitialWeights, corpus: Corpus) -> None:
    """Raise ConfigError if the corpus' token ids are not those that the weights were trained on.

    Vocabulary sizes must match and, if the folder has a tokenizer (tokenizer.json or vocab.txt), the id of every token.
    """
    folder, size = initial.folder, corpus.manifest.vocab_size
    remedy = f"build the corpus with that model's tokenizer (--tokenizer {folder})"
    theirs = (read_bert_config(folder) or {}).get("vocab_size", 30522)
    if size != theirs:
        raise ConfigError(
            f"{corpus.folder}: its tokenizer has {size} tokens, but the model in {folder} has {theirs}; {remedy}"
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
    raise ConfigError(f"{corpus.folder}: its token ids differ from those of {folder} ({_few(shown)}); {remedy}")


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
        f"; unused: {_few(unused)}" if unused else ""
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
        f"{len(names)} {what} ({_few(names)})"
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


def _few(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
