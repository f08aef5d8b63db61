"""The folder of a pretrained model, before its weights are read: its files, and whether its vocabulary is the corpus'.
Loads no torch."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.config.architectures import CONFIG_FILE, read_config_file
from maskvr_ds.config.model import Vocabulary
from maskvr_ds.data.vocabulary import token_ids
from maskvr_ds.models.new_vocabulary import RowSources, row_sources
from maskvr_ds.run_folder.layout import MANIFEST
from maskvr_ds.run_folder.marks import is_run
from maskvr_ds.runtime.files import sha256

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_SHOWN = 3
# Embedding tables are padded to a multiple of up to this many rows, for faster matrix products.
_PADDING = 128
# Rows of BERT's table if config.json does not say.
_ROWS = 30522


@dataclass(frozen=True)
class InitialWeights:
    """folder: as given in the configuration. sha256: of its weights when the run started (`weights_digest`). new_head:
    see ModelConfig. rows: for another vocabulary than that of the folder; None: for the same one."""

    folder: Path
    sha256: str
    new_head: bool | None = None
    rows: RowSources | None = field(default=None, compare=False)


def weights_files(folder: Path) -> list[Path]:
    """The folder's model.safetensors, or the shards that its index lists. Raises ConfigError if folder or file is
    missing or of another format."""
    where = f"model.initialize_from {folder}"
    if not folder.is_dir():
        raise ConfigError(
            f"{where}: no such folder; expected a folder written by save_pretrained or `maskvr export`, "
            "or the name of a model on a hub (OWNER/NAME)"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{where}: has no {CONFIG_FILE}; {_hint(folder)}")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / "pytorch_model.bin").is_file():
        raise ConfigError(
            f"{where}: pytorch_model.bin is not read, because unpickling can run arbitrary code; if you trust the "
            f"file, convert it and use the folder NEW: AutoModelForMaskedLM.from_pretrained('{folder}')"
            ".save_pretrained('NEW')"
        )
    raise ConfigError(f"{where}: has no {WEIGHTS}; save the model to it with save_pretrained")


def _hint(folder: Path) -> str:
    """Where the model of a folder without config.json may be."""
    if is_run(folder) or (folder / MANIFEST).is_file():
        return (
            f"it is a run or a checkpoint: export it (maskvr export --checkpoint {folder} --output NEW) and name the "
            "folder NEW"
        )
    # Of sentence-transformers, and of the hub's cache.
    found = (
        path.parent for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/{CONFIG_FILE}"))
    )
    inner = next((path for path in found if (path / WEIGHTS).is_file()), None)
    return "save the model to it with save_pretrained" if inner is None else f"the model may be in {inner}"


def _shards(folder: Path) -> list[Path]:
    """The files that model.safetensors.index.json names. Raises ConfigError if one is missing."""
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        shards = [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder / INDEX}: not an index of safetensors files (weight_map: tensor to file)") from None
    if wrong := [path for path in shards if path.parent != folder or path.suffix != ".safetensors"]:
        raise ConfigError(f"{folder / INDEX}: names {few(wrong)}; safetensors files of the same folder expected")
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ConfigError(
            f"{folder / INDEX}: {len(missing)} of the {len(shards)} files that it names are missing ({few(missing)}); "
            "copy the complete folder"
        )
    return shards


def weights_digest(folder: Path) -> str:
    """SHA-256 of model.safetensors; of the names and hashes of its shards if there are several. Raises ConfigError
    (`weights_files`)."""
    files = weights_files(folder)
    if files == [folder / WEIGHTS]:
        return sha256(files[0])
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def table_rows(folder: Path) -> int:
    """Rows of the folder's embedding table, by its config.json. Raises ConfigError if it cannot be read."""
    try:
        return int(read_config_file(folder / CONFIG_FILE).get("vocab_size", _ROWS))
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None


def for_corpus(initial: InitialWeights, corpus: Corpus, vocabulary: Vocabulary) -> InitialWeights:
    """The weights for a corpus' vocabulary. vocabulary: see ModelConfig. Raises ConfigError if it is not as the
    setting says (`check_vocabulary`, `row_sources`)."""
    if vocabulary == "same":
        check_vocabulary(initial, corpus, or_change=True)
        return initial
    folder = initial.folder
    _check_padding(folder, corpus, "use a tokenizer with that id for padding")
    return replace(initial, rows=row_sources(folder, table_rows(folder), corpus, vocabulary))


def _check_padding(folder: Path, corpus: Corpus, remedy: str) -> None:
    content = read_config_file(folder / CONFIG_FILE)
    pad, ours = content.get("pad_token_id"), corpus.manifest.special_tokens.pad
    # Of BERT's models it decides nothing.
    if content.get("model_type", "bert") != "bert" and isinstance(pad, int) and pad != ours:
        raise ConfigError(
            f"{corpus.folder}: pads with token {ours}, the model in {folder} with {pad} (pad_token_id), from which "
            f"positions may be counted; {remedy}"
        )


def check_vocabulary(initial: InitialWeights, corpus: Corpus, *, or_change: bool = False) -> None:
    """Raise ConfigError if the corpus' token ids are not those that the weights were trained on.

    If the folder has a tokenizer (tokenizer.json or vocab.txt), the id of every token must match. The embedding table
    may have more rows than there are tokens: it is padded in many models. or_change: the message also names the setting
    that adapts the model.
    """
    folder, size = initial.folder, corpus.manifest.vocab_size
    remedy = f"build the corpus with that model's tokenizer (--tokenizer {folder})"
    rows = table_rows(folder)
    expected = token_ids(folder)
    found = token_ids(corpus.tokenizer_folder)
    if or_change and expected is not None and found is not None:
        extends = all(found.get(token) == index for token, index in expected.items())
        remedy += f", or set model.vocabulary to {'extend' if extends else 'match'} to adapt the model to the corpus"
    if size > rows or (expected is None and rows - size >= _PADDING):
        raise ConfigError(
            f"{corpus.folder}: its tokenizer has {size} tokens, but the model in {folder} has {rows}; {remedy}"
        )
    _check_padding(folder, corpus, f"build the corpus with that model's tokenizer (--tokenizer {folder})")
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
