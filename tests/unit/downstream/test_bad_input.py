"""Bad input of `maskvr evaluate` and `maskvr finetune`: one clear error, a status other than 0, nothing half done."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskvr_ds.cli import main
from tests.support.tasks import results, save_model, write_squad, write_sst2, write_tsv

QUICK = ["--epochs", "1", "--batch-size", "16", "--max-length", "16"]
GOOD = [("sentence", "label"), *((f"w{i % 7} w{i % 2}", str(i % 2)) for i in range(60))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The only error, on the last line."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (GOOD, [("sentence", "label"), ("w1", "2")], "classification: the dev set has labels that the training set"),
        ([GOOD[0], *(row for row in GOOD if row[1] == "1")], GOOD, "all training examples have the label '1'"),
        ([("text", "klass"), *GOOD[1:]], GOOD, "has no column 'label'"),
        ([("sentence", "label"), *(("  ", str(i % 2)) for i in range(60))], GOOD, "the training texts have no word"),
    ],
    ids=["label that train lacks", "one class", "columns", "empty texts only"],
)
def test_files(
    model: Path, train: list[tuple[str, str]], dev: list[tuple[str, str]], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_tsv(tmp_path / "data" / "train.tsv", train)
    write_tsv(tmp_path / "data" / "dev.tsv", dev)
    words = ["evaluate", str(model), "--tasks", "classification", "--data", str(tmp_path / "data"), *QUICK]
    assert main([*words, "--output", str(tmp_path / "o")]) == 1
    assert message in error_of(capsys)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("more", [["--learning-rates", "1e-3"], []])
def test_a_tiny_training_set(model: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bag of words needs a held-out part as well: refused before the first run, with a remedy that helps."""
    for name in ("train", "dev"):
        write_tsv(tmp_path / "data" / f"{name}.tsv", GOOD[:9])
    words = ["evaluate", str(model), "--tasks", "classification", "--data", str(tmp_path / "data"), *QUICK]
    assert main([*words, "--output", str(tmp_path / "o"), *more]) == 1
    assert "nothing can be held out of 8 training examples" in error_of(capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("more", [[], ["--class-weights", "balanced"], ["--accumulation", "2", "--batch-size", "2"]])
def test_sentences_without_tokens(model: Path, more: list[str], tmp_path: Path) -> None:
    """A batch of them has no mean loss, and changes nothing."""
    rows = [{"tokens": ["w1", "w2"], "tags": ["O", "B-X"]}] * 6 + [{"tokens": [], "tags": []}] * 3
    rows.append({"tokens": ["\u200b"], "tags": ["O"]})  # no token of the model's
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["evaluate", str(model), "--tasks", "conll", "--data", str(tmp_path / "data"), *QUICK, "--batch-size", "1"]
    assert main([*words, "--output", str(tmp_path / "o"), "--learning-rates", "1e-3", "--seeds", "1", *more]) == 0
    assert results(tmp_path / "o", "conll")["rows"][str(model)]["scores"]["entity_f1"]["mean"] is not None


def test_some_empty_texts(model: Path, tmp_path: Path) -> None:
    """They are examples like others, and counted."""
    write_tsv(tmp_path / "data" / "train.tsv", [*GOOD, ("", "0"), (" ", "1")])
    write_tsv(tmp_path / "data" / "dev.tsv", [*GOOD, ("", "0")])
    words = ["evaluate", str(model), "--tasks", "classification", "--data", str(tmp_path / "data"), *QUICK]
    words += ["--output", str(tmp_path / "o"), "--learning-rates", "1e-3", "--seeds", "1"]
    for more in ([], ["--long-texts", "windows"]):
        assert main([*words, *more]) == 0
        found = results(tmp_path / "o", "classification")
        assert found["data"]["empty_texts"] == 3
        assert "3 empty texts" in (tmp_path / "o" / "results.md").read_text(encoding="utf-8")


def test_answers_outside_of_their_contexts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some are counted and skipped; if all are, there is nothing to learn."""
    write_squad(tmp_path / "squad")
    path = tmp_path / "squad" / "dev-v1.1.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    paragraphs = content["data"][0]["paragraphs"]
    paragraphs[0]["qas"][0]["answers"][0]["answer_start"] = 10_000
    train = tmp_path / "squad" / "train-v1.1.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "squad" / "train-v1.1.json.gz").unlink()
    train.write_text(json.dumps(content), encoding="utf-8")
    words = ["evaluate", str(model), "--tasks", "squad", "--data", str(tmp_path), "--output", str(tmp_path / "o")]
    words += [*QUICK, "--max-length", "32", "--learning-rates", "1e-3", "--seeds", "1"]
    assert main(words) == 0
    assert results(tmp_path / "o", "squad")["data"]["misplaced_answers"] == 2
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            question["answers"][0]["answer_start"] = 10_000
    train.write_text(json.dumps(content), encoding="utf-8")
    capsys.readouterr()
    assert main(words) == 1
    assert "no training question has an answer that is in its context at its offset" in error_of(capsys)


@pytest.mark.parametrize(("rates", "jobs"), [(["1e-3"], "1"), (["1e-3", "2e-3"], "2")])
def test_weights_that_are_not_numbers(
    model: Path, rates: list[str], jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is NaN from the first step on. The other model, and the next task, have their rows."""
    broken = save_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["bert.embeddings.LayerNorm.weight"] *= torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    data = write_sst2(tmp_path / "glue", train=64)
    (data / "CoLA").mkdir()
    for name in ("train", "dev"):
        (data / "CoLA" / f"{name}.tsv").write_text(
            (data / "SST-2" / f"{name}.tsv").read_text(encoding="utf-8"), encoding="utf-8"
        )
    words = ["evaluate", str(broken), str(model), "--tasks", "sst2", "cola", "--data", str(data), *QUICK]
    words += ["--output", str(tmp_path / "o"), "--learning-rates", *rates, "--seeds", "1", "--jobs", jobs]
    assert main(words) == 1
    error = error_of(capsys)
    for task in ("sst2", "cola"):
        found = results(tmp_path / "o", task)
        assert found["rows"][str(model)]["scores"]
        if len(rates) == 1:
            assert f"{task}: {broken} (learning rate 0.001, seed 0)" in error
            assert found["rows"][str(broken)]["diverged_seeds"] == [0]
        else:
            assert f"{task}: {broken} diverges at every learning rate (0.001, 0.002); try lower ones" in error
            assert list(found["failed"]) == [str(broken)]


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = save_model(tmp_path / "bare", tokenizer=False)
    data = write_sst2(tmp_path / "glue")
    words = ["finetune", str(bare), "--task", "sst2", "--data", str(data), "--output", str(tmp_path / "o"), *QUICK]
    assert main(words) == 1
    assert "has no tokenizer" in error_of(capsys)
    assert main([*words[:1], str(model), *words[2:], "--max-length", "64"]) == 1
    assert "cannot read 64 tokens (it has 32 positions); lower --max-length" in error_of(capsys)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: an error of the system's, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("more", [[], ["--intermediate", "cola"], ["--early-stopping", "1", "--epochs", "2"]])
def test_a_full_disk(model: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While the model, the intermediate one, or the best epoch's weights are written: no half model is left, and the
    same command completes later."""
    data = write_sst2(tmp_path / "glue", train=64)
    (data / "CoLA").mkdir()
    for name in ("train", "dev"):
        text = (data / "SST-2" / f"{name}.tsv").read_text(encoding="utf-8")
        (data / "CoLA" / f"{name}.tsv").write_text(text, encoding="utf-8")
    words = ["finetune", str(model), "--task", "sst2", "--data", str(data), "--output", str(tmp_path / "o"), *QUICK]
    words += ["--learning-rates", "1e-3", *more]
    with small_files(30_000):
        assert main(words) == 1
    assert "the model cannot be written" in error_of(capsys)
    assert not list((tmp_path / "o").rglob("*.safetensors"))
    assert not (tmp_path / "o" / "model").exists()
    assert main(words) == 0
    assert (tmp_path / "o" / "model" / "model.safetensors").is_file()
