"""model.initialize_from by a name on a hub: one download whatever the ranks, a commit that stays, one error offline."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.config import load_config
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.training import configuration, run_command, run_deepspeed
from tests.support.corpora import make_corpus
from tests.support.hub import Hub, serve

SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


def files(folder: Path, corpus: Path, seed: float) -> dict[str, bytes]:
    """Of a model with the vocabulary of the corpus, code and a pickle."""
    model = BertForMaskedLM(BertConfig(vocab_size=25, max_position_embeddings=64, **SIZES))
    model.cls.predictions.bias.data.fill_(seed)
    model.save_pretrained(folder)
    found = {path.name: path.read_bytes() for path in (*folder.iterdir(), *(corpus / "tokenizer").iterdir())}
    return found | {"modeling_x.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}


def write(tmp_path: Path, corpus: Path, name: str) -> Path:
    sections: dict[str, Any] = {"evaluation": {"every_steps": 0}, "schedule": {"warmup_steps": 0}}
    values = configuration(tmp_path / "run", corpus, steps=1, **sections)
    values["model"] = {"initialize_from": name}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path / "run.yaml"


def test_one_download_and_a_commit_that_stays(hub: Hub, tmp_path: Path) -> None:
    """`maskvr train` with 2 ranks; then the branch moves, and the run resumes without asking the hub."""
    corpus = make_corpus(tmp_path / "corpus", rows=60, words=20)
    commit = hub.add("lab/bert", files(tmp_path / "a", corpus, 1.0))
    config = write(tmp_path, corpus, "lab/bert")
    trained = run_command("train", "--config", config, "--num-gpus", 2)
    assert trained.returncode == 0, trained.stderr
    assert hub.downloads("model.safetensors") == hub.downloads("config.json") == 1
    assert hub.requests["GET", "info"] == hub.requests["GET", "tree"] == 1
    assert not any(re.search(r"\.(py|bin)$", path) for path in hub.paths)
    stored = load_config(tmp_path / "run" / "config.yaml")
    folder = str(stored.model.initialize_from)
    assert folder.endswith(f"/models--lab--bert/snapshots/{commit}")
    assert stored.model.hidden_size == 16
    (event,) = [e for e in read_events(tmp_path / "run" / METRICS) if e["event"] == "initialized"]
    assert event["folder"] == folder

    hub.add("lab/bert", files(tmp_path / "b", corpus, 2.0))
    before = len(hub.paths)
    resumed = run_command("train", "--config", config, "--num-gpus", 2, "--resume", "auto", "--set", "training.steps=2")
    assert resumed.returncode == 0, resumed.stderr
    assert len(hub.paths) == before
    assert len(complete_checkpoints(tmp_path / "run")) == 2
    other = run_command(
        *("train", "--config", config, "--resume", "auto", "--set", "training.steps=3"),
        *("--set", f"model.initialize_from=lab/bert@{hub.branches['lab/bert']['main']}"),
    )
    assert (other.returncode, other.stderr.count("error:")) == (1, 1)
    assert "belongs to another run" in other.stderr
    exported = run_command("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "\nbase_model: lab/bert\n" in card
    assert f"`lab/bert`, commit {commit}" in card


def test_ranks_without_the_launcher_make_one_download(hub: Hub, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows=60, words=20)
    hub.add("lab/bert", files(tmp_path / "a", corpus, 1.0), branch="v2")
    trained = run_deepspeed("--config", write(tmp_path, corpus, "lab/bert@v2"))
    assert trained.returncode == 0, trained.stderr
    assert hub.downloads("model.safetensors") == 1
    assert hub.requests["GET", "info"] == 1


def test_offline_is_one_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows=60, words=20)
    config = write(tmp_path, corpus, "lab/bert")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in (("train", "--num-gpus", 2), ("config",)):
        failed = run_command(*command, "--config", config)
        assert (failed.returncode, failed.stderr.count("error:")) == (1, 1), failed.stderr
        assert "model.initialize_from lab/bert: no such folder" in failed.stderr
        assert "offline mode is set (HF_HUB_OFFLINE)" in failed.stderr
        assert "hf download lab/bert --include" in failed.stderr
    assert not (tmp_path / "run").exists()
    assert run_command("config", "--config", config, "--no-files").returncode == 0
    assert not hub.paths
