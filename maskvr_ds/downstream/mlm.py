"""Masked-token figures of a model folder on a corpus: what training logs as held-out figures, for any model.

One process. The model may be a run (its newest checkpoint), a checkpoint, a Hugging Face folder, or a name on a hub, as
`model.initialize_from` takes it. A checkpoint attends within documents if it was trained so (data.attention), a folder
within rows. Weights are fp32, so that figures of a run trained in bf16 differ slightly from those
in its metrics.jsonl.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.shards import HELD_OUT, Corpus
from maskvr_ds.checkpoint.export import late_masks_of, load_model, separator_of
from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.config.architectures import CONFIG_FILE, read_config_file
from maskvr_ds.config.objectives import PAIR_CLASSES
from maskvr_ds.data.documents import check_borders
from maskvr_ds.downstream.locate import locate
from maskvr_ds.models import pretrained
from maskvr_ds.models.capabilities import check_length
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.initial_folder import (
    InitialWeights,
    check_vocabulary,
    table_rows,
    weights_digest,
    weights_files,
)
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.layout import BERT
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import atomic_write
from maskvr_ds.training.held_out import KINDS, HeldOut
from maskvr_ds.training.setup import encoder_config

logger = logging.getLogger(__name__)

# Title of a column -> key.
_COLUMNS = {
    "loss": "held_out_loss",
    "perplexity": "held_out_perplexity",
    "accuracy": "held_out_accuracy",
    **{f"{what} {kind}": f"held_out_{what}_{kind}" for kind in KINDS for what in ("loss", "accuracy")},
}


def evaluation_corpus(folder: Path) -> Corpus:
    """The held-out corpus of a corpus, or the corpus itself if it has none. Raises CorpusError."""
    return Corpus(folder / HELD_OUT if (folder / HELD_OUT).is_dir() else folder)


@dataclass(frozen=True)
class Source:
    """A model to be read. folder: a complete checkpoint, or a Hugging Face folder. is_checkpoint: which of them."""

    folder: Path
    is_checkpoint: bool


def find_model(model: str, corpus: Corpus) -> Source:
    """What to read for a run, a checkpoint, a Hugging Face folder or a name on a hub; reads no weights.

    Raises CheckpointError, ConfigError or HubError if it is none of them, has another vocabulary than the corpus, or
    fewer positions than its rows have tokens.
    """
    folder, is_checkpoint = locate(model)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected a run, a checkpoint or a model saved by transformers")
    if is_checkpoint:
        folder = checkpoints.newest(folder)
    else:
        weights_files(folder)
    described = folder / BERT if is_checkpoint else folder
    check_vocabulary(InitialWeights(described, ""), corpus)
    model_config = ModelConfig(initialize_from=described, untested=is_checkpoint)
    if fault := model_config.row_fault(corpus.sequence_length, corpus.manifest.special_tokens.pad):
        raise ConfigError(f"{corpus.folder}: {fault}")
    return Source(folder, is_checkpoint)


def load_masked_lm(source: Source, corpus: Corpus, *, new_head: bool | None = False) -> MaskedLanguageModel:
    """The model in fp32, on this process's device. Raises CheckpointError or ConfigError if its weights are damaged.

    new_head: None: a folder may lack the prediction head, which is then random: for what does not depend on it.
    """
    if source.is_checkpoint:
        checkpoints.verify(source.folder)
        state = checkpoints.read_state(source.folder)
        separator = separator_of(state)
        if separator is not None:
            check_borders(corpus)
        module = MaskedLanguageModel(load_model(source.folder), separator=separator, late=late_masks_of(state))
    else:
        config = ModelConfig(initialize_from=source.folder)
        # A run's export keeps the head for sentence pairs: the same figures as of the run.
        classes = read_config_file(source.folder / CONFIG_FILE).get("architectures") or [None]
        pair_head = classes[0] == PAIR_CLASSES.get(config.architecture, "")
        rows = table_rows(source.folder)
        module = MaskedLanguageModel(encoder_config(config, corpus, rows, pair_head=pair_head))
        # Without a head there is nothing to evaluate.
        pretrained.load(module.mlm, InitialWeights(source.folder, weights_digest(source.folder), new_head))
    check_length(module.eval(), corpus.sequence_length)
    return module.to(distributed.device())


def evaluate(models: Sequence[str], corpus: Corpus, *, rows: int, micro_size: int) -> dict[str, dict[str, float]]:
    """Model -> its held-out figures (`HeldOut.figures`). Call after `distributed.initialize`, in one process.

    models: as for `find_model`. rows: maximum number of rows, in the order in which training takes them. micro_size:
    sequences per forward pass.
    All models are looked at before the first is evaluated.
    """
    sources = {model: find_model(model, corpus) for model in models}
    if (remark := _attention_remark(sources)) is not None:
        logger.warning("%s", remark)
    held_out = HeldOut(corpus, rows=rows, micro_size=micro_size, rank=0, world_size=1, device=distributed.device())
    return {name: held_out.figures(load_masked_lm(source, corpus)) for name, source in sources.items()}


def _attention_remark(sources: Mapping[str, Source]) -> str | None:
    """What to know if some models attend within the documents of a row and others over the row; None if all do the
    same."""
    within = {
        model: source.is_checkpoint and separator_of(checkpoints.read_state(source.folder)) is not None
        for model, source in sources.items()
    }
    if len(set(within.values())) == 1:
        return None
    names = {value: ", ".join(model for model in within if within[model] is value) for value in (True, False)}
    return (
        f"{names[True]}: attention within documents, as trained; {names[False]}: over complete rows. Such figures do "
        "not compare: of a run and the model that it started from, compare those that the run has logged (event "
        "held_out, step 0, in metrics.jsonl)"
    )


def table(found: dict[str, dict[str, float]]) -> str:
    """One line per model, losses in nats per masked token."""
    lines = [("model", *_COLUMNS)]
    for model, figures in found.items():
        lines.append((model, *(f"{figures[key]:.4f}" for key in _COLUMNS.values())))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def write(path: Path, found: dict[str, dict[str, float]], corpus: Corpus, rows: int) -> None:
    """Write the figures as JSON; NaN (no prediction of a kind) becomes null."""
    finite = {m: {k: v if math.isfinite(v) else None for k, v in figures.items()} for m, figures in found.items()}
    atomic_write(path, json.dumps({"data": str(corpus.folder), "rows": rows, "mlm": finite}, indent=1) + "\n")
