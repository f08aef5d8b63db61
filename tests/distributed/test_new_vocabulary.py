"""Runs with more tokens than the model that they are initialised from: the same weights on any ranks, at any stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig

from data_pipeline.build import build
from data_pipeline.tokenization.tokenizer import Encoder
from data_pipeline.tokenization.training import extend_tokenizer
from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import export
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Life, column, configuration, free_ports, live, train_all
from tests.support.tokenizers import DOMAIN, bert

TABLE = "bert.embeddings.word_embeddings.weight"
FROZEN: dict[str, Any] = {"optimizer": {"lr": 1e-30}, "schedule": {"warmup_steps": 0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, a BERT with its tokenizer, and `corpus`, built with three words more."""
    root = tmp_path_factory.mktemp("world")
    bert(root / "model")
    (root / "text.txt").write_text("\n".join(f"{DOMAIN}\n{'word ' * (i % 7)}" for i in range(120)), encoding="utf-8")
    extend_tokenizer([root / "text.txt"], root / "model", 3, root / "tokenizer")
    build([root / "text.txt"], tokenizer=root / "tokenizer", sequence_length=16, output=root / "corpus", progress=False)
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    rows = len(Encoder(root / "model").tokenizer.get_vocab())
    model = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=rows, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(root / "model")
    return root


def extended(world: Path, output: Path, *, steps: int, **sections: Any) -> dict[str, Any]:
    values = configuration(output, world / "corpus", steps=steps, evaluation={"every_steps": 0}, **sections)
    values["model"] = {"initialize_from": str(world / "model"), "vocabulary": "extend"}
    return values


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_start_with_the_same_weights(world: Path, tmp_path: Path, world_size: int) -> None:
    names = ["zero0_fp32", "zero1_fp32", "zero2_bf16", "zero3_fp32", "zero3_bf16"]
    jobs = [(extended(world, tmp_path / name, steps=1, deepspeed=name, **FROZEN), None) for name in names]
    assert run_ranks(train_all, world_size, jobs) == [[None] * len(jobs)] * world_size
    model = AutoModelForMaskedLM.from_pretrained(world / "model")
    old, tokenizer = model.get_input_embeddings().weight, Encoder(world / "model").tokenizer
    new = Encoder(world / "corpus" / "tokenizer").tokenizer
    for name in names:
        weights = load.read_weights(complete_checkpoints(tmp_path / name)[-1])
        assert torch.equal(weights[TABLE][: len(old)], old)
        for word in new.get_vocab().keys() - tokenizer.get_vocab().keys():
            pieces, index = tokenizer.encode(word, add_special_tokens=False).ids, new.token_to_id(word)
            torch.testing.assert_close(weights[TABLE][index], old[pieces].mean(0))
            bias = model.cls.predictions.bias
            torch.testing.assert_close(weights["cls.predictions.bias"][index], bias[pieces].mean())
        event = read_events(tmp_path / name / METRICS)[0]
        assert (event["vocabulary"], event["kept"], event["averaged"], event["fresh"]) == ("extend", len(old), 3, 0)


def test_killed_resumed_and_exported(world: Path, tmp_path: Path) -> None:
    """Also without the model's folder, whose table is smaller; the export has the new tokens."""
    (tmp_path / "once").mkdir()
    for path in (world / "model").iterdir():
        (tmp_path / "once" / path.name).write_bytes(path.read_bytes())

    def job(name: str, **model: Any) -> tuple[dict[str, Any], str | None]:
        values = extended(world, tmp_path / name, steps=9, checkpoint={"every_steps": 3})
        values["model"] |= {"initialize_from": str(tmp_path / "once"), **model}
        return values, "auto"

    lives = [
        Life([job("uninterrupted")]),
        Life([job("killed")], kill=("step", 5)),
        Life([job("killed", vocabulary="same"), job("killed")], delete=tmp_path / "once"),
    ]
    answers = run_ranks(live, 2, lives, free_ports(len(lives)), timeout=600)[0]
    assert answers[:2] == [[None], "killed"]
    assert "started with model.vocabulary extend, and it is same now" in answers[2][0]
    assert answers[2][1] is None
    figures = ("step", "loss", "grad_norm", "data_digest", "mask_digest")
    assert column(tmp_path / "killed", *figures) == column(tmp_path / "uninterrupted", *figures)
    export(tmp_path / "killed", tmp_path / "export")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert model.config.vocab_size == len(tokenizer) == len(Encoder(world / "model").tokenizer.get_vocab()) + 3
    assert len(tokenizer("kubernetes", add_special_tokens=False)["input_ids"]) == 1
    assert "`model.vocabulary` | extend" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
