"""`maskvr evaluate --tasks mlm`: which folders are models, and refusals before the first model is evaluated."""

import json
import re
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.cli import main
from maskvr_ds.downstream import mlm
from tests.support.corpora import SPECIAL, make_corpus

WORDS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus: without a held-out part; other: of other words; model, short: BERTs saved by transformers."""
    folder = tmp_path_factory.mktemp("models")
    make_corpus(folder / "corpus", rows=20, length=24, words=WORDS)
    make_corpus(folder / "other", rows=20, length=24, words=WORDS + 1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for name, positions in (("model", 24), ("short", 16)):
        config = BertConfig(vocab_size=WORDS + len(SPECIAL), max_position_embeddings=positions, **sizes)
        BertForMaskedLM(config).save_pretrained(folder / name)
    (folder / "empty").mkdir()
    return folder


def test_a_corpus_without_held_out_rows_is_read_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "figures.json"
    words = ["evaluate", str(folder / "model"), "--data", str(folder / "corpus"), "--output", str(output)]
    assert main(words) == 0
    assert f"{folder / 'corpus'}: 20 of 20 rows; unigram entropy" in capsys.readouterr().out
    (figures,) = json.loads(output.read_text())["mlm"].values()
    assert 2 < figures["held_out_loss"] < 4


@pytest.mark.parametrize(
    ("model", "corpus", "message"),
    [
        ("missing", "corpus", "missing: no such folder; expected a run, a checkpoint or a model saved by transformers"),
        ("empty", "corpus", "has no config.json"),
        ("short", "corpus", "24 tokens exceed model.max_position_embeddings 16 of .*short; build the corpus with"),
        ("model", "other", "its tokenizer has 26 tokens, but the model in .*model has 25"),
        ("model", "empty", "manifest.json"),
    ],
)
def test_refusals(folder: Path, model: str, corpus: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Although the first model could be evaluated."""
    words = ["evaluate", str(folder / "model"), str(folder / model), "--data", str(folder / corpus)]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_models_that_attend_in_different_ways_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mlm.Source(folder / "run", is_checkpoint=True)
    sources = {"run": run, "model": mlm.Source(folder / "model", is_checkpoint=False)}
    monkeypatch.setattr(mlm.checkpoints, "read_state", lambda path: path)
    monkeypatch.setattr(mlm, "separator_of", lambda state: 3)
    assert re.search("run: attention within documents, .* model: over complete", mlm._attention_remark(sources) or "")
    assert mlm._attention_remark({"run": run, "other": run}) is None
    monkeypatch.setattr(mlm, "separator_of", lambda state: None)
    assert mlm._attention_remark(sources) is None
