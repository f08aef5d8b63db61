"""Export of a checkpoint as a Hugging Face folder with a model card, verified before it appears under its name.

Every checkpoint stores a few masked rows and the engine's logits on them. The exported folder is loaded with
`from_pretrained`, cast to the engine's precision, and must reproduce these logits through transformers' own forward
pass; otherwise nothing is written.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export_check import check_fill_mask
from maskvr_ds.checkpoint.model_card import MODEL_CARD, model_card
from maskvr_ds.checkpoint.scores import model_digest, read_scores
from maskvr_ds.config.architectures import longest_row
from maskvr_ds.models.documents import starts
from maskvr_ds.models.encoder import auto_class, build, names_of_parameters, token_types
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.run_folder.layout import BERT
from maskvr_ds.runtime.files import folder_in_progress, fsync_path

TOKENIZER_CONFIG = "tokenizer_config.json"

# Case, accents, punctuation, other scripts, a special token in plain text.
_SAMPLES = ("Hello World, naïve CAFÉ!", "tokens: don't, e-mail, 3.14\n\ttab", "Ünïcode 東京 привет", "a [MASK] b")
_NAME_OF_SPECIAL = re.compile(r"\[[A-Z]+\]")
# Maximum difference of a logit, relative to the largest logit (absolute below 1). One rounding: 2^-8 in bf16, 2^-11
# in fp16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}


class ExportError(ValueError):
    """The export could not be written, or its logits differ from the engine's."""


@dataclass(frozen=True)
class Exported:
    """difference: maximum difference of a logit from the engine's. architecture: class of transformers. remarks: about
    the tokenizer, a sentence each. predictions: of the trial with fill-mask; None without one."""

    difference: float
    architecture: str
    remarks: tuple[str, ...]
    predictions: str | None = None


def export(
    source: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    scores: str | Path | None = None,
    check: bool = False,
) -> Exported:
    """Write the model of transformers (fp32, safetensors) with its tokenizer and a model card.

    source: a checkpoint, or a run (its newest complete checkpoint). output: must not exist, or be an empty folder.
    name: of the model in its card, by which users load it; None: the folder's.
    license: for the card, a hub's identifier such as apache-2.0. scores: folder of `maskvr evaluate`, whose rows of
    this model are for the card. check: run transformers' fill-mask on the result.
    Raises CheckpointError for a missing or damaged checkpoint, ExportError if logits differ or output is in use,
    ScoresError if there are no scores of this model, CheckError if fill-mask fails; nothing is written then.
    """
    logging.disable_progress_bar()
    target = _target(Path(output))
    folder = checkpoints.newest(Path(source))
    checkpoints.verify(folder)
    with folder_in_progress(target) as partial:
        model = load_model(folder)
        model.save_pretrained(partial)
        remarks = _write_tokenizer(folder / BERT, partial)
        config = model.config
        positions = longest_row(config.model_type, config.max_position_embeddings, config.pad_token_id or 0)
        _limit_length(partial, positions)
        difference = _compare(folder, partial)
        card = model_card(
            name or target.name,
            folder,
            checkpoints.read_state(folder),
            model.config,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            license=license,
            scores=read_scores(Path(scores), model_digest(partial)) if scores is not None else (),
        )
        (partial / MODEL_CARD).write_text(card, encoding="utf-8")
        _share(partial)
        predictions = _try(folder, partial, positions) if check else None
        for path in (*partial.rglob("*"), partial):
            fsync_path(path)
        try:
            partial.rename(target)  # replaces an empty folder, nothing else
        except OSError as error:
            raise ExportError(
                f"{output}: cannot be written ({error.strerror}): another program has written there meanwhile, or it "
                "is a mount point; choose another --output"
            ) from None
        fsync_path(target.parent)
    return Exported(difference, type(model).__name__, tuple(remarks), predictions)


def _target(output: Path) -> Path:
    """The absolute path of the folder to write. Raises ExportError if it is in use."""
    target = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} exists and is not an empty folder; choose another --output")
    if not (parent := next(path for path in target.parents if path.exists())).is_dir():
        raise ExportError(f"{output}: {parent} is a file, a folder expected; choose another --output")
    # It will be replaced by another folder of the same name, and this process, or a shell, would be in none.
    if Path.cwd().is_relative_to(target):
        raise ExportError(f"{output}: is the current folder or one above it; name a new folder as --output")
    if target.is_mount():
        raise ExportError(f"{output}: is a mount point and cannot be replaced; name a new folder in it as --output")
    return target


def load_model(folder: Path) -> PreTrainedModel:
    """A checkpoint's model in fp32, in training mode, on the CPU. Raises CheckpointError if weights do not fit, or the
    model is none of transformers."""
    if (other := checkpoints.read_state(folder).identity["model"].get("normalization")) is not None:
        raise CheckpointError(
            f"{folder}: was trained with model.normalization {other}, which no architecture of transformers has in "
            "place of its LayerNorms: such a model can be neither exported nor loaded outside of training; its "
            "held-out figures are in metrics.jsonl"
        )
    model = build(AutoConfig.from_pretrained(folder / BERT))
    missing, unexpected = model.load_state_dict(load.read_weights(folder), strict=False)
    # Tied tensors are stored once; anything else that is missing would stay random.
    stored = {name for names in names_of_parameters(model).values() if not set(names) <= set(missing) for name in names}
    untied = sorted(set(missing) - stored)
    if untied or unexpected:
        raise CheckpointError(f"{folder}: weights do not fit the model: missing {untied}, unexpected {unexpected}")
    model.tie_weights()
    return model


def separator_of(state: CheckpointState) -> int | None:
    """Id of the token that ends a document if the checkpoint was trained with attention within documents, else None."""
    documents = state.identity.get("data.attention") == "documents"
    return int(state.identity["special_tokens"]["sep"]) if documents else None


def late_masks_of(state: CheckpointState, hidden: int = 0) -> LateMasks | None:
    """Where [MASK] entered the model in training; None: at the first layer. hidden: positions that the layers below
    have less of; evaluation shortens no row."""
    layer = state.identity["masking"].get("late_layer", 0)
    return LateMasks(layer, int(state.identity["special_tokens"]["mask"]), hidden) if layer else None


def _write_tokenizer(source: Path, output: Path) -> list[str]:
    """Copy the tokenizer's files and see to it that transformers encodes as the tokenizer that built the corpus.

    Next to a BERT's config.json, AutoTokenizer may build a lower-casing BertTokenizer from the vocabulary and ignore
    tokenizer.json. Returns what a user of the folder should know, one sentence each: the weights are right, so that a
    tokenizer which transformers reads otherwise is no reason to refuse them.
    """
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, output / file.name)
    exact = Tokenizer.from_file(str(source / "tokenizer.json"))
    # transformers pads and truncates as it is asked to, never by the file; corpora are built without either.
    exact.no_padding()
    exact.no_truncation()
    known = {token.content for token in exact.get_added_tokens_decoder().values()}
    unregistered = {name for text in _SAMPLES for name in _named(text) if exact.token_to_id(name) is not None} - known
    remarks = []
    if unregistered:
        remarks.append(
            f"tokenizer.json does not register {', '.join(sorted(unregistered))} as special: in the corpus such names "
            "in texts are split like words, transformers reads them as special tokens"
        )
    texts = [text for text in _SAMPLES if not _named(text) & unregistered]
    expected = {text: exact.encode(text).ids for text in texts}
    if _difference(output, expected) is None:
        return remarks
    config = output / TOKENIZER_CONFIG
    settings = _settings(config)
    kept = {key: value for key, value in settings.items() if key.endswith("_token") or key == "model_max_length"}
    for changed in (settings, kept):
        _write_settings(config, {**changed, "tokenizer_class": "PreTrainedTokenizerFast"})
        if (difference := _difference(output, expected)) is None:
            return remarks
    if (source / config.name).is_file():
        shutil.copyfile(source / config.name, config)
    else:
        config.unlink()
    return [
        *remarks,
        f"{difference}; use tokenizers.Tokenizer.from_file on the folder's tokenizer.json, which is exact",
    ]


def _limit_length(folder: Path, positions: int) -> None:
    """Set the tokenizer's model_max_length to the positions that the model can use, unless its own is smaller.

    Without it, or with that of another model, `truncation=True` leaves texts longer than the model can read.
    """
    config = folder / TOKENIZER_CONFIG
    settings = _settings(config)
    own = settings.get("model_max_length")
    if isinstance(own, int | float) and not isinstance(own, bool) and 0 < own < positions:
        return
    _write_settings(config, {**settings, "model_max_length": positions})


def _share(folder: Path) -> None:
    """Give every file the permissions that the umask allows to a new one: safetensors writes for the owner only."""
    mode = (folder / MODEL_CARD).stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)


def _try(folder: Path, output: Path, positions: int) -> str:
    """Run fill-mask on the export with a row of the checkpoint's probe; returns prompt and predictions."""
    probe = load.read_probe(folder)
    return check_fill_mask(output, probe["input_ids"][0].tolist(), int(probe["positions"][0, 0]), positions)


def _named(text: str) -> set[str]:
    return set(_NAME_OF_SPECIAL.findall(text))


def _difference(folder: Path, expected: dict[str, list[int]]) -> str | None:
    """How transformers' tokenizer of the folder differs from `expected` (text -> ids); None if it does not."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for text, ids in expected.items():
            if (found := tokenizer(text)["input_ids"]) != ids:
                return f"transformers encodes {text!r} as {found}, the tokenizer of the corpus as {ids}"
    except Exception as error:  # whatever the class named in the folder raises
        return f"transformers cannot load the tokenizer ({type(error).__name__}: {error})"
    return None


def _settings(path: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _by_document(model: PreTrainedModel, ids: torch.Tensor, separator: int) -> torch.Tensor:
    """Logits [B, L, V] of rows int64 [B, L], each document alone, as users of the export will feed it."""
    rows = ([model(input_ids=part[None])[0][0] for part in _documents(row, separator)] for row in ids)
    return torch.stack([torch.cat(parts) for parts in rows])


def _documents(row: torch.Tensor, separator: int) -> tuple[torch.Tensor, ...]:
    """The documents of a row int64 [L], with their separators; padding behind the last one counts as one."""
    (first,) = starts(row[None], separator)[0].nonzero(as_tuple=True)
    return row.tensor_split(first[1:].tolist())


@torch.no_grad()
def _compare(folder: Path, output: Path) -> float:
    state = checkpoints.read_state(folder)
    dtype, separator = state.dtype, separator_of(state)
    cls = auto_class(AutoConfig.from_pretrained(output))
    model = cls.from_pretrained(output, dtype=getattr(torch, dtype)).eval()
    probe = load.read_probe(folder)
    ids, mask = probe["input_ids"], probe.get("attention_mask")
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "segment_starts" in probe:
        inputs["token_type_ids"] = token_types(ids, mask, probe["segment_starts"])
    found: Any = model(**inputs) if separator is None else (_by_document(model, ids, separator),)
    K, V = probe["logits"].shape[1:]
    predicted = found[0].float().gather(1, probe["positions"][..., None].expand(-1, K, V))
    difference = (predicted - probe["logits"]).abs().max().item()
    if "pair_logits" in probe:
        difference = max(difference, (found[1].float() - probe["pair_logits"]).abs().max().item())
    allowed = TOLERANCE[dtype] * max(1.0, probe["logits"].abs().max().item())
    # "not <=" also refuses NaN.
    if not difference <= allowed:
        raise ExportError(
            f"the export's logits differ from the engine's by {difference:.3g}, more than {allowed:.3g}: not written. "
            f"The checkpoint {folder} and the installed transformers do not compute the same model"
        )
    return difference
