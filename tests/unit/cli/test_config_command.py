"""`maskvr config` and the start of `maskvr train` name what would end the run later, before anything is started."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, RobertaConfig

from data_pipeline.files import sha256_file
from maskvr_ds.cli.main import main
from maskvr_ds.config import load_config
from tests.support.corpora import change_manifest, make_corpus

Case = Callable[[Path, Path, dict[str, Any]], list[str] | None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of rows of 32 tokens and a held-out corpus; large enough for no remark on the length of training."""
    folder = make_corpus(tmp_path_factory.mktemp("data") / "corpus", rows=600)
    make_corpus(folder / "held_out", rows=8)
    return folder


def values_of(output: Path, corpus: Path) -> dict[str, Any]:
    return {"base": "demo_cpu", "output_dir": str(output), "data": {"path": str(corpus)}}


def copied(corpus: Path, folder: Path) -> Path:
    return Path(shutil.copytree(corpus, folder / "copy"))


def deepspeed(text: str) -> Case:
    def prepare(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
        (folder / "ds.json").write_text(text)
        values["deepspeed"] = str(folder / "ds.json")

    return prepare


def settings(**sections: Any) -> Case:
    return lambda folder, corpus, values: values.update(sections)


def no_manifest(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
    values["data"] = {"path": str(folder)}


def no_held_out(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
    values["data"] = {"path": str(corpus / "held_out")}


def missing_shard(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
    path = copied(corpus, folder)
    (path / "shard-00000.arrow").unlink()
    values["data"] = {"path": str(path)}


def retokenized(corpus: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a corpus and its held-out corpus whose tokenizer.json is changed."""
    path = copied(corpus, folder)
    for part in (path, path / "held_out"):
        file = part / "tokenizer" / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        sha256 = sha256_file(file)
        change_manifest(part, lambda manifest, sha256=sha256: manifest.update(tokenizer_sha256=sha256))
    return path


def no_words(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
    path = retokenized(corpus, folder, lambda content: content["model"].update(continuing_subword_prefix=""))
    values.update(data={"path": str(path)}, masking={"strategy": "whole_word"})


def unknown(*, corpus: bool = False, held_out: bool = False, words: int = 200) -> Case:
    """All words of the corpus, or of the held-out corpus, are [UNK]. words: 0 for a tokenizer of special tokens."""

    def prepare(folder: Path, _: Path, values: dict[str, Any]) -> None:
        path = make_corpus(folder / "unknown", rows=600, words=words, unknown=corpus)
        make_corpus(path / "held_out", rows=300, words=words, unknown=held_out)
        values["data"] = {"path": str(path)}

    return prepare


def phases_with_two_tokenizers(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
    other = make_corpus(folder / "other", rows=300, words=60)
    start = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}
    corpora = ({"path": str(corpus)}, {"path": str(other)})
    del values["base"], values["data"]
    values["evaluation"] = {"every_steps": 0}
    values["phases"] = [
        {"name": name, "data": data, "training": {"steps": 5}, **({"start": start} if name == "two" else {})}
        for name, data in zip(("one", "two"), corpora, strict=True)
    ]


def other_model(section: dict[str, Any]) -> Case:
    def prepare(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
        del values["base"]
        values.update(model=section, training={"steps": 1}, evaluation={"every_steps": 0}, schedule={"warmup_steps": 0})

    return prepare


def initial_model(**sizes: int) -> Case:
    def prepare(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
        small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, **sizes}
        BertForMaskedLM(BertConfig(**small)).save_pretrained(folder / "bert")
        del values["base"]
        start = {"initialize_from": str(folder / "bert")}
        values.update(model=start, training={"steps": 1}, evaluation={"every_steps": 0})

    return prepare


def no_weights(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
    initial_model(vocab_size=205)(folder, corpus, values)
    (folder / "bert" / "model.safetensors").unlink()


def hostfile(folder: Path, corpus: Path, values: dict[str, Any]) -> list[str]:
    (folder / "hosts").write_text("a slots=4\nb slots=3\n")
    return ["--hostfile", str(folder / "hosts")]


def other_mask(part: str) -> Case:
    def prepare(folder: Path, corpus: Path, values: dict[str, Any]) -> None:
        path = copied(corpus, folder)
        text = (path / part / "manifest.json").read_text(encoding="utf-8")
        (path / part / "manifest.json").write_text(text.replace('"mask": 4', '"mask": 14'), encoding="utf-8")
        values["data"] = {"path": str(path)}

    return prepare


FAULTS: dict[str, tuple[Case, str]] = {
    "name of no DeepSpeed file": (settings(deepspeed="zero9"), "'zero9' is neither a file nor one of zero0_bf16"),
    "not JSON": (deepspeed("{"), "ds.json: not JSON"),
    "nested JSON": (deepspeed('{"a": ' * 100_000), "ds.json: not JSON that can be read: nested too deeply"),
    "a stage that does not exist": (deepspeed('{"zero_optimization": {"stage": 4}}'), "ZeRO stage 4; supported are 0"),
    "NaN": (deepspeed('{"a": {"b": NaN}}'), "ds.json: a.b is nan; a finite number"),
    "infinity": (deepspeed('{"a": [1, 1e999]}'), "ds.json: a.1 is inf; a finite number"),
    "a huge bucket": (
        deepspeed('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000000000000000000000}}'),
        "zero_optimization.reduce_bucket_size is 1000000000000000000000; a finite number of at most 1e.15",
    ),
    "no check of gradients and no guard": (
        settings(deepspeed="zero2_bf16", divergence={"enabled": False}),
        "zero2_bf16.json: bf16.check_grad_overflow is false, and so is divergence.enabled",
    ),
    "a key twice": (deepspeed('{"a": 1, "a": 2}'), "key a is given twice"),
    "a batch of no rank": (settings(batch={"global_size": 10, "micro_size": 4}), "10 is not a multiple of batch.micro"),
    "a micro-batch that is no divisor": (
        settings(batch={"global_size": 20, "micro_size": 6}),
        "; set batch.micro_size to 5, or batch.global_size to (18|12) or 24",
    ),
    "a batch of 7 ranks": (
        lambda *_: ["--num-gpus", "7"],
        "ranks = 224; set batch.global_size to 224, or to 63 or 70 with a batch.micro_size that divides",
    ),
    "a batch of the hostfile": (hostfile, "× 7 ranks"),
    "another mask id": (other_mask("."), "copy/manifest.json: sha256 "),
    "another mask id of the held-out corpus": (other_mask("held_out"), "copy/held_out/manifest.json: sha256 "),
    "no corpus": (settings(data={"path": "nowhere"}), "nowhere: no such folder"),
    "a folder": (no_manifest, "manifest.json: not found. This is not a corpus"),
    "no held-out corpus": (no_held_out, "no held-out corpus; build with --held-out"),
    "a missing shard": (missing_shard, "shard-00000.arrow: shard is missing"),
    "rows that are too long": (
        settings(model={"preset": "bert-tiny", "max_position_embeddings": 16}),
        "sequences of 32 tokens exceed model.max_position_embeddings 16",
    ),
    "unknown words": (
        unknown(corpus=True),
        "unknown: nothing to predict: all tokens of its 600 rows for training are .*; build it with a tokenizer",
    ),
    "unknown held-out words": (
        unknown(held_out=True),
        r"held_out: nothing to predict: all tokens of its .* rows for evaluation are .*\); set data.held_out_path",
    ),
    "a tokenizer of special tokens": (
        unknown(corpus=True, held_out=True, words=0),
        "nothing to predict: all tokens of its 600 rows",
    ),
    "masks that need words": (no_words, "cannot determine word starts for a WordPiece model"),
    "masks that need more rows": (
        settings(masking={"strategy": "auto", "auto": {"rows": 1000}}),
        "masking.auto.rows 1000: .* has only 600 rows",
    ),
    "two tokenizers": (phases_with_two_tokenizers, "phase 'two': .*differs from .*; build the corpora of all phases"),
    "no initial model": (settings(model={"initialize_from": "nowhere"}), "initialize_from nowhere: no such folder"),
    "an initial model without weights": (no_weights, "has no model.safetensors"),
    "a setting that the architecture does not have": (
        other_model({"architecture": "roberta", "settings": {"hiden_size": 32}}),
        r"model.settings.hiden_size: unknown key of RobertaConfig \(roberta\); did you mean hidden_size",
    ),
    "checkpointing that the architecture does not have": (
        other_model({"preset": "albert-base", "activation_checkpointing": True}),
        "albert of transformers does not support gradient checkpointing",
    ),
    "rows longer than the positions of another architecture": (
        other_model({"preset": "roberta-base", "settings": {"max_position_embeddings": 16}}),
        "sequences of 32 tokens exceed model.max_position_embeddings 16",
    ),
    "rows of all positions where some are not used": (
        other_model({"preset": "roberta-base", "settings": {"max_position_embeddings": 32}}),
        "embeddings 32, of which roberta uses 31 .*; build the corpus with --sequence-length 31 or less",
    ),
    "an initial model of another vocabulary": (
        initial_model(vocab_size=400),
        "its tokenizer has 205 tokens, but the model in .* has 400",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, message = FAULTS[name]
    values = values_of(tmp_path / "run", good)
    options = prepare(tmp_path, good, values) or []
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["config", "--config", str(config), *options]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.startswith("error: ")
    assert yaml.safe_load(captured.out)["output_dir"] == str(tmp_path / "run"), "printed all the same"

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("subprocess.Popen", started)
    if "slots" not in str(options):
        ranks = options if "--num-gpus" in options or "--hostfile" in options else ["--num-gpus", "2"]
        assert main(["train", "--config", str(config), *ranks]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_valid_configuration(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values_of(tmp_path / "run", good)))
    assert main(["config", "--config", str(config), "--num-gpus", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{config}: valid: 800 steps\n"
    (tmp_path / "printed.yaml").write_text(captured.out)
    assert load_config(tmp_path / "printed.yaml") == load_config(config)
    # Several faults, a line each; without files only those of the settings.
    more = ["--set", "data.path=nowhere", "--set", "deepspeed=zero9", "--num-gpus", "7"]
    assert main(["config", "--config", str(config), *more]) == 1
    assert capsys.readouterr().err.count("error: ") == 3
    assert main(["config", "--config", str(config), *more, "--no-files"]) == 1
    assert capsys.readouterr().err.count("error: ") == 2
    assert main(["config", "--config", str(config), "--set", "data.path=nowhere", "--no-files"]) == 0


def test_a_tokenizer_that_pads(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is wrong with the corpus: a warning, and status 0."""

    def change(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[MASK]"]

    path = retokenized(good, tmp_path, change)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values_of(tmp_path / "run", path)))
    assert main(["config", "--config", str(config)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[2] == f"{config}: valid: 800 steps"
    assert "warning: " in lines[0]
    assert "has truncation, used by neither corpus nor training" in lines[0]
    assert "special tokens with the ids 4 are not registered" in lines[1]


def test_a_corpus_of_an_earlier_version(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its manifests carry no hash: one warning for the corpus and its held-out corpus."""
    path = copied(good, tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values_of(tmp_path / "run", path)), encoding="utf-8")
    assert main(["config", "--config", str(config)]) == 0
    assert capsys.readouterr().err == f"{config}: valid: 800 steps\n"
    for part in (path, path / "held_out"):
        change_manifest(part, lambda _: None, hashed=False)
    assert main(["config", "--config", str(config)]) == 0
    line, _ = capsys.readouterr().err.splitlines()
    assert f"warning: {path / 'manifest.json'}: not hashed (written by an earlier version)" in line


def test_positions_of_an_initial_model_with_a_table_of_them(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No setting makes the table longer; rotary positions have none."""
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    RobertaConfig(**small, max_position_embeddings=40).save_pretrained(tmp_path / "roberta")
    ModernBertConfig(**small, max_position_embeddings=40).save_pretrained(tmp_path / "modernbert")
    words = ["config", "--config", "demo_cpu", "--no-files", "--set", f"data.path={good}"]

    def status(name: str) -> int:
        model = f"model={{initialize_from: {tmp_path / name}, settings: {{max_position_embeddings: 66}}}}"
        return main([*words, "--set", model])

    assert status("modernbert") == 0
    assert status("roberta") == 1
    message = "settings.max_position_embeddings is 66, and .* has 40; its weights require its own value: remove the"
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_no_run_may_write_to(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus itself, for example; a run's own folder is right, for a resume."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values_of(good, good)))
    assert main(["config", "--config", str(config)]) == 1
    assert "corpus: not empty and not a run's folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("schema: 2\n")
    config.write_text(yaml.safe_dump(values_of(tmp_path / "run", good)))
    assert main(["config", "--config", str(config)]) == 0


def test_dropout_that_gpus_will_refuse_is_warned_of(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By documents in half precision. No fault: this machine may not be the one that trains."""

    def warned(dropout: float, **changes: Any) -> bool:
        settings = {**dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), 2)}
        model = {"architecture": "roberta", "settings": {**settings, "attention_probs_dropout_prob": dropout}}
        values = {"data": {"path": str(good), "attention": "documents"}, "deepspeed": "zero1_bf16", **changes}
        values |= {"output_dir": str(tmp_path / "run"), "training": {"steps": 1}, "model": model}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        assert main(["config", "--config", str(tmp_path / "run.yaml")]) == 0
        return "model.settings.attention_probs_dropout_prob is 0.1: attention within" in capsys.readouterr().err

    assert warned(0.1)
    assert not warned(0.0)
    assert not warned(0.1, deepspeed="zero1_fp32")
    assert not warned(0.1, data={"path": str(good)})
