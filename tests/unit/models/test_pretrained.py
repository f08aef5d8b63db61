"""model.initialize_from: sizes, unusable folders, resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.config import ConfigError, ModelConfig, RunConfig, dump_config, load_config
from maskvr_ds.config.model import BERT_KEYS
from maskvr_ds.data.vocabulary import token_ids
from maskvr_ds.models.initial_folder import InitialWeights
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointError, CheckpointState
from maskvr_ds.runtime.files import sha256
from maskvr_ds.training.resume import resolve_model_config

SIZES = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
OTHER = {"hidden_act": "relu", "max_position_embeddings": 40, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
BERT = {**SIZES, **OTHER, "hidden_dropout_prob": 0.2, "vocab_size": 30}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "bert"
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(path)
    return path


def load(tmp_path: Path, model: dict[str, Any], *assignments: str, **sections: Any) -> RunConfig:
    values = {"output_dir": "runs/x", "data": {"path": "corpus"}, "training": {"steps": 100}, "model": model}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, **sections}))
    return load_config(tmp_path / "run.yaml", assignments)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_sizes_come_from_the_folder_and_dropout_from_the_run(tmp_path: Path, folder: Path) -> None:
    given = {"initialize_from": str(folder)}
    model = load(tmp_path, given).model
    assert {key: getattr(model, key) for key in {**SIZES, **OTHER}} == {**SIZES, **OTHER}
    assert (model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (0.2, 0.1)
    model = load(tmp_path, {**given, "hidden_dropout_prob": 0.0, "layer_norm_eps": "1e-5", **SIZES}).model
    assert model.hidden_dropout_prob == 0.0, "values that match may be given"


def test_missing_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model, bert = ModelConfig(initialize_from=tmp_path), BertConfig()
    for key in BERT_KEYS:
        assert getattr(model, key) == getattr(bert, key), key


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 64}, r"model: hidden_size is 64, and .*bert/config.json has 48, .*; remove hidden_size"),
        ({"num_hidden_layers": 12}, "num_hidden_layers is 12, and"),  # the default, but said
        (
            {"preset": "bert-base"},
            r"num_hidden_layers is 12 \(preset bert-base\), .* has 3, .*; remove num_hidden_layers and preset",
        ),
        ({"max_position_embeddings": 512}, "max_position_embeddings is 512, and .* has 40"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and .* has 'relu'"),
    ],
)
def test_contradicting_the_folder_is_an_error(
    tmp_path: Path, folder: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {"initialize_from": str(folder), **given})


def test_null_removes_a_size_of_a_base(tmp_path: Path, folder: Path) -> None:
    config = load(tmp_path, {"preset": "bert-base", "num_hidden_layers": 7}, f"model={{initialize_from: {folder}}}")
    assert config.model.num_hidden_layers == 3
    given = {"initialize_from": str(folder), "preset": "bert-base", "num_hidden_layers": 7}
    assert load(tmp_path, given, "model.preset=null", "model.num_hidden_layers=null").model.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "roformer"}, r"architecture is 'roformer', which is not tested here; tested are albert, bert"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is .*: quantised weights cannot be trained"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True, False expected"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, True expected"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map is .*, no such key expected"),
        ({"hidden_act": "mish"}, r"model.hidden_act: Input should be 'gelu'.*\(given: 'mish'\)"),
    ],
)
def test_unsupported_models_are_an_error(tmp_path: Path, folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {"initialize_from": str(folder)})


def test_invalid_config_json(tmp_path: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not JSON"):
        load(tmp_path, {"initialize_from": str(folder)})


def test_dump_loads_with_and_without_the_folder(tmp_path: Path, folder: Path) -> None:
    phases = [{"name": "all", "data": {"path": "corpus"}, "training": {"steps": 5}}]
    for sections in ({}, {"phases": phases, "data": {}, "training": {}}):
        config = load(tmp_path, {"initialize_from": str(folder)}, **sections)
        gone = load(tmp_path, {"initialize_from": str(tmp_path / "gone"), "hidden_size": 64}, **sections)
        for one in (config, gone):
            (tmp_path / "again.yaml").write_text(dump_config(one))
            assert load_config(tmp_path / "again.yaml") == one
        assert config.phase(0).model.hidden_size == 48
        assert gone.model.model_fields_set == {"initialize_from", "hidden_size"}, "sizes are compared with no folder"


def test_unusable_folders(tmp_path: Path, folder: Path) -> None:
    weights = folder / "model.safetensors"

    def refused(path: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            resolve_model_config(ModelConfig(initialize_from=path), None)

    refused(tmp_path / "bert-base-uncased", "no such folder; expected a folder.*or the name of a model on a hub")
    weights.rename(folder / "kept")
    refused(folder, r"bert: has no model.safetensors; save the model to it")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json: not an index of safetensors files")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    refused(folder, r"unpickling can run arbitrary code.*from_pretrained\('.*bert'\).save_pretrained\('NEW'\)")
    (folder / "kept").rename(weights)
    assert resolve_model_config(ModelConfig(initialize_from=folder), None)[1] == InitialWeights(folder, sha256(weights))
    (folder / "config.json").unlink()
    refused(folder, r"has no config.json")


def test_resume_uses_the_checkpoints_model(tmp_path: Path, folder: Path) -> None:
    model, initial = resolve_model_config(ModelConfig(initialize_from=folder), None)
    assert initial is not None
    trained = model.model_dump(exclude={"preset", "activation_checkpointing", "initialize_from"})

    def checkpoint(name: str, identity: dict[str, Any], **settings: Any) -> Checkpoint:
        state = CheckpointState(1, 1, 1, 0, "float32", [], {"model": identity}, settings)
        return Checkpoint(tmp_path / name, state)

    identity = {**trained, "initialize_from": initial.sha256}
    latest = checkpoint("latest", identity, **{"model.initialize_from": str(folder)})
    from_seed = checkpoint("from_seed", trained)
    assert resolve_model_config(model, latest) == (model, initial)
    assert resolve_model_config(ModelConfig(), from_seed) == (ModelConfig(), None)
    moved = folder.rename(tmp_path / "moved")
    assert resolve_model_config(ModelConfig(initialize_from=moved), latest)[1] == InitialWeights(moved, initial.sha256)
    gone = ModelConfig(initialize_from=folder, attention_probs_dropout_prob=0.3)
    resolved, known = resolve_model_config(gone, latest)
    assert known == initial
    assert resolved == model.model_copy(update={"attention_probs_dropout_prob": 0.3})
    for other, at, message in (
        (
            ModelConfig(initialize_from=tmp_path / "x"),
            latest,
            r"initialised from .*bert .*, and .* is .*x \(not found",
        ),
        (ModelConfig(), latest, "model.initialize_from is not set"),
        (ModelConfig(initialize_from=moved), from_seed, r"initialised from scratch, and .*moved \(SHA-256"),
        (gone, from_seed, r"initialised from scratch"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve_model_config(other, at)
    save_file({}, moved / "model.safetensors")
    with pytest.raises(CheckpointError, match="initialised from"):
        resolve_model_config(ModelConfig(initialize_from=moved), latest)


def test_token_ids_of_both_kinds_of_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    assert token_ids(tmp_path) is None
    vocabulary = {"[PAD]": 0, "a": 1, "\u2028": 2, "##b": 3}
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    assert token_ids(tmp_path) == vocabulary
    tokenizer = Tokenizer(models.WordPiece({**vocabulary, "c": 4}, unk_token="[PAD]"))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_ids(tmp_path) == {**vocabulary, "c": 4, "[MASK]": 5}
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        token_ids(tmp_path)
