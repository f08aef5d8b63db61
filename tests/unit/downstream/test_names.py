"""`maskvr evaluate` and `maskvr finetune` with models by their name on a hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.cli import main
from tests.support.corpora import make_corpus
from tests.support.hub import Hub, serve

SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Has lab/bert, which is also in the folder "original", with the vocabulary of the corpus "corpus"."""
    corpus, original = make_corpus(tmp_path / "corpus", rows=20, words=20), tmp_path / "original"
    BertForMaskedLM(BertConfig(vocab_size=25, max_position_embeddings=64, **SIZES)).save_pretrained(original)
    for file in (corpus / "tokenizer").iterdir():
        (original / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.add(
            "lab/bert", {path.name: path.read_bytes() for path in original.iterdir()} | {"x.py": b"raise SystemExit"}
        )
        yield hub


def write_task(folder: Path) -> None:
    """A classification task: train.tsv and dev.tsv."""
    folder.mkdir()
    for name, rows in (("train", 40), ("dev", 10)):
        lines = ["text\tlabel", *(f"the of {'and to' if i % 2 else 'in'}\t{i % 2}" for i in range(rows))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_masked_tokens_by_name(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures as of the folder; the commit is reported; the second command downloads nothing."""
    commit = hub.branches["lab/bert"]["main"]
    words = ["evaluate", "lab/bert", f"lab/bert@{commit}", "original", "--data", "corpus", "--output", "figures.json"]
    assert main(words) == 0
    assert f"MODEL lab/bert: commit {commit}, " in capsys.readouterr().out
    figures = json.loads(Path("figures.json").read_text(encoding="utf-8"))["mlm"]
    assert figures.keys() == {"lab/bert", f"lab/bert@{commit}", "original"}
    assert len({json.dumps(found) for found in figures.values()}) == 1
    assert hub.downloads("model.safetensors") == 1
    assert not any(path.endswith(".py") for path in hub.paths)


def test_fine_tuning_by_name(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """The run of a name and that of its folder are the same run: only the first one trains."""
    write_task(Path("own"))
    quick = ["--learning-rates", "1e-3", "--epochs", "1", "--max-length", "16", "--data", "own"]
    task = ["--text-columns", "text", *quick]
    assert main(["finetune", "lab/bert", "--task", "classification", *task, "--output", "tuned"]) == 0
    assert (Path("tuned") / "model" / "model.safetensors").is_file()
    capsys.readouterr()
    scores = ["--tasks", "classification", *task, "--seeds", "1", "--output", "scores"]
    assert main(["evaluate", "lab/bert", *scores]) == 0
    runs = sorted((Path("scores") / "runs").rglob("*"))
    assert main(["evaluate", "original", *scores]) == 0
    assert sorted((Path("scores") / "runs").rglob("*")) == runs
    assert hub.downloads("model.safetensors") == 1


@pytest.mark.parametrize("command", ["mlm", "classification", "finetune"])
def test_neither_folder_nor_name(hub: Hub, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(Path("own"))
    own = ["--data", "own", "--text-columns", "text", "--output", "out"]
    words = {
        "mlm": ["evaluate", "lab/other", "--data", "corpus"],
        "classification": ["evaluate", "original", "lab/other", "--tasks", "classification", *own],
        "finetune": ["finetune", "lab/other", "--task", "classification", *own],
    }
    assert main(words[command]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: MODEL lab/other: neither a folder here nor a model at {hub.url}. Correct the name or path; if the "
        "model is private, run: hf auth login"
    ]


def test_a_folder_of_that_name_comes_first(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lab").mkdir()
    Path("original").rename("lab/bert")
    assert main(["evaluate", "lab/bert", "--data", "corpus"]) == 0
    assert "MODEL lab/bert: the folder of this name is used" in capsys.readouterr().out
    assert not hub.paths
