"""Models to be fine-tuned: runs and checkpoints (exported to a temporary folder), folders of transformers, and names on
a hub (data_pipeline/hub.py)."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from maskvr_ds.checkpoint.export import export
from maskvr_ds.checkpoint.scores import model_digest
from maskvr_ds.config.architectures import longest_row
from maskvr_ds.downstream.locate import locate
from maskvr_ds.downstream.tasks import Kind, TaskError
from maskvr_ds.runtime.processes import exit_on_sigterm

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Without one of them, transformers would make up an empty tokenizer for some architectures.
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model")
_SHOWN = 3
# Other kinds: a head on the complete text.
_CLASSES: dict[Kind, Any] = {Kind.TOKENS: AutoModelForTokenClassification, Kind.SPAN: AutoModelForQuestionAnswering}
# Ends of the names of transformers' classes.
_SUFFIXES = {
    Kind.CLASSIFICATION: "ForSequenceClassification",
    Kind.REGRESSION: "ForSequenceClassification",
    Kind.TOKENS: "ForTokenClassification",
    Kind.SPAN: "ForQuestionAnswering",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """A model on disk. name: as given on the command line. folder: for `from_pretrained`. digest: SHA-256 of its
    weights, configuration and tokenizer. tokenizer: a fast tokenizer of transformers. fine_tuned: it was saved with a
    task head."""

    name: str
    folder: Path
    digest: str
    tokenizer: Any
    fine_tuned: bool = False

    @property
    def identity(self) -> dict[str, str]:
        """What decides the results of runs that start from it. Heads of fine-tuned models were kept in earlier versions
        if their shapes agreed."""
        return {"model": self.digest} | ({"head": "new"} if self.fine_tuned else {})

    @cached_property
    def _reads_spaces(self) -> bool:
        """Byte-level BPE has other tokens for words after a space than at the start of a text."""
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])

    def words(self, tokens: Sequence[str]) -> list[str]:
        """The words of a sentence as they are in running text."""
        return [f" {token}" if i and self._reads_spaces else token for i, token in enumerate(tokens)]

    def load(self, kind: Kind, labels: Sequence[str], weights: Path | None = None) -> Any:
        """The encoder with a new head, fp32, on the CPU; the head is drawn from torch's global generator.

        weights: folder of the encoder's weights; by default its own. Raises TaskError if it lacks weights of the
        encoder itself, which would stay random.
        """
        cls = _CLASSES.get(kind, AutoModelForSequenceClassification)
        names = dict(enumerate(("start", "end") if kind is Kind.SPAN else labels)) or {0: "score"}
        settings = {
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "problem_type": "regression" if kind is Kind.REGRESSION else None,
        }
        try:
            model, found = cls.from_pretrained(
                weights or self.folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                # A head for another number of classes is replaced.
                ignore_mismatched_sizes=True,
                **settings,
            )
        except Exception as error:  # whatever a damaged file or an architecture without this head raises
            raise TaskError(f"{self.name}: transformers cannot load it for {kind} ({_first_line(error)})") from None
        _check_loaded(self.name, model, found)
        if self.fine_tuned and weights is None:
            prefix = f"{model.base_model_prefix}."
            drawn = cls.from_config(model.config, dtype=torch.float32).state_dict()
            head = {key: value for key, value in drawn.items() if not key.startswith(prefix)}
            model.load_state_dict(head, strict=False)
        return model

    def load_fine_tuned(self, kind: Kind, labels: Sequence[str]) -> Any:
        """The model with the head that it was fine-tuned with, fp32, on the CPU, in eval mode.

        labels: of the task's file. Raises TaskError if the model has no such head, or one for other labels.
        """
        cls, suffix = _CLASSES.get(kind, AutoModelForSequenceClassification), _SUFFIXES[kind]
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        found = next(iter(config.architectures or []), "no class")
        if not found.endswith(suffix):
            raise TaskError(
                f"{self.name}: its config.json says {found}, a task of the kind {kind} needs a model ...{suffix}; "
                "fine-tune it on the task with `maskvr finetune` first"
            )
        names = [config.id2label[i] for i in range(config.num_labels)]
        unnamed = names == [f"LABEL_{i}" for i in range(len(names))]
        if kind is Kind.REGRESSION:
            if len(names) != 1:
                raise TaskError(f"{self.name}: has {len(names)} outputs, and a regression has one")
        elif len(names) == 1 or (names != list(labels) and not (unnamed and len(names) == len(labels))):
            raise TaskError(
                f"{self.name}: was fine-tuned on the labels {', '.join(names[:_SHOWN])} ({len(names)}), the task's "
                f"file has {', '.join(labels[:_SHOWN])} ({len(labels)}); give the file that it was fine-tuned on"
            )
        if unnamed and len(names) > 1:
            logger.warning("%s: its labels have no names; taken as %s, in this order", self.name, ", ".join(labels))
        try:
            model, info = cls.from_pretrained(
                self.folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # whatever a damaged file raises
            raise TaskError(f"{self.name}: transformers cannot load it ({_first_line(error)})") from None
        if info["missing_keys"]:
            raise TaskError(f"{self.name}: its weights lack {', '.join(sorted(info['missing_keys'])[:_SHOWN])}")
        return model.eval()


def _check_loaded(name: str, model: Any, found: dict[str, Any]) -> None:
    """Raise TaskError if a tensor of the encoder was not in the file, or has another shape there."""
    prefix = f"{model.base_model_prefix}."
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in found.get("mismatched_keys", ())}
    random = sorted(
        key
        for key in {*found["missing_keys"], *mismatched}
        # Masked language models have no pooler; task heads train one.
        if key.startswith(prefix) and "pooler" not in key
    )
    if random:
        raise TaskError(
            f"{name}: its weights lack {len(random)} tensors of the encoder, or have other shapes than its "
            f"config.json says: {', '.join(random[:_SHOWN])}"
        )


@contextmanager
def prepared(models: Sequence[str], lengths: Mapping[Kind, int]) -> Iterator[list[Encoder]]:
    """The models, checked for these kinds of tasks and their lengths in tokens (`check`). Runs and checkpoints are
    exported to a temporary folder, which exists as long as the context.

    models: run (its newest checkpoint), checkpoint, folder of transformers, or name on a hub. Raises TaskError,
    HubError, CheckpointError or ExportError before the first one is evaluated.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if len(set(models)) < len(models):
        raise TaskError("a MODEL is given twice")
    # A time limit must not leave exports of all checkpoints behind.
    with exit_on_sigterm(), tempfile.TemporaryDirectory(prefix="maskvr-") as exports:
        found = [_prepare(name, Path(exports) / str(i)) for i, name in enumerate(models)]
        for encoder in found:
            check(encoder, lengths)
        yield found


def _prepare(name: str, exported: Path) -> Encoder:
    folder, is_checkpoint = locate(name)
    if not folder.is_dir():
        raise TaskError(f"{name}: no such folder; expected a run, a checkpoint or a model saved by transformers")
    if is_checkpoint:
        export(folder, exported)
        folder = exported
    if not (folder / _CONFIG).is_file():
        raise TaskError(f"{name}: has no {_CONFIG}; expected a run, a checkpoint or a model saved by transformers")
    if not any((folder / file).is_file() for file in _WEIGHTS):
        raise TaskError(f"{name}: has no weights ({', '.join(_WEIGHTS)})")
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise TaskError(
            f"{name}: has no tokenizer ({', '.join(_TOKENIZERS)}); save the model's tokenizer to the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class named in the folder raises
        raise TaskError(f"{name}: transformers cannot load its tokenizer ({_first_line(error)})") from None
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise TaskError(f"{name}: its tokenizer {'has no padding token' if tokenizer.is_fast else 'is not a fast one'}")
    single, pair = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
    if not 0 < single < pair:
        raise TaskError(
            f"{name}: its tokenizer adds {single} special tokens to a text and {pair} to a pair, so that no token "
            "stands for a text or none separates two; give its tokenizer.json a post_processor"
        )
    # Positions of tokens are those of the unpadded text.
    tokenizer.padding_side = "right"
    return Encoder(name, folder, model_digest(folder), tokenizer, _has_task_head(folder))


def _has_task_head(folder: Path) -> bool:
    config = json.loads((folder / _CONFIG).read_bytes())
    return any(str(name).endswith(tuple(_SUFFIXES.values())) for name in config.get("architectures") or ())


@torch.no_grad()
def check(encoder: Encoder, lengths: Mapping[Kind, int]) -> None:
    """Raise TaskError if the model cannot be loaded for these kinds of tasks, or cannot compute a row of as many
    tokens, the vocabulary's last one.

    By a forward pass: architectures differ in how many of their positions texts can use.
    """
    tokenizer = encoder.tokenizer
    for kind, max_length in lengths.items():
        model = encoder.load(kind, ("a", "b")).eval()
        if len(tokenizer) > model.config.vocab_size:
            raise TaskError(
                f"{encoder.name}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: they "
                "are not of the same model"
            )
        # Architectures without a table of positions would compute lengths that they were not trained on.
        positions = max_length
        if table := getattr(model.config, "max_position_embeddings", None):
            positions = longest_row(model.config.model_type, table, model.config.pad_token_id or 0)
        ids = torch.full((1, max_length), len(tokenizer) - 1)
        try:
            if max_length > positions:
                raise IndexError
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            raise TaskError(
                f"{encoder.name}: cannot read {max_length} tokens (it has {positions} positions); lower --max-length"
            ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
