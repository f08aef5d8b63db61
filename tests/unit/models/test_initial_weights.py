"""Folders of existing models, as other programs write them: what is loaded, what begins new, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, ElectraForPreTraining, PreTrainedModel

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.models import pretrained
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel, names_of_parameters
from maskvr_ds.models.initial_folder import InitialWeights, check_vocabulary, table_rows, weights_digest, weights_files
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointState
from maskvr_ds.training.references import file_faults
from maskvr_ds.training.resume import resolve_model_config
from tests.support.architectures import section
from tests.support.corpora import PAD_IS_1, make_corpus

V = 30
KINDS = ("bert", "roberta", "modernbert", "eurobert", "deberta-v2", "nomic_bert", "mpnet", "xlm-roberta")


def random_config(architecture: str, rows: int = V, **settings: Any) -> Any:
    model = ModelConfig.model_validate(section(architecture, **settings))
    ids = {"cls_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "mask_token_id": 4}
    return transformers_config(model, vocab_size=rows, pad_id=1, token_ids=ids)


def saved(folder: Path, architecture: str, *, base: bool = False, **options: Any) -> PreTrainedModel:
    """A model with random weights, all of them different from 0 and 1, saved to the folder. base: without a head."""
    torch.manual_seed(5)
    config = random_config(architecture, **options.pop("config", {}))
    model = (AutoModel if base else AutoModelForMaskedLM).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder, **options)
    return model


def loaded(folder: Path, *, new_head: bool | None = None) -> tuple[PreTrainedModel, list[str]]:
    """What a run is initialised with, and the lines that it logs."""
    model = ModelConfig(initialize_from=folder, new_head=new_head)
    config = transformers_config(model, vocab_size=table_rows(folder), pad_id=1)
    torch.manual_seed(9)
    module = MaskedLanguageModel(config).mlm
    lines = pretrained._read(module, InitialWeights(folder, weights_digest(folder), new_head))
    return module, lines


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", KINDS)
def test_all_weights_are_loaded(tmp_path: Path, architecture: str) -> None:
    model = saved(tmp_path, architecture)
    module, lines = loaded(tmp_path)
    expected = dict(model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())
    assert len(lines) == 1
    assert f"{len(expected)} tensors" in lines[0]


@pytest.mark.parametrize("architecture", KINDS)
def test_an_encoder_without_a_head_gets_a_new_one(tmp_path: Path, architecture: str) -> None:
    """BertModel and the folders of sentence-transformers: names without prefix, a pooler."""
    base = saved(tmp_path, architecture, base=True)
    module, lines = loaded(tmp_path)
    expected = dict(base.named_parameters())
    prefix = f"{module.base_model_prefix}."
    torch.manual_seed(9)
    fresh = dict(MaskedLanguageModel(module.config).mlm.named_parameters())
    of_encoder = {f"{prefix}{name}" for name in expected} & dict(module.named_parameters(remove_duplicate=False)).keys()
    for name in of_encoder:
        assert torch.equal(module.get_parameter(name), expected[name.removeprefix(prefix)]), name
    for name, names in ((names[0], names) for names in names_of_parameters(module).values()):
        if not of_encoder & set(names):
            assert torch.equal(module.get_parameter(name), fresh[name]), name
    assert "the prediction head starts with random weights" in lines[1]
    assert "the folder has none" in lines[1]


def test_a_new_head_can_be_asked_for_and_forbidden(tmp_path: Path) -> None:
    model = saved(tmp_path / "full", "roberta")
    module, lines = loaded(tmp_path / "full", new_head=True)
    assert "model.new_head is true" in lines[1]
    assert not torch.equal(module.lm_head.dense.weight, model.lm_head.dense.weight)
    assert torch.equal(module.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert len(loaded(tmp_path / "full", new_head=False)[1]) == 1
    saved(tmp_path / "base", "roberta", base=True)
    with pytest.raises(ConfigError, match=r"missing \(lm_head.bias, .*; set model.new_head=true to start with a new"):
        loaded(tmp_path / "base", new_head=False)
    edit(tmp_path / "full", lambda tensors: tensors.pop("lm_head.dense.weight"))
    with pytest.raises(ConfigError, match=r"1 missing \(lm_head.dense.weight\); set model.new_head=true"):
        loaded(tmp_path / "full")
    with pytest.raises(ValueError, match="new_head needs initialize_from"):
        ModelConfig(new_head=True)


def test_other_heads_are_not_used(tmp_path: Path) -> None:
    """A classifier has no prediction head; what it has is not taken for one."""
    saved(tmp_path, "roberta", base=True)
    edit(tmp_path, lambda tensors: tensors.update({"classifier.dense.weight": torch.ones(2, 2)}))
    assert "unused: classifier.dense.weight" in loaded(tmp_path)[1][0]
    edit(tmp_path, lambda tensors: tensors.update({"roberta.encoder.extra": torch.ones(2)}))
    with pytest.raises(ConfigError, match=r"1 unexpected \(.*extra\)"):
        loaded(tmp_path)


def test_replaced_token_detection_is_said(tmp_path: Path) -> None:
    ElectraForPreTraining(random_config("electra")).save_pretrained(tmp_path / "electra")
    lines = loaded(tmp_path / "electra")[1]
    assert "starts with random weights" in lines[1]
    assert "was trained by replaced-token detection" in lines[2]
    # DeBERTa-v3's folders have a head that was not trained together with these weights.
    saved(tmp_path / "deberta", "deberta-v2")
    edit(tmp_path / "deberta", lambda tensors: tensors.update({"mask_predictions.dense.weight": torch.ones(2, 2)}))
    lines = loaded(tmp_path / "deberta")[1]
    assert len(lines) == 2
    assert "expect a masked accuracy near 0 at first, also if the folder has tensors of that name" in lines[1]


def test_shards_are_read_if_all_are_there(tmp_path: Path) -> None:
    model = saved(tmp_path, "modernbert", max_shard_size="20KB")
    shards = weights_files(tmp_path)
    assert len(shards) > 2
    module, lines = loaded(tmp_path)
    expected = dict(model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())
    assert f"{len(shards)} files of {tmp_path}" in lines[0]
    digest = weights_digest(tmp_path)
    edited = load_file(shards[1])
    save_file({name: tensor + 1 for name, tensor in edited.items()}, shards[1], {"format": "pt"})
    assert weights_digest(tmp_path) != digest
    shards[1].unlink()
    with pytest.raises(ConfigError, match=rf"1 of the {len(shards)} files .* missing \({shards[1].name}\); copy the"):
        weights_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ConfigError, match="safetensors files of the same folder expected"):
        weights_files(tmp_path)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "roberta")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "roberta.encoder.layer.0.output.dense.weight"

    def refused(message: str, **changed: torch.Tensor) -> None:
        save_file({**tensors, **changed}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            loaded(tmp_path)

    refused(f"{name} is torch.int8; quantised weights cannot be trained", **{name: tensors[name].char()})
    refused(rf"{name} has shape \[32, 4\], expected \[32, 48\]", **{name: tensors[name][:, :4].clone()})
    refused(f"{name} has non-finite values", **{name: tensors[name] * torch.inf})
    refused(
        r"lm_head.decoder.weight and .*word_embeddings.weight differ",
        **{"lm_head.decoder.weight": torch.ones(V, 32)},
    )
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for values, message in (
        ({"quantization_config": {"load_in_8bit": True}}, "quantised weights cannot be trained; use the folder"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"code from a model's folder is never run \(trust_remote_code\)"),
        ({"is_decoder": True}, "is_decoder is True, False expected"),
        ({"model_type": "longformer"}, "architecture is 'longformer', which is not tested here"),
    ):
        kept = (tmp_path / "config.json").read_text(encoding="utf-8")
        change(tmp_path, **values)
        with pytest.raises(ValueError, match=message):
            ModelConfig(initialize_from=tmp_path)
        (tmp_path / "config.json").write_text(kept, encoding="utf-8")
    change(tmp_path, intermediate_size=52)
    with pytest.raises(ConfigError, match=r"expected \[52\] by config.json .*; the files are from different models"):
        loaded(tmp_path)


def test_a_generator_without_tied_embeddings(tmp_path: Path) -> None:
    """ELECTRA's generator is taken as its config.json says; a decoder that is then missing, or a second one, is an
    error."""
    model = saved(tmp_path, "electra", config={"tie_word_embeddings": False})
    decoder, table = "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"
    module, lines = loaded(tmp_path)
    assert torch.equal(module.get_parameter(decoder), model.get_parameter(decoder))
    assert torch.equal(module.get_parameter(table), model.get_parameter(table))
    assert not torch.equal(module.get_parameter(decoder), module.get_parameter(table))
    assert len(lines) == 1
    change(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=f"{decoder} and {table} differ, but are one tensor.*(tie_word_embeddings)"):
        loaded(tmp_path)
    change(tmp_path, tie_word_embeddings=False)
    edit(tmp_path, lambda tensors: tensors.pop(decoder))
    with pytest.raises(ConfigError, match=rf"1 missing \({decoder}\); set model.new_head=true"):
        loaded(tmp_path)


def test_settings_must_be_those_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path, "roberta")
    model = ModelConfig(initialize_from=tmp_path, settings={"hidden_dropout_prob": 0.3, "hidden_size": 32})
    assert model.architecture == "roberta"
    assert (model.merged["hidden_dropout_prob"], model.merged["num_hidden_layers"]) == (0.3, 3)
    again = ModelConfig.model_validate(model.model_dump(mode="json", exclude_unset=True))
    assert again == model
    for given, message in (
        (
            {"settings": {"hidden_size": 64}},
            r"settings.hidden_size is 64, and .* has 32; .*remove the setting",
        ),
        ({"preset": "roberta-base"}, r"settings.num_hidden_layers is 12 by preset, and .* has 3"),
        ({"architecture": "bert"}, r"different architectures: roberta \(.*config.json\), bert \(architecture\)"),
        ({"hidden_size": 32}, r"hidden_size 32: sizes are those of .*config.json \(roberta\); remove"),
        (
            {"hidden_dropout_prob": 0.2},
            "hidden_dropout_prob is a field of bert; for roberta, write settings.hidden_dropout_prob",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate({"initialize_from": str(tmp_path), **given})


def test_a_config_file_gives_architecture_and_settings(tmp_path: Path) -> None:
    saved(tmp_path, "modernbert")
    model = ModelConfig(config=tmp_path / "config.json", settings={"attention_dropout": 0.1})
    assert model.architecture == "modernbert"
    assert (model.merged["hidden_size"], model.merged["attention_dropout"]) == (32, 0.1)
    assert "vocab_size" not in model.merged
    assert not any(key.endswith("_token_id") for key in model.merged)
    dumped = model.model_dump(mode="json")
    assert "num_attention_heads" not in dumped
    (tmp_path / "config.json").unlink()
    assert ModelConfig.model_validate(dumped) == model, "the stored configuration needs no file"
    with pytest.raises(ValueError, match=r"config.json: cannot be read: No such file"):
        ModelConfig(config=tmp_path / "config.json")


@pytest.mark.parametrize("architecture", ["roberta", "bert"])
def test_resume_does_not_need_the_folder(tmp_path: Path, architecture: str) -> None:
    """Neither for the architecture, nor to know what the run's own settings belong to."""
    saved(tmp_path / "model", architecture)
    values = {"initialize_from": str(tmp_path / "model"), "settings": {"hidden_dropout_prob": 0.3}}
    started, initial = resolve_model_config(ModelConfig.model_validate(values), None)
    assert initial is not None
    assert started.architecture == architecture
    identity = {**started.identity(), "initialize_from": initial.sha256}
    of_run = {"model": json.loads(json.dumps(identity))}
    state = CheckpointState(1, 1, 1, 0, "float32", [], of_run, {"model.initialize_from": values["initialize_from"]})
    for gone in (False, True):
        if gone:
            (tmp_path / "model").rename(tmp_path / "moved")
        resumed, known = resolve_model_config(ModelConfig.model_validate(values), Checkpoint(tmp_path, state))
        assert known == initial
        assert resumed.identity() == started.identity()


def corpus_of(folder: Path, words: int) -> Corpus:
    return Corpus(make_corpus(folder, rows=8, words=words, special=PAD_IS_1))


def test_padded_tables_are_taken_as_they_are(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", 20)  # 25 tokens
    saved(tmp_path / "model", "modernbert", config={"rows": 64})
    initial = InitialWeights(tmp_path / "model", "")
    check_vocabulary(initial, corpus)
    assert loaded(tmp_path / "model")[0].get_input_embeddings().num_embeddings == 64
    saved(tmp_path / "large", "modernbert", config={"rows": 25 + 128})
    with pytest.raises(ConfigError, match=r"has 25 tokens, but the model in .* has 153"):
        check_vocabulary(InitialWeights(tmp_path / "large", ""), corpus)
    change(tmp_path / "model", pad_token_id=3)
    with pytest.raises(ConfigError, match=r"pads with token 1, the model in .* with 3"):
        check_vocabulary(initial, corpus)


def test_where_the_transformer_of_a_sentence_encoder_is(tmp_path: Path) -> None:
    saved(tmp_path / "0_Transformer", "mpnet", base=True)
    with pytest.raises(ConfigError, match=r"has no config.json; the model may be in .*0_Transformer"):
        weights_files(tmp_path)


def test_runs_checkpoints_and_the_hubs_cache_are_no_models(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "models--lab--x"
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    for folder in (run, checkpoint):
        with pytest.raises(ConfigError, match=rf"a checkpoint: export it .*maskvr export --checkpoint {folder} --out"):
            weights_files(folder)
    saved(cache / "snapshots" / "1234", "mpnet")
    with pytest.raises(ConfigError, match=r"the model may be in .*models--lab--x/snapshots/1234"):
        weights_files(cache)


def test_faults_are_found_before_ranks_start(tmp_path: Path) -> None:
    from maskvr_ds.config import RunConfig

    corpus_of(tmp_path / "corpus", 20)
    saved(tmp_path / "model", "roberta", config={"rows": 25})
    values: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "corpus")},
        "training": {"steps": 5},
        "evaluation": {"every_steps": 0},
        "model": {"initialize_from": str(tmp_path / "model")},
    }
    assert file_faults(RunConfig.model_validate(values))[0] == []
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    (fault,) = file_faults(RunConfig.model_validate(values))[0]
    assert "AutoModelForMaskedLM.from_pretrained" in fault
