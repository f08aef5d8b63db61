"""The folder of a pretrained model, before its weights are read: its files, and whether its vocabulary is the corpus'.
Loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.config.model import BERT_CONFIG, read_bert_config
from maskvr_ds.data.vocabulary import token_ids

WEIGHTS = "model.safetensors"
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
    raise ConfigError(f"{corpus.folder}: its token ids differ from those of {folder} ({few(shown)}); {remedy}")


def few(names: list[Any]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
