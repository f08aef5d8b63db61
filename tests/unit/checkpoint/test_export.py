"""The exported tokenizer reproduces the ids of the corpus: uncased, cased and byte-level tokenizers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig

from maskvr_ds.checkpoint.export import _write_tokenizer

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
    _write_tokenizer(source, output)
    loaded = AutoTokenizer.from_pretrained(output)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.mask_token == "[MASK]"
