"""Export of a checkpoint as a Hugging Face folder, verified before it appears under its name.

Every checkpoint stores a few masked rows and the engine's logits on them. The exported folder is loaded with
`from_pretrained`, cast to the engine's precision, and must reproduce these logits through transformers' own forward
pass; otherwise nothing is written.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM
from transformers.utils import logging

from maskvr_ds.checkpoint import load
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import CheckpointError
from maskvr_ds.run_folder.layout import BERT

# Case, accents, punctuation, other scripts, a special token in plain text.
_SAMPLES = ("Hello World, naïve CAFÉ!", "tokens: don't, e-mail, 3.14\n\ttab", "Ünïcode 東京 привет", "a [MASK] b")
# Maximum difference of a logit, relative to the largest logit (absolute below 1). One rounding: 2^-8 in bf16, 2^-11
# in fp16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}


class ExportError(ValueError):
    """The export could not be written, or its logits differ from the engine's."""


def export(source: str | Path, output: str | Path) -> float:
    """Write a BertForMaskedLM (fp32, safetensors) with its tokenizer; returns the maximum difference of a logit.

    source: a checkpoint, or a run (its newest complete checkpoint). output: must not exist, or be an empty folder.
    Raises CheckpointError for a missing or damaged checkpoint, ExportError if logits differ or output is in use.
    """
    logging.disable_progress_bar()
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} exists and is not an empty folder; choose another --output")
    folder = checkpoints.newest(Path(source))
    checkpoints.verify(folder)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(folder, partial)
        difference = _compare(folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.replace(output)
    return difference


def load_model(folder: Path) -> BertForMaskedLM:
    """A checkpoint's model in fp32, in training mode, on the CPU. Raises CheckpointError if weights do not fit."""
    model = BertForMaskedLM(AutoConfig.from_pretrained(folder / BERT))
    missing, unexpected = model.load_state_dict(load.read_weights(folder), strict=False)
    # Tied tensors are stored once; anything else that is missing would stay random.
    untied = sorted(set(missing) - set(model._tied_weights_keys))
    if untied or unexpected:
        raise CheckpointError(f"{folder}: weights do not fit the model: missing {untied}, unexpected {unexpected}")
    model.tie_weights()
    return model


def _write(folder: Path, output: Path) -> None:
    load_model(folder).save_pretrained(output)
    _write_tokenizer(folder / BERT, output)


def _write_tokenizer(source: Path, output: Path) -> None:
    """Copy the tokenizer's files and ensure that transformers encodes as the tokenizer that built the corpus.

    Next to a BERT's config.json, AutoTokenizer may build a lower-casing BertTokenizer from the vocabulary and ignore
    tokenizer.json. Raises ExportError if that cannot be prevented.
    """
    for file in source.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, output / file.name)
    exact = Tokenizer.from_file(str(source / "tokenizer.json"))
    expected = [exact.encode(text).ids for text in _SAMPLES]
    if [AutoTokenizer.from_pretrained(output)(text)["input_ids"] for text in _SAMPLES] == expected:
        return
    config = output / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if [AutoTokenizer.from_pretrained(output)(text)["input_ids"] for text in _SAMPLES] != expected:
        raise ExportError(
            f"{source}: transformers encodes with this folder otherwise than its tokenizer.json; "
            "correct tokenizer_config.json in the corpus, and resume training from there"
        )


@torch.no_grad()
def _compare(folder: Path, output: Path) -> float:
    dtype = checkpoints.read_state(folder).dtype
    model = BertForMaskedLM.from_pretrained(output, dtype=getattr(torch, dtype)).eval()
    probe = load.read_probe(folder)
    logits = model(input_ids=probe["input_ids"], attention_mask=probe.get("attention_mask")).logits.float()
    K, V = probe["logits"].shape[1:]
    predicted = logits.gather(1, probe["positions"][..., None].expand(-1, K, V))
    difference = (predicted - probe["logits"]).abs().max().item()
    allowed = TOLERANCE[dtype] * max(1.0, probe["logits"].abs().max().item())
    # "not <=" also refuses NaN.
    if not difference <= allowed:
        raise ExportError(
            f"the export's logits differ from the engine's by {difference:.3g}, more than {allowed:.3g}: not written. "
            f"The checkpoint {folder} and the installed transformers do not compute the same model"
        )
    return difference
