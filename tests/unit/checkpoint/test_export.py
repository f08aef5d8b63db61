"""The exported tokenizer reproduces the ids of the corpus: uncased, cased and byte-level tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig

from maskvr_ds.checkpoint.export import ExportError, _write_tokenizer, export
from maskvr_ds.run_folder.checkpoints import CheckpointError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["Hello World", "hello world", "Café naïve", "don't panic", "the [MASK] of it"]


def train(kind: str) -> Tokenizer:
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=kind == "uncased")
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["uncased", "cased", "byte-level"])
@pytest.mark.parametrize("declared", [None, "BertTokenizer"])
def test_same_ids_through_transformers(tmp_path: Path, kind: str, declared: str | None) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    tokenizer = train(kind)
    tokenizer.save(str(source / "tokenizer.json"))
    roles = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    config = {**roles, **({"tokenizer_class": declared} if declared else {})}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    BertConfig().save_pretrained(source)
    BertConfig().save_pretrained(output)
    assert _write_tokenizer(source, output) == []
    loaded = AutoTokenizer.from_pretrained(output)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.mask_token == "[MASK]"


def prepared(folder: Path, change: Callable[[dict[str, Any]], None], **settings: Any) -> tuple[Path, Path, Tokenizer]:
    """Source and output of an export, and the tokenizer, whose file is changed."""
    source, output = folder / "source", folder / "output"
    source.mkdir()
    output.mkdir()
    tokenizer = train("uncased")
    content = json.loads(tokenizer.to_str())
    change(content)
    (source / "tokenizer.json").write_text(json.dumps(content))
    roles = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    (source / "tokenizer_config.json").write_text(json.dumps({**roles, **settings}))
    BertConfig().save_pretrained(source)
    BertConfig().save_pretrained(output)
    return source, output, tokenizer


def pad(content: dict[str, Any]) -> None:
    """As in all-MiniLM-L6-v2."""
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 4},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }


@pytest.mark.parametrize("declared", ["BertTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer", "T5Tokenizer"])
def test_padding_and_truncation_are_no_obstacle(tmp_path: Path, declared: str) -> None:
    source, output, tokenizer = prepared(tmp_path, pad, tokenizer_class=declared)
    assert _write_tokenizer(source, output) == []
    loaded = AutoTokenizer.from_pretrained(output)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.mask_token == "[MASK]"


def test_unregistered_special_tokens_are_no_obstacle(tmp_path: Path) -> None:
    source, output, tokenizer = prepared(tmp_path, lambda content: content.update(added_tokens=[]))
    (remark,) = _write_tokenizer(source, output)
    assert "does not register [MASK] as special" in remark
    loaded = AutoTokenizer.from_pretrained(output)
    for text in TEXTS[:-1]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.mask_token_id == tokenizer.token_to_id("[MASK]")


@pytest.mark.parametrize("text", ["{", "[]", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "\xff"])
def test_settings_that_transformers_cannot_read(tmp_path: Path, text: str) -> None:
    source, output, tokenizer = prepared(tmp_path, lambda content: None)
    (source / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    (source / "folder").mkdir()
    remarks = _write_tokenizer(source, output)
    assert Tokenizer.from_file(str(output / "tokenizer.json")).encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids
    if not remarks:
        assert AutoTokenizer.from_pretrained(output)(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]).ids


def test_what_transformers_encodes_otherwise_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output, _ = prepared(tmp_path, lambda content: None)

    class Other:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [7]}

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Other())
    (remark,) = _write_tokenizer(source, output)
    assert "transformers encodes 'Hello World, na" in remark
    assert "as [7], the tokenizer of the corpus as [" in remark
    assert (output / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_where_an_export_must_not_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is read or written."""
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(here)
    for output, message in {
        ".": "is the current folder or one above it",
        "": "is the current folder",
        "../below": "is the current folder",
        "..": "exists and is not an empty folder",
        "/": "exists and is not an empty folder",
        tmp_path / "file": "exists and is not an empty folder",
    }.items():
        with pytest.raises(ExportError, match=message):
            export(tmp_path / "nothing", output)
    assert not list(here.iterdir())
    with pytest.raises(CheckpointError, match="nothing: no such folder"):
        export(tmp_path / "nothing", "new")
    assert not list(here.iterdir())


class Interfering:
    """A model whose saving takes so long that another program fills the output folder."""

    config = BertConfig()

    def __init__(self, output: Path) -> None:
        self.output = output

    def parameters(self) -> list[Any]:
        return []

    def save_pretrained(self, folder: Path) -> None:
        assert folder.parent == self.output.parent
        (folder / "model.safetensors").write_text("ours")
        self.output.mkdir(exist_ok=True)
        (self.output / "model.safetensors").write_text("theirs")


@pytest.mark.parametrize("existing", [False, True])
def test_a_rename_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    from maskvr_ds.checkpoint import export as module

    output = tmp_path / "model"
    if existing:
        output.mkdir()
    monkeypatch.setattr(module.checkpoints, "newest", lambda source: source)
    monkeypatch.setattr(module.checkpoints, "verify", lambda folder: None)
    monkeypatch.setattr(module, "load_model", lambda folder: Interfering(output))
    monkeypatch.setattr(module, "_write_tokenizer", lambda source, partial: [])
    monkeypatch.setattr(module, "_compare", lambda folder, partial: 0.0)
    monkeypatch.setattr(module.checkpoints, "read_state", lambda folder: None)
    monkeypatch.setattr(module, "model_card", lambda *_, **__: "card")
    with pytest.raises(ExportError, match="another program has written there meanwhile"):
        export(tmp_path / "run", output)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no partial output"
    assert (output / "model.safetensors").read_text() == "theirs"
