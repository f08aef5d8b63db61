"""Recipes of other architectures than BERT, and of pairs, shrunk: they train, and the model is the one they name."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import ModernBertConfig, ModernBertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from maskvr_ds.config import dump_config, load_config
from tests.distributed.ranks import run_ranks
from tests.distributed.training import metrics, train_all
from tests.support.corpora import PAD_IS_1, make_corpus
from tests.support.pairs import make_pairs

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"vocab_size": 25, "pad_token_id": 1, "bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
STEPS = {
    "albert_base_4k": 6,
    "bert_large_64k_32k_nsp": 6,
    "modernbert_base": 18,
    "modernbert_domain": 12,
    "roberta_domain": 6,
}
COMMON = (
    "batch.global_size=8",
    "batch.micro_size=4",
    "evaluation.every_steps=3",
    "evaluation.rows=8",
    "checkpoint.every_steps=0",
    "monitor.tensorboard=false",
)


def released(folder: Path, recipe: str) -> Path:
    """A small stand-in for the weights that the recipe names."""
    torch.manual_seed(0)
    if recipe == "modernbert_domain":
        model: Any = ModernBertForMaskedLM(ModernBertConfig(**SIZES, **IDS, max_position_embeddings=64))
    else:
        config = RobertaConfig(**SIZES, **IDS, max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5)
        model = RobertaForMaskedLM(config)
    model.save_pretrained(folder)
    return folder


def corpus_of(folder: Path, length: int = 32) -> Path:
    make_corpus(folder / "held_out", rows=20, length=length, words=20, seed=1, special=PAD_IS_1)
    return make_corpus(folder, rows=60, length=length, words=20, special=PAD_IS_1)


def shrunk(recipe: str, folder: Path) -> dict[str, Any]:
    """The recipe's own settings but sizes, batches, lengths and paths."""
    changes = [f"output_dir={folder / 'run'}", *COMMON]
    if recipe == "modernbert_base":
        small = {**SIZES, "max_position_embeddings": 64}
        changes += [f"model.settings={{{', '.join(f'{k}: {v}' for k, v in small.items())}}}"]
        corpora = {length: corpus_of(folder / str(length), length) for length in (16, 64)}
        for phase in load_config(recipe).phases:
            where, size = f"phases.{phase.name}", phase.batch["global_size"]
            changes += [f"{where}.data.path={corpora[16 if phase.name.startswith('batch') else 64]}"]
            changes += [f"{where}.training.tokens=null", f"{where}.training.steps=3"]
            changes += [f"{where}.batch.global_size={max(8, size // 192)}", f"{where}.batch.micro_size=4"]
        changes += ["phases.batch_768.schedule.warmup_steps=1"]
        changes = [change for change in changes if not change.startswith("batch.")]
    elif recipe == "bert_large_64k_32k_nsp":
        # Sizes of the preset are fields of their own.
        changes += ["model.preset=null", *(f"model.{key}={size}" for key, size in SIZES.items())]
        changes = [change for change in changes if not change.startswith("batch.")]
        for phase in ("length_128", "length_512"):
            corpus = make_pairs(folder / phase, "nsp", rows=60)
            make_pairs(corpus / "held_out", "nsp", rows=20, seed=1)
            where = f"phases.{phase}"
            changes += [f"{where}.data.path={corpus}", f"{where}.training.steps=3"]
            changes += [f"{where}.batch.global_size=8", f"{where}.batch.micro_size=4"]
    elif recipe == "albert_base_4k":
        corpus = make_pairs(folder / "corpus", "sop", rows=60)
        make_pairs(corpus / "held_out", "sop", rows=20, seed=1)
        small = {**SIZES, "embedding_size": 16, "max_position_embeddings": 64}
        changes += [f"data.path={corpus}", f"model.settings={{{', '.join(f'{k}: {v}' for k, v in small.items())}}}"]
        changes += ["training.steps=6", "schedule.warmup_steps=1"]
    else:
        changes += [f"data.path={corpus_of(folder / 'corpus')}"]
        changes += [f"model.initialize_from={released(folder / 'model', recipe)}"]
        changes += ["training.tokens=null", f"training.steps={STEPS[recipe]}"]
    values = yaml.safe_load(dump_config(load_config(recipe, changes)))
    del values["schema"]
    return values


@pytest.mark.parametrize("recipe", STEPS)
def test_a_shrunk_recipe_trains(tmp_path: Path, recipe: str) -> None:
    values = shrunk(recipe, tmp_path)
    assert run_ranks(train_all, 1, [(values, None)], timeout=600) == [[None]]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, STEPS[recipe] + 1)]
    assert all(line["loss"] < 5 for line in lines)
    assert "held_out_loss" in lines[-1]
    assert ("held_out_pair_accuracy" in lines[-1]) == (recipe in ("albert_base_4k", "bert_large_64k_32k_nsp"))
    if recipe.startswith("modernbert"):
        # Warm-up, stable part, decay to 0 by 1 − √t.
        rates = [line["lr"] for line in lines]
        peak = 3e-4
        assert rates[-2] <= peak
        assert rates[-1] < peak / 2
    if recipe == "modernbert_base":
        # The batch is raised at a constant rate: the schedule of the first phase continues.
        grown = [new["samples"] - old["samples"] for old, new in pairwise(lines[:12])]
        assert grown == [8] * 5 + [16] * 3 + [24] * 3
        assert rates[1:12] == [8e-4] * 11
