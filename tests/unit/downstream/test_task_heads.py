"""`maskvr attention --task`: scores without heads against models changed by hand, and files that do not fit."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from maskvr_ds.cli.main import main
from maskvr_ds.downstream.comparison import changes, differences
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.metrics import score
from maskvr_ds.downstream.models import prepared
from maskvr_ds.downstream.task_heads import TaskHeads
from maskvr_ds.downstream.tasks import TASKS, Kind
from tests.support.corpora import make_tokenizer
from tests.support.tasks import WORDS, write_conll, write_sst2

LAYERS, HEADS, DEV = 2, 4, 60
TAGS = ("B-X", "B-Y", "I-X", "O")


def save(folder: Path, cls: type, seed: int, labels: tuple[str, ...] = ("0", "1"), heads: int = HEADS) -> Path:
    """A BERT with random weights, large enough for heads to matter, as `maskvr finetune` saves it."""
    torch.manual_seed(seed)
    vocabulary = make_tokenizer(folder, WORDS)
    sizes = {"hidden_size": 32, "num_attention_heads": heads, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    config = BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=128,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        **sizes,
    )
    model = cls(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned models `a` and `out/model` of sst2, `tags` of conll, and others that do not fit; files of both."""
    folder = tmp_path_factory.mktemp("task_heads")
    write_sst2(folder / "glue", train=40, dev=DEV)
    write_conll(folder / "conll", train=40, dev=20)
    save(folder / "a", BertForSequenceClassification, 0)
    save(folder / "out/model", BertForSequenceClassification, 1)
    save(folder / "tags", BertForTokenClassification, 2, TAGS)
    save(folder / "encoder", BertForMaskedLM, 3)
    save(folder / "topics", BertForSequenceClassification, 4, ("art", "news", "sport"))
    save(folder / "wide", BertForSequenceClassification, 5, heads=2)
    return folder


@pytest.fixture(autouse=True)
def _no_progress_on_standard_output(caplog: pytest.LogCaptureFixture) -> None:
    """An earlier command in this process may have set INFO, whose lines would precede the JSON."""
    caplog.set_level(logging.WARNING, logger="maskvr_ds")


def test_a_head_off_is_a_head_whose_output_is_set_by_hand(folder: Path) -> None:
    data = read_task(TASKS["sst2"], folder / "glue")
    with prepared([str(folder / "a")], {Kind.CLASSIFICATION: 32}) as (encoder,):
        heads = TaskHeads(encoder, data, data.dev["dev"], 32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    texts = [text for (text,) in data.dev["dev"].texts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    labels = torch.tensor([int(label) for label in data.dev["dev"].labels])
    for off_heads in ([], [(1, 2)], [(0, 0), (0, 1), (0, 2), (0, 3)]):
        off = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
        by_hand = AutoModelForSequenceClassification.from_pretrained(folder / "a").eval()
        for n, h in off_heads:
            off[n, h] = True
            value = by_hand.get_submodule(f"bert.encoder.layer.{n}.attention.self.value")
            value.get_parameter("weight").data[8 * h : 8 * h + 8] = 0.0
            value.get_parameter("bias").data[8 * h : 8 * h + 8] = 0.0
        with torch.no_grad():
            expected = by_hand(**inputs, labels=labels)
        found = heads.outcome(off)
        assert found.predictions == expected.logits.argmax(-1).tolist()
        assert found.loss == pytest.approx(float(expected.loss), rel=1e-5)
    assert heads.outcome().loss == pytest.approx(heads.outcome(torch.zeros(LAYERS, HEADS, dtype=torch.bool)).loss)


def test_uniform_attention_in_several_batches(folder: Path) -> None:
    """By hand: with queries at zero all logits are equal. The evaluation set is more than one batch."""
    data = read_task(TASKS["sst2"], folder / "glue")
    with prepared([str(folder / "a")], {Kind.CLASSIFICATION: 32}) as (encoder,):
        heads = TaskHeads(encoder, data, data.dev["dev"], 32)
    off = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    off[1, 0] = True
    found = heads.outcome(off, "uniform")
    query = heads.model.get_submodule("bert.encoder.layer.1.attention.self.query")
    query.get_parameter("weight").data[:8] = 0.0
    query.get_parameter("bias").data[:8] = 0.0
    assert found.loss == pytest.approx(heads.outcome().loss, rel=1e-6)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models, data = [str(folder / "a"), str(folder / "out")], str(folder / "glue")
    target, picture = tmp_path / "pruned", tmp_path / "heads.png"
    words = ["attention", *models, "--task", "sst2", "--data", data, "--prune", "2", "--export-pruned", str(target)]
    assert main([*words, "--plot", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["metric"], found["set"]) == (DEV, "accuracy", "dev")
    assert list(found["models"]) == models
    for n in range(LAYERS):
        for h in range(HEADS):
            mean, low, high = found["without"][n][h]
            each = [m["score_without_head"][n][h] - m["score"] for m in found["models"].values()]
            assert mean == pytest.approx(sum(each) / 2)
            assert low <= mean + 1e-9
            assert high >= mean - 1e-9
    for figures in found["models"].values():
        assert -1 <= figures["rank_correlation"]["loss"] <= 1
    assert len(found["without_layer"]) == LAYERS
    assert found["chosen_on_half"]["examples"] == DEV // 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The exported model has the score of the pruned one.
    assert main(["attention", str(target), "--task", "sst2", "--data", data, "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["models"].values()
    assert again["score"] == found["pruning"][-1]["score"]
    assert again["loss"] == pytest.approx(found["pruning"][-1]["loss"], rel=1e-5)


def test_tags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attention", str(folder / "tags"), "--task", "conll", "--data", str(folder / "conll"), "--rows", "10"]
    assert main([*words, "--off", "uniform"]) == 0
    text = capsys.readouterr().out
    assert "conll, dev set: 10 examples; heads off: uniform" in text
    assert f"of {LAYERS * HEADS} heads: better without" in text


def test_changes_are_paired_differences() -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (200,), generator=random).tolist()
    before = [t if i % 5 else 1 - t for i, t in enumerate(truth)]
    after = [t if i % 4 else 1 - t for i, t in enumerate(truth)]
    ((mean, low, high), (nothing, *interval)) = changes("accuracy", truth, [before], [[after], [before]])
    (expected,) = differences("accuracy", truth, {"after": [after], "before": [before]})
    assert mean == pytest.approx(score("accuracy", truth, after) - score("accuracy", truth, before))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.015)
    assert (nothing, *interval) == (0, 0, 0)


@pytest.mark.parametrize(
    ("models", "task", "said"),
    [
        (["encoder"], "sst2", "its config.json says BertForMaskedLM, a task of the kind classification needs a model"),
        (["tags"], "sst2", "its config.json says BertForTokenClassification"),
        (["a"], "conll", "a task of the kind tokens needs a model ...ForTokenClassification"),
        (["topics"], "sst2", "was fine-tuned on the labels art, news, sport (3), the task's file has 0, 1 (2)"),
        (["a"], "stsb", "has no folder STS-B"),
        (["a"], "squad", "heads are judged on classification, regression and token tasks, not questions"),
        (["a", "wide"], "sst2", "has (2, 2) layers and heads"),
    ],
)
def test_what_does_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], models: list[str], task: str, said: str
) -> None:
    data = folder / ("conll" if task == "conll" else "glue")
    assert main(["attention", *(str(folder / m) for m in models), "--task", task, "--data", str(data)]) == 1
    assert said in capsys.readouterr().err


def test_options_of_a_task_without_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", str(folder / "a"), "--data", str(folder / "glue"), "--label-column", "topic"]) == 1
    assert "--label-column describes examples of --task" in capsys.readouterr().err
