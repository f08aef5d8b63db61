"""`maskvr evaluate` and `maskvr finetune` on toy tasks with a tiny model: they learn, and bad models are refused."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from maskvr_ds.cli import main
from maskvr_ds.downstream import command, fine_tuning
from maskvr_ds.downstream.encoding import Encoded
from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.fine_tuning import Settings, fine_tune
from maskvr_ds.downstream.losses import DivergenceError
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.tasks import GLUE, OWN, Kind
from tests.support.corpora import make_tokenizer
from tests.support.tasks import results, save_model, write_conll, write_sst2, write_tsv
from tests.support.tokenizers import KINDS

QUICK = ["--learning-rates", "5e-3", "--seeds", "2", "--epochs", "8", "--batch-size", "16", "--max-length", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("tasks"), train=160)


def test_a_model_learns_a_toy_task(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(model), "--tasks", "sst2", "--data", str(data), "--output", str(tmp_path / "o"), *QUICK]
    assert main(words) == 0
    out = capsys.readouterr().out
    found = results(tmp_path / "o", "sst2")
    scores = {name: row["scores"]["accuracy"]["mean"] for name, row in found["rows"].items()}
    assert scores["majority"] == pytest.approx(0.6)
    assert scores[str(model)] > 0.9
    assert scores["bag of words"] > 0.9
    difference = next(d for d in found["differences"]["accuracy"] if d["second"] == str(model))
    assert difference["first"] == "majority"
    assert not difference["within_noise"]
    assert (tmp_path / "o" / "results.md").read_text(encoding="utf-8") in out
    # The same command again trains nothing and prints the same table.
    assert main(words) == 0
    again = capsys.readouterr().out
    assert again.count("(stored)") == 3
    assert again.endswith((tmp_path / "o" / "results.md").read_text(encoding="utf-8"))


def test_tagging(model: Path, tmp_path: Path) -> None:
    write_conll(tmp_path / "data")
    words = ["evaluate", str(model), "--tasks", "conll", "--data", str(tmp_path / "data")]
    assert main([*words, "--output", str(tmp_path / "o"), *QUICK, "--max-length", "32"]) == 0
    rows = results(tmp_path / "o", "conll")["rows"]
    assert rows["majority"]["scores"]["entity_f1"]["mean"] == 0
    assert rows[str(model)]["scores"]["entity_f1"]["mean"] > 0.9
    assert rows["bag of words"]["scores"]["entity_f1"]["mean"] == 1


def test_pairs_and_numbers(model: Path, tmp_path: Path) -> None:
    """A regression on two texts; the first words give the number."""
    random = np.random.default_rng(0)
    for name, n in (("train", 120), ("dev", 40)):
        rows = [(f"w{i} w9", f"w{j} w8", str(float(i + j))) for i, j in random.integers(0, 3, (n, 2))]
        write_tsv(tmp_path / f"{name}.tsv", [("a", "b", "sum"), *rows])
    words = ["evaluate", str(model), "--tasks", "regression", "--data", str(tmp_path), "--output", str(tmp_path / "o")]
    assert main([*words, "--text-columns", "a", "b", "--label-column", "sum", *QUICK]) == 0
    rows = results(tmp_path / "o", "regression")["rows"]
    assert rows["majority"]["scores"]["pearson"]["mean"] == 0
    assert rows[str(model)]["scores"]["pearson"]["mean"] > 0.8
    assert rows["bag of words"]["scores"]["pearson"]["mean"] > 0.9


def test_finetune_saves_a_model(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers loads it, and it predicts what the stored run says; a second one is refused."""
    output = tmp_path / "o"
    words = ["finetune", str(model), "--task", "sst2", "--data", str(data), "--output", str(output), "--seed", "3"]
    words += [*QUICK[:2], *QUICK[4:]]
    assert main(words) == 0
    (stored,) = (json.loads(p.read_text(encoding="utf-8")) for p in (output / "runs" / "sst2").glob("tiny-final*"))
    assert stored["identity"]["seed"] == 3
    classify = pipeline("text-classification", model=str(output / "model"), device="cpu")
    lines = (data / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    found = [int(answer["label"]) for answer in classify([line.split("\t")[0] for line in lines])]
    assert found == stored["predictions"]["dev"]
    assert np.mean([str(label) == line[-1] for label, line in zip(found, lines, strict=True)]) > 0.9
    capsys.readouterr()
    assert main(words) == 1
    assert "has a fine-tuned model already" in capsys.readouterr().err


def test_a_model_is_never_without_its_scores(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, the same command completes both."""

    def killed(*_: Any) -> str:
        raise KeyboardInterrupt

    output = tmp_path / "o"
    words = ["finetune", str(model), "--task", "sst2", "--data", str(data), "--output", str(output), *QUICK[:2]]
    words += ["--epochs", "1", "--max-length", "16"]
    with monkeypatch.context() as patch:
        patch.setattr(command.report, "write", killed)
        assert main(words) == 130
    assert not (output / "model").exists()
    assert main(words) == 0
    assert (output / "model" / "model.safetensors").is_file()
    assert (output / "results.md").is_file()
    assert not (output / ".model").exists()


def test_equal_to_a_plain_loop(model: Path, data: Path) -> None:
    """The same head, batches and hyperparameters in plain PyTorch lead to the same predictions, within 0.5 points."""
    texts, labels = [], []
    for line in (data / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        text, label = line.split("\t")
        texts.append(text)
        # Noise, so that predictions depend on the order of the examples.
        labels.append(int(label) if len(labels) % 3 else len(labels) // 3 % 2)
    rate, epochs, batch, seed = 3e-3, 3, 16, 5
    split = Split(tuple((text,) for text in texts), tuple(map(str, labels)))
    with prepared([str(model)], {Kind.CLASSIFICATION: 16}) as (encoder,):
        outcome = fine_tune(
            encoder, GLUE["sst2"], ("0", "1"), split, {"train": split},
            Settings(epochs, batch, 16, "fp32"), learning_rate=rate, seed=seed,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(seed)
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    plain.train()
    decayed = [p for n, p in plain.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n]
    others = [p for n, p in plain.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=rate
    )
    steps = epochs * len(texts) // batch
    warmup = int(np.ceil(0.1 * steps))
    factor = lambda step: step / warmup if step < warmup else (steps - step) / (steps - warmup)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(epochs):
        # accelerate's seedable sampler draws each epoch's order with a generator of its own.
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(texts), batch):
            drawn = order[start : start + batch]
            inputs = tokenizer([texts[i] for i in drawn], padding=True, return_tensors="pt")
            loss = torch.nn.functional.cross_entropy(plain(**inputs).logits, torch.tensor([labels[i] for i in drawn]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    plain.eval()
    with torch.no_grad():
        expected = plain(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    assert outcome.steps == steps
    accuracies = [np.mean(np.equal(found, labels)) for found in (outcome.predictions["train"], expected)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.005)
    assert np.mean(np.equal(outcome.predictions["train"], expected)) > 0.99


def test_truncated_examples_are_counted(model: Path) -> None:
    """[CLS], the words and [SEP]; of pairs one more [SEP]. Words beyond the maximum length are tagged O."""
    with prepared([str(model)], {Kind.CLASSIFICATION: 8, Kind.TOKENS: 8}) as (encoder,):
        for words, truncated in ((5, 0), (6, 0), (7, 1), (9, 1)):
            split = Split((("w1 " * words,), ("w1",)), ("0", "1"))
            found = Encoded(encoder, GLUE["sst2"], ("0", "1"), split, 8, labelled=True)
            assert found.truncated == truncated
            assert len(found[0]["input_ids"]) == min(words + 2, 8)
            pairs = Encoded(encoder, GLUE["rte"], (), Split((("w1 " * (words - 1), "w2"),), (None,)), 8, labelled=False)
            assert pairs.truncated == (words > 5)
        tokens = Split((("w1",) * 9,), (("B-X",) * 9,))
        outcome = fine_tune(
            encoder, OWN["conll"], ("B-X", "O"), tokens, {"dev": tokens}, Settings(30, 1, 8, "fp32"),
            learning_rate=1e-2, seed=0,
        )  # fmt: skip
        assert outcome.predictions["dev"] == [["B-X"] * 6 + ["O"] * 3]
        assert outcome.truncated == {"train": 1, "dev": 1}


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "bert"])
def test_words_are_tokenised_as_in_running_text(kind: str, tmp_path: Path) -> None:
    """Byte-level BPE marks words after a space."""
    if kind == "bert":
        make_tokenizer(tmp_path / "m", 40)
    else:
        (tmp_path / "m").mkdir()
        make, options = KINDS[kind]
        make(tmp_path / "m", **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    words = ("the", "w1", "value", "value")
    encoded = Encoded(
        Encoder("m", tmp_path / "m", "", tokenizer), OWN["conll"], (), Split((words,), (None,)), 64, labelled=False
    )
    ids = encoded[0]["input_ids"]
    assert ids == tokenizer(" ".join(words))["input_ids"]
    assert list(encoded.words[0]) == [0, 1, 2, 3]
    first, second = (encoded.words[0][i] for i in (2, 3))
    assert ids[first] == ids[second]


def test_a_loss_that_is_not_finite(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split((("w0",), ("w1",)) * 8, ("0", "1") * 8)
    monkeypatch.setattr(fine_tuning, "_CHECK_EVERY", 2)
    with (
        prepared([str(model)], {Kind.CLASSIFICATION: 16}) as (encoder,),
        pytest.raises(DivergenceError, match="not finite at step"),
    ):
        fine_tune(encoder, GLUE["sst2"], ("0", "1"), split, {}, Settings(20, 4, 16, "fp32"), learning_rate=1e30, seed=0)


def _break(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    elif how == "specials":
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    elif how == "encoder":
        kept = {k: v for k, v in load_file(weights).items() if "encoder.layer.0.attention.self.query" not in k}
        save_file(kept, weights, metadata={"format": "pt"})
    elif how == "shape":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"intermediate_size": 48}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "weights":
        weights.unlink()
    elif how == "config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such folder; expected a run, a checkpoint or a model"),
        ("tokenizer", "has no tokenizer"),
        ("specials", "its tokenizer adds 0 special tokens to a text and 0 to a pair"),
        ("encoder", "its weights lack 2 tensors of the encoder"),
        ("shape", "its weights lack .* or have other shapes than its config.json says"),
        ("truncated", "transformers cannot load"),
        ("weights", "has no weights"),
        ("config", "has no config.json"),
        ("short", r"cannot read 64 tokens \(it has 32 positions\); lower --max-length"),
        ("twice", "a MODEL is given twice"),
    ],
)
def test_refused_models(
    model: Path, data: Path, tmp_path: Path, how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first run of any model, in one line."""
    broken = tmp_path / "broken"
    if how != "missing":
        shutil.copytree(model, broken)
        _break(broken, how)
    words = ["evaluate", str(model), str(model if how == "twice" else broken), "--tasks", "sst2", "--data", str(data)]
    words += ["--output", str(tmp_path / "o"), *QUICK]
    if how == "short":
        words += ["--max-length", "64"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), err
    assert out == ""
    assert not list((tmp_path / "o" / "runs").rglob("*.json"))


def test_predictions_that_are_not_finite(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step has a finite loss and a gradient that is not: no later loss would tell."""

    def train(trainer: Any) -> None:
        trainer.model.classifier.weight.data[0, 0] = math.nan

    monkeypatch.setattr(fine_tuning._Trainer, "train", train)
    split = Split((("w0",), ("w1",)) * 8, ("0", "1") * 8)
    with (
        prepared([str(model)], {Kind.CLASSIFICATION: 16}) as (encoder,),
        pytest.raises(DivergenceError, match="the predictions after step 0 are not finite"),
    ):
        fine_tune(
            encoder, GLUE["sst2"], ("0", "1"), split, {"dev": split}, Settings(1, 4, 16, "fp32"), learning_rate=1e-3,
            seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("kind", [Kind.CLASSIFICATION, Kind.TOKENS])
def test_the_head_of_a_fine_tuned_model_is_replaced(model: Path, kind: Kind, tmp_path: Path) -> None:
    """Also if it has the same shape; the encoder's weights are kept, and a stored run of the old head is not found."""
    with prepared([str(model)], {kind: 16}) as (encoder,):
        torch.manual_seed(0)
        tuned = encoder.load(kind, ("a", "b"))
        assert encoder.identity == {"model": encoder.digest}
    tuned.save_pretrained(tmp_path / "tuned")
    encoder.tokenizer.save_pretrained(tmp_path / "tuned")
    with prepared([str(tmp_path / "tuned")], {kind: 16}) as (encoder,):
        heads = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            loaded = encoder.load(kind, ("c", "d"))
            heads.append(loaded.classifier.weight)
            for name, value in tuned.base_model.state_dict().items():
                assert torch.equal(loaded.base_model.state_dict()[name], value)
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])
        assert not torch.equal(heads[0], tuned.classifier.weight)
        assert encoder.identity["head"] == "new"
        assert torch.equal(encoder.load_fine_tuned(kind, ("a", "b")).classifier.weight, tuned.classifier.weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "sst2", "--selection-seeds", "2", "--learning-rates", "1e-4", "--output", "o"], "is not chosen"),
        (["--tasks", "sst2", "--rows", "3", "--output", "o"], "--rows is an option of the task mlm"),
        (["--tasks", "sst2"], "--output is required"),
        (["--tasks", "mlm", "sst2", "--output", "o"], "mlm reads a corpus and other tasks read labelled files"),
        (["--tasks", "mlm", "--seeds", "2"], "--seeds is an option of fine-tuning"),
        (["--tasks", "sst2", "--label-column", "x", "--output", "o"], "not of sst2"),
        (["--tasks", "sst2", "--output", "o", "--max-train", "5"], "nothing can be held out of 5 training examples"),
    ],
)
def test_refused_options(
    model: Path, data: Path, words: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(model), "--data", str(data), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--epochs", "9"], "--epochs is an option of fine-tuning: name a MODEL"),
        (["--learning-rates", "1e-4"], "--learning-rates is an option of fine-tuning: name a MODEL"),
        (["--jobs", "2"], "--jobs is an option of fine-tuning: name a MODEL"),
        (["--precision", "bf16"], "--precision is an option of fine-tuning: name a MODEL"),
        (["--seeds", "2"], "--seeds is an option of fine-tuning and of --baselines ltw"),
    ],
)
def test_options_that_need_a_model(
    data: Path, option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--baselines", "chi2", "--tasks", "sst2", "--data", str(data), "--output", str(tmp_path / "o")]
    assert main([*words, *option]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
