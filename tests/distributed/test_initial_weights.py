"""Runs initialised from a pretrained model: at first they compute what that model computes, on any ranks."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import export
from maskvr_ds.cli import main
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, Life, column, configuration, free_ports, live, metrics, train_all
from tests.support.corpora import make_corpus
from tests.support.tasks import results, write_sst2

HELD_OUT_KEYS = (
    *(f"held_out_{what}{kind}" for what in ("loss", "accuracy") for kind in ("", "_mask", "_kept", "_random")),
    "held_out_perplexity",
    "held_out_unigram_entropy",
)
# A learning rate so small that no fp32 weight changes: one step, then an evaluation of the given model.
FROZEN: dict[str, Any] = {"optimizer": {"lr": 1e-30}, "schedule": {"warmup_steps": 0}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(folder, rows=200, words=20)
    make_corpus(folder / "held_out", rows=60, words=20, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    values = configuration(run, corpus, steps=20, model=NO_DROPOUT)
    assert run_ranks(train_all, 2, [(values, None)]) == [[None], [None]]
    return run


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    """Its export in the format of the first BERTs: old parameter names, pooler, next-sentence head, tied copies."""
    folder = trained.with_name("model")
    export(trained, folder)
    weights = load_file(folder / "model.safetensors")
    for name in list(weights):
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            if name.endswith(new):
                weights[name.replace(new, old)] = weights.pop(name)
    weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    weights["bert.pooler.dense.bias"] = torch.zeros(32)
    weights["cls.seq_relationship.bias"] = torch.zeros(2)
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def started_from(model: Path, output: Path, corpus: Path, *, steps: int, **sections: Any) -> dict[str, Any]:
    values = configuration(output, corpus, steps=steps, **sections)
    values["model"] = {"initialize_from": str(model), **sections.get("model", {})}
    return values


@pytest.mark.parametrize("world_size", [1, 2])
def test_starts_from_the_weights_of_the_model(
    trained: Path, model: Path, corpus: Path, tmp_path: Path, world_size: int
) -> None:
    """All weights and the held-out loss, at each ZeRO stage; in bf16 and fp16 the masters are not rounded."""
    names = ["zero0_fp32", "zero2_fp32", "zero3_fp32", "zero0_bf16", "zero2_bf16", "zero3_bf16", "zero1_fp16"]
    jobs = [(started_from(model, tmp_path / name, corpus, steps=1, deepspeed=name, **FROZEN), None) for name in names]
    assert run_ranks(train_all, world_size, jobs, True) == [[None] * len(jobs)] * world_size
    expected = load.read_weights(complete_checkpoints(trained)[-1])
    for name in names:
        run = tmp_path / name
        weights = load.read_weights(complete_checkpoints(run)[-1])
        assert weights.keys() == expected.keys()
        differing = [key for key in expected if not torch.equal(weights[key], expected[key])]
        assert not differing, name
        tolerance = 1e-5 if name.endswith("fp32") else 2e-2
        assert metrics(run)[-1]["held_out_loss"] == pytest.approx(metrics(trained)[-1]["held_out_loss"], abs=tolerance)
        first, before = read_events(run / METRICS)[:2]
        assert (first["event"], first["step"], first["folder"]) == ("initialized", 0, str(model))
        assert (before["event"], before["step"]) == ("held_out", 0)
        last = metrics(trained)[-1]
        for key in HELD_OUT_KEYS:
            assert before[key] == pytest.approx(last[key], abs=tolerance, rel=tolerance), (name, key)


def test_evaluate_gives_the_figures_of_training_for_run_checkpoint_and_export(
    trained: Path, model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, output = tmp_path / "exported", tmp_path / "figures.json"
    export(trained, exported)
    models = [str(path) for path in (trained, complete_checkpoints(trained)[-1], exported, model)]
    words = ["evaluate", *models, "--tasks", "mlm", "--data", str(corpus), "--rows", "50", "--output", str(output)]
    assert main([*words, "--micro-size", "7"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert (found["data"], found["rows"], list(found["mlm"])) == (str(corpus / "held_out"), 50, models)
    last = metrics(trained)[-1]
    for name, figures in found["mlm"].items():
        assert f"{name} " in printed
        assert {key: figures[key] for key in HELD_OUT_KEYS} == pytest.approx(
            {k: last[k] for k in HELD_OUT_KEYS}, rel=1e-5
        )


def test_downstream_tasks_of_run_checkpoint_and_export(trained: Path, model: Path, tmp_path: Path) -> None:
    """They are the same model, so that each fine-tuning is done once; the old parameter names are read as well."""
    exported, output = tmp_path / "exported", tmp_path / "scores"
    export(trained, exported)
    models = [str(path) for path in (trained, complete_checkpoints(trained)[-1], exported, model)]
    words = ["evaluate", *models, "--tasks", "sst2", "--data", str(write_sst2(tmp_path / "tasks", train=60))]
    words += ["--output", str(output), "--learning-rates", "1e-3", "--epochs", "1", "--max-length", "16"]
    assert main([*words, "--seeds", "2"]) == 0
    rows = results(output, "sst2")["rows"]
    assert [name for name in rows if name in models] == models
    assert len({json.dumps(rows[name]["scores"]) for name in models[:3]}) == 1
    # Of two models and the bag of words.
    assert len(list((output / "runs" / "sst2").iterdir())) == 2 * 2 + 1


def train_elsewhere(values: dict[str, Any]) -> list[str | None]:
    """On a rank: train; only rank 0 is given a folder that exists."""
    if os.environ["RANK"] != "0":
        values["model"]["initialize_from"] += "-not-here"
    return train_all([(values, None)])


def test_only_rank_0_needs_the_folder(trained: Path, model: Path, corpus: Path, tmp_path: Path) -> None:
    values = started_from(model, tmp_path / "run", corpus, steps=1, **FROZEN)
    assert run_ranks(train_elsewhere, 2, values) == [[None], [None]]
    found, expected = (metrics(run)[-1]["held_out_loss"] for run in (tmp_path / "run", trained))
    assert found == pytest.approx(expected, abs=1e-5)


def test_resume_needs_no_folder(model: Path, corpus: Path, tmp_path: Path) -> None:
    """Killed on 2 ranks with dropout, folder deleted, resumed: bit-identical; sizes come from the checkpoint."""
    once = tmp_path / "once"
    shutil.copytree(model, once)

    def job(name: str, folder: Path) -> tuple[dict[str, Any], str | None]:
        return started_from(folder, tmp_path / name, corpus, steps=12, checkpoint={"every_steps": 4}), "auto"

    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    weights["cls.predictions.decoder.bias"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    without = configuration(tmp_path / "killed", corpus, steps=12, checkpoint={"every_steps": 4})
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    uninterrupted, killed = job("uninterrupted", once), job("killed", once)
    start = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}
    phases = [{"name": name, "data": {"path": str(corpus)}, "training": {"steps": 6}} for name in ("one", "two")]
    phased, _ = job("phased", once)
    phased |= {"data": {}, "training": {}, "phases": [phases[0], {**phases[1], "start": start}]}
    lives = [
        Life([uninterrupted, (phased, None)]),
        Life([killed], kill=("step", 6)),
        Life([job("killed", other), job("killed", tmp_path / "nowhere"), (without, "auto")], delete=once),
        Life([killed], kill=("step", 9)),
        Life([job("killed", moved)]),
        Life([job("fresh", once)]),
    ]
    answers = run_ranks(live, 2, lives, free_ports(len(lives)), timeout=600)[0]
    assert answers[0] == [None, None]
    assert answers[1] == answers[3] == "killed"
    for refused, now in zip(answers[2], (f"is {other} (SHA", "nowhere (not found)", "is not set"), strict=True):
        assert f"it was initialised from {once} (SHA-256 " in refused
        assert now in refused
    assert answers[4] == [None]
    assert "no such folder; expected a folder" in answers[5][0]
    figures = ("step", "samples", "loss", "lr", "grad_norm", "data_digest", "mask_digest")
    assert column(tmp_path / "killed", *figures) == column(tmp_path / "uninterrupted", *figures)
    ends = [load.read_weights(complete_checkpoints(tmp_path / name)[-1]) for name in ("killed", "uninterrupted")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_models_that_do_not_fit_are_refused_on_all_ranks(model: Path, corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "larger", words=21)
    make_corpus(tmp_path / "longer", words=20, length=80)
    weights = load_file(model / "model.safetensors")

    def changed(name: str, **tensors: torch.Tensor | None) -> Path:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        kept = {k: v for k, v in {**weights, **tensors}.items() if v is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return folder

    table, query = "bert.embeddings.position_embeddings.weight", "bert.encoder.layer.1.attention.self.query"
    renamed, broken = changed("renamed"), changed("broken")
    tokenizer = renamed / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w3"', '"w99"'))
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])
    cases = {
        "its tokenizer has 26 tokens, but the model in .* has 25": (model, tmp_path / "larger"),
        "sequences of 80 tokens exceed .* 64 of .*; build the corpus with --sequence-length 64 or less": (
            model,
            tmp_path / "longer",
        ),
        "'w99' is missing, not 8, 'w3' is 8, not in the model": (renamed, corpus),
        r"1 missing \(bert.encoder.layer.1.attention.self.query.bias\); 1 unexpected \(extra\)": (
            changed("names", **{f"{query}.bias": None, "extra": torch.zeros(1)}),
            corpus,
        ),
        r"shape \[63, 32\], expected \[64, 32\]": (
            changed("shape", **{table: weights[table][:63].clone()}),
            corpus,
        ),
        "self.query.bias is torch.int8": (changed("int8", **{f"{query}.bias": torch.ones(32).char()}), corpus),
        "has non-finite values": (changed("nan", **{f"{query}.bias": torch.full((32,), torch.nan)}), corpus),
        "decoder.weight and bert.embeddings.word_embeddings.weight differ": (
            changed("untied", **{"cls.predictions.decoder.weight": torch.ones(25, 32)}),
            corpus,
        ),
        "not a complete safetensors file": (broken, corpus),
    }
    jobs = []
    for number, (folder, of) in enumerate(cases.values()):
        values = started_from(folder, tmp_path / str(number), of, steps=1, evaluation={"every_steps": 0}, **FROZEN)
        jobs.append((values, None))
    first, second = run_ranks(train_all, 2, jobs)
    for message, error, elsewhere in zip(cases, first, second, strict=True):
        assert error is not None
        assert re.search(message, error), error
        assert elsewhere is not None
        assert re.search(message, elsewhere), elsewhere
