"""Two-stage fine-tuning: encoder kept, head new, one intermediate model per seed; its options on the command line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskvr_ds.cli import main
from maskvr_ds.downstream import intermediate
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.fine_tuning import DivergenceError, Settings, fine_tune
from maskvr_ds.downstream.models import prepared
from maskvr_ds.downstream.tasks import GLUE, Kind
from tests.support.tasks import results, save_model, write_sst2, write_tsv

QUICK = ["--epochs", "2", "--batch-size", "16", "--max-length", "16", "--intermediate-epochs", "2"]
FIRST = Settings(2, 16, 16, "fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2, RTE (pairs) and CoLA, the same rule in all of them."""
    folder = write_sst2(tmp_path_factory.mktemp("tasks"), train=96)
    write_sst2(folder / "other", train=96, seed=1)
    for part in ("train", "dev"):
        rows = [r.split("\t") for r in (folder / "other/SST-2" / f"{part}.tsv").read_text(encoding="utf-8").split("\n")]
        rows = [row for row in rows[1:] if len(row) == 2]
        write_tsv(folder / "CoLA" / f"{part}.tsv", [("sentence", "label"), *rows])
        names = ("entailment", "not_entailment")
        pairs = [(text, "w5", names[int(label)]) for text, label in rows]
        write_tsv(folder / "RTE" / f"{part}.tsv", [("sentence1", "sentence2", "label"), *pairs])
    return folder


def evaluate(model: Path, data: Path, output: Path, *more: str) -> int:
    words = ["evaluate", str(model), "--data", str(data), "--output", str(output), *QUICK, *more]
    return main([*words, "--intermediate", "cola", "--intermediate-learning-rate", "5e-3"])


def runs(output: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "runs" / task).glob("tiny-*"))]


def test_one_intermediate_model_per_seed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For two tasks, two learning rates and selection: two models. The second stage starts from their weights with a
    new head; with several processes, and after a repetition, the scores are the same."""
    output = tmp_path / "o"
    words = ["--tasks", "sst2", "rte", "--learning-rates", "1e-3", "2e-3", "--seeds", "2"]
    assert evaluate(model, data, output, *words) == 0
    first = runs(output, "cola")
    assert [run["identity"]["seed"] for run in first] == [0, 1]
    folders = sorted((output / "intermediate").iterdir())
    assert len(folders) == 2
    text = (output / "results.md").read_text(encoding="utf-8")
    assert "Fine-tuning: first on cola (96 examples, learning rate 0.005, 2 epochs" in text
    capsys.readouterr()
    assert evaluate(model, data, output, *words) == 0
    assert ": tiny-intermediate" not in capsys.readouterr().out

    # By hand: the first stage, its encoder alone, the second stage.
    cola, sst2 = (read_task(GLUE[name], data) for name in ("cola", "sst2"))
    with prepared([str(model)], {Kind.CLASSIFICATION: 16}) as (encoder,):
        fine_tune(
            encoder, cola.task, ("0", "1"), cola.train, {}, FIRST, learning_rate=5e-3, seed=1, keep=tmp_path / "full"
        )
        weights = load_file(tmp_path / "full" / "model.safetensors")
        stored = [load_file(folder / "model.safetensors") for folder in folders]
        expected = {name.removeprefix("bert."): w for name, w in weights.items() if name.startswith("bert.")}
        (same,) = [s for s in stored if all(torch.equal(s[name], expected[name]) for name in expected)]
        assert set(same) == set(expected)  # no head
        final = next(run for run in runs(output, "sst2") if (i := run["identity"])["purpose"] == "final" and i["seed"])
        folder = folders[[s is same for s in stored].index(True)]
        again = fine_tune(
            encoder, sst2.task, ("0", "1"), sst2.train, sst2.dev, Settings(2, 16, 16, "fp32"),
            learning_rate=final["identity"]["learning_rate"], seed=1, weights=folder,
        )  # fmt: skip
        assert again.predictions == final["predictions"]
        torch.manual_seed(9)
        loaded = encoder.load(Kind.CLASSIFICATION, ("0", "1"), folder).state_dict()
        assert not torch.equal(loaded["classifier.weight"], weights["classifier.weight"])

    assert evaluate(model, data, tmp_path / "jobs", *words, "--jobs", "2") == 0
    out = capsys.readouterr().out
    assert out.count("cola: tiny-intermediate-0.005-seed") == 2
    for task in ("sst2", "rte"):
        found = [results(folder, task)["rows"][str(model)]["scores"] for folder in (output, tmp_path / "jobs")]
        assert found[0] == found[1]


def test_a_lost_intermediate_model_is_trained_again(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["--tasks", "sst2", "--learning-rates", "1e-3", "--seeds", "1"]
    assert evaluate(model, data, tmp_path / "o", *words) == 0
    before = results(tmp_path / "o", "sst2")["rows"][str(model)]["scores"]
    (folder,) = (tmp_path / "o" / "intermediate").iterdir()
    (run,) = (tmp_path / "o" / "runs" / "sst2").glob("tiny-*")
    shutil.rmtree(folder)
    run.unlink()
    # And as after a kill between the model and its run.
    (first,) = (tmp_path / "o" / "runs" / "cola").iterdir()
    for lost in (None, first):
        if lost:
            lost.unlink()
            run.unlink()
        assert evaluate(model, data, tmp_path / "o", *words) == 0
        assert results(tmp_path / "o", "sst2")["rows"][str(model)]["scores"] == before
        assert (folder / "model.safetensors").is_file()


def test_divergence_names_the_intermediate_task(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise DivergenceError("the loss is not finite at step 7")

    monkeypatch.setattr(intermediate, "fine_tune", diverge)
    assert evaluate(model, data, tmp_path / "o", "--tasks", "sst2", "--learning-rates", "1e-3", "--seeds", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cola: " in error
    assert "diverges on the intermediate task with seed 0 (the loss is not finite at step 7); lower" in error
    assert not list((tmp_path / "o").rglob("model.safetensors"))


def test_the_first_stage_decides_a_run(model: Path, data: Path, tmp_path: Path) -> None:
    """Each change of the intermediate task leads to new runs of both stages; so does its absence."""
    output = tmp_path / "o"
    words = ["evaluate", str(model), "--data", str(data), "--output", str(output), "--tasks", "sst2", "--seeds", "1"]
    words += ["--learning-rates", "1e-3", "--epochs", "1", "--max-length", "16", "--intermediate-epochs", "1"]
    for i, more in enumerate(
        (
            ["--intermediate", "cola"],
            ["--intermediate", "rte"],
            ["--intermediate", "cola", "--intermediate-learning-rate", "1e-3"],
            ["--intermediate", "cola", "--intermediate-epochs", "2", "--intermediate-max-train", "50"],
        ),
        1,
    ):
        assert main([*words, *more]) == 0
        assert len(list((output / "runs" / "sst2").glob("tiny-*"))) == i
        assert len(list((output / "intermediate").iterdir())) == i
    assert main([word for word in words if word not in ("--intermediate-epochs",)][:-1]) == 0
    assert len(list((output / "runs" / "sst2").glob("tiny-*"))) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks sst2 --intermediate-epochs 2", "--intermediate-epochs describes an intermediate task: add --interm"),
        ("--tasks sst2 --intermediate-data d", "--intermediate-data describes an intermediate task"),
        (
            "--tasks sst2 cola --intermediate cola",
            "--intermediate cola: is evaluated by this command on the same",
        ),
        ("--tasks mlm --intermediate cola", "--intermediate is an option of fine-tuning"),
        ("--tasks mlm --freeze embeddings", "--freeze is an option of fine-tuning"),
        ("--tasks mlm --early-stopping 1", "--early-stopping is an option of fine-tuning"),
        ("--tasks mlm --long-texts windows", "--long-texts is an option of fine-tuning"),
        (
            "--tasks sst2 --early-stopping 3",
            "--early-stopping 3: sst2 is trained for 3 epochs, so that nothing",
        ),
        ("--tasks sst2 --accumulation 5", "--accumulation 5: sst2 has batches of 32 examples, which cannot be divided"),
        ("--tasks sst2 stsb --class-weights balanced", "--class-weights: stsb has no classes; omit it, or"),
        ("--tasks squad --class-weights balanced", "--class-weights: squad has no classes"),
        ("--tasks squad --long-texts windows", "--long-texts windows: squad reads contexts in windows anyway"),
        ("--tasks conll --long-texts windows", "--long-texts windows: conll has a label per token"),
        ("--tasks sst2 --stride 3", "--stride is an option of squad and squad_v2, and of --long-texts windows"),
        ("--tasks sst2 --long-texts truncate --stride 3", "--stride is an option of squad and squad_v2"),
        (
            "--tasks rte --long-texts windows --max-length 16 --stride 7",
            "--stride 7: windows of 16 tokens can share at most 6, beside the other text and one new token",
        ),
        ("--tasks sst2 --max-length 16 --freeze 2", "--freeze 2: {model} has 1 layer"),
        ("--tasks sst2 --max-length 16 --freeze 1 --layer-decay 0.9", "--layer-decay with --freeze 1: all layers of"),
    ],
)
def test_refused_options(
    model: Path, data: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first run, naming the option and the task."""
    (tmp_path / "squad").mkdir()
    assert main(["evaluate", str(model), "--data", str(data), "--output", str(tmp_path / "o"), *words.split()]) == 1
    error = capsys.readouterr().err
    assert re.search(re.escape(message.format(model=model)), error), error
    assert error.count("error: ") == 1
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("words", ["--accumulation 1", "--layer-decay 0", "--freeze 0", "--freeze all", "--epochs 0"])
def test_values_out_of_range(model: Path, words: str) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", str(model), "--data", "d", "--output", "o", "--tasks", "sst2", *words.split()])


def test_all_options_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    """They are in the JSON and in the heading of the table; a fine-tuned model is saved with its head."""
    words = ["finetune", str(model), "--task", "sst2", "--data", str(data), "--output", str(tmp_path / "o"), *QUICK]
    words += ["--learning-rates", "1e-3", "--intermediate", "rte", "--early-stopping", "1", "--class-weights"]
    words += ["balanced", "--layer-decay", "0.9", "--freeze", "embeddings", "--accumulation", "4", "--long-texts"]
    assert main([*words, "windows", "--stride", "3", "--precision", "bf16"]) == 0
    found = results(tmp_path / "o", "sst2")
    row = found["rows"][str(model)]
    expected = {
        **{"epochs": 2.0, "batch_size": 16, "max_length": 16, "precision": "bf16", "stride": 3, "accumulation": 4},
        **{"layer_decay": 0.9, "freeze": 0, "class_weights": "balanced", "patience": 1},
    }
    assert {key: row["settings"][key] for key in expected} == expected
    assert row["settings"]["intermediate"]["task"] == "rte"
    assert row["early_stopping"][0]["epoch"] in (1, 2)
    text = (tmp_path / "o" / "results.md").read_text(encoding="utf-8")
    assert (
        "2 epochs, batches of 16 in 4 parts, 16 tokens, windows that share 3, bf16, layer-wise decay 0.9, embeddings "
        "frozen, balanced class weights, stopped after 1 epoch without a better held-out score."
    ) in text
    assert f"{model}: weights of epoch {row['early_stopping'][0]['epoch']:g} (by seed)." in text
    assert "classifier.weight" in load_file(tmp_path / "o" / "model" / "model.safetensors")
