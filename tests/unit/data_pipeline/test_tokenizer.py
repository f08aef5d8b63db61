"""Training, loading and copying tokenizers; trained ones are compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_pipeline.files import CorpusError
from data_pipeline.tokenization import training
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from tests.support.documents import SPECIAL, make_documents, tree, write_text, write_tokenizer

TEXTS = [
    "The Naïve café of Zürich, isn't it?",
    "漢字 and [SEP] and [MASK] [CLS]text[PAD]",
    "UPPER lower\n\ttabs  and \u00a0 spaces",
    "",
    "zzzzqqqq 123.45",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "a.txt", [*make_documents(200), *TEXTS])


@pytest.mark.parametrize("cased", [False, True])
def test_trained_folder_is_a_bert_tokenizer_for_transformers(text: Path, tmp_path: Path, cased: bool) -> None:
    from transformers import AutoTokenizer

    train_tokenizer([text], 120, tmp_path / "tok", cased=cased, progress=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert type(theirs).__name__ in ("BertTokenizer", "BertTokenizerFast")
    names = [theirs.pad_token, theirs.unk_token, theirs.cls_token, theirs.sep_token, theirs.mask_token]
    assert names == SPECIAL
    assert theirs.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3, 4]
    assert len(theirs) == 120
    encoder = Encoder(tmp_path / "tok")
    # transformers encodes "[SEP]" in a text as the special token; this pipeline never does.
    plain = [text for text in TEXTS if "[" not in text]
    ids, counts = encoder.encode(plain)
    assert [i for text in plain for i in theirs(text, add_special_tokens=False)["input_ids"]] == ids.tolist()
    assert counts.tolist() == [len(theirs(text, add_special_tokens=False)["input_ids"]) for text in plain]
    assert theirs("x", "x")["input_ids"] == [2, *encoder.encode(["x"])[0], 3, *encoder.encode(["x"])[0], 3]
    same = encoder.encode(["NAÏVE"])[0].tolist() == encoder.encode(["naive"])[0].tolist()
    assert same is not cased
    assert theirs.decode(encoder.encode(["the of and"])[0]) == "the of and"


def test_training_twice_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    for name in "abcd":
        train_tokenizer([text], 100, tmp_path / name, progress=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c") == tree(tmp_path / "d")
    lines = (tmp_path / "a/vocab.txt").read_text().splitlines()
    assert lines[:5] == SPECIAL
    assert len(lines) == 100


def test_text_never_becomes_a_special_id(tmp_path: Path) -> None:
    copy_tokenizer(write_tokenizer(tmp_path / "vocab"), tmp_path / "tok")
    encoder = Encoder(tmp_path / "tok")
    ids, counts = encoder.encode(["[SEP] the [MASK][CLS] [PAD] [UNK]", "[sep]", "the"])
    words = [encoder.tokenizer.id_to_token(i) for i in ids]
    assert words[:6] == ["[", "s", "##e", "##p", "]", "the"]
    assert counts.sum() == len(ids)
    assert ids.min() > 4


def test_special_token_as_a_word_becomes_unknown(tmp_path: Path) -> None:
    """A tokenizer with word-level look-up matches "[SEP]" in its vocabulary despite encode_special_tokens."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "the"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok/tokenizer.json"))
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("the [SEP]").ids == [5, 3]
    ids, _ = Encoder(tmp_path / "tok").encode(["the [SEP] [MASK] the"])
    assert ids.tolist() == [5, 1, 1, 5]


def test_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    copy_tokenizer(write_tokenizer(tmp_path / "vocab"), tmp_path / "tok")
    path = tmp_path / "tok/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    assert Encoder(tmp_path / "tok").encode(["the of and to", "a"])[1].tolist() == [4, 1]


def test_folder_with_only_vocab_txt(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    folder = write_tokenizer(tmp_path / "vocab")
    copy_tokenizer(folder, tmp_path / "tok")
    ids, _ = Encoder(tmp_path / "tok").encode(["The Zürich of 漢字, isn't"])
    theirs = BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    assert theirs.encode("The Zürich of 漢字, isn't", add_special_tokens=False) == ids.tolist()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CorpusError, match=r'Write \{"do_lower_case": true\}'):
        copy_tokenizer(folder, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok", "vocab"]


def make_folder(path: Path, specials: list[str], config: dict[str, object]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*specials, "the"])}, specials[0]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


ROBERTA = {
    "unk_token": "<unk>",
    "bos_token": {"content": "<s>", "lstrip": False},
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": {"content": "<mask>", "lstrip": True},
}


def test_declared_roles(tmp_path: Path) -> None:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "<extra>"]
    found = Encoder(make_folder(tmp_path / "bos", special, ROBERTA)).special_tokens
    assert (found.unk, found.cls, found.sep, found.pad, found.mask) == (0, 1, 2, 3, 4)
    assert found.all == (0, 1, 2, 3, 4, 5)
    declared = ROBERTA | {"cls_token": "<extra>", "sep_token": "<s>"}
    found = Encoder(make_folder(tmp_path / "cls", special, declared)).special_tokens
    assert (found.cls, found.sep) == (5, 1)
    # As on the Hugging Face Hub: BERT's folder declares no roles, but its special tokens have BERT's names.
    found = Encoder(make_folder(tmp_path / "bert", SPECIAL, {"do_lower_case": True})).special_tokens
    assert (found.pad, found.unk, found.cls, found.sep, found.mask) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("role", ["unk", "bos", "eos", "pad", "mask"])
def test_missing_role(tmp_path: Path, role: str) -> None:
    config = {key: value for key, value in ROBERTA.items() if key != f"{role}_token"}
    folder = make_folder(tmp_path / "tok", ["<unk>", "<s>", "</s>", "<pad>", "<mask>"], config)
    wanted = {"bos": "cls", "eos": "sep"}.get(role, role)
    with pytest.raises(CorpusError, match=rf"declares no {wanted}_token.*Add the token"):
        Encoder(folder)


def test_faulty_folders(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such folder"):
        copy_tokenizer(tmp_path / "none", tmp_path / "tok")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"tokenizer\.json: missing"):
        copy_tokenizer(tmp_path / "empty", tmp_path / "tok")
    (tmp_path / "empty/tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="cannot be read as a tokenizer"):
        Encoder(tmp_path / "empty")
    folder = make_folder(tmp_path / "absent", ["<unk>"], {**ROBERTA, "cls_token": "<cls>"})
    with pytest.raises(CorpusError, match=r"its (pad|cls)_token .* is not in the vocabulary"):
        Encoder(folder)
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (5, "must be above 5"),
        (2**32 + 1, "at most 4,294,967,296"),
        (50_000, r"50,000 is not possible with this text, which gives \d+: .* no more word pieces"),
        (20, r"20 is not possible with this text, which gives \d+: the characters alone need more"),
    ],
)
def test_impossible_vocabulary_size(text: Path, tmp_path: Path, vocab_size: int, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        train_tokenizer([text], vocab_size, tmp_path / "tok", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_training_without_text_or_into_a_used_folder(text: Path, tmp_path: Path) -> None:
    empty = write_text(tmp_path / "in/empty.txt", [""])
    with pytest.raises(CorpusError, match="the corpus is empty"):
        train_tokenizer([empty], 100, tmp_path / "tok", progress=False)
    with pytest.raises(CorpusError, match="output folder is not empty"):
        train_tokenizer([text], 100, tmp_path / "in", progress=False)
    (tmp_path / "tok").mkdir()
    train_tokenizer([text], 100, tmp_path / "tok", progress=False)
    assert Encoder(tmp_path / "tok").vocab_size == 100


def test_ids_need_32_bits_for_large_vocabularies(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "vocab", extra=[f"w{i}" for i in range(65_600)])
    copy_tokenizer(folder, tmp_path / "tok")
    encoder = Encoder(tmp_path / "tok")
    ids, _ = encoder.encode(["w65599"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [encoder.vocab_size - 1]


def test_byte_level_training(text: Path, tmp_path: Path) -> None:
    """A RobertaTokenizer for transformers, without loss for any text; the same bytes every time."""
    from transformers import AutoTokenizer

    for name in "abc":
        train_tokenizer([text], 380, tmp_path / name, kind="byte-bpe", progress=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert type(theirs).__name__ == "RobertaTokenizer"
    assert theirs.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 4]
    assert len(theirs) == 380
    copy_tokenizer(tmp_path / "a", tmp_path / "copy")
    encoder = Encoder(tmp_path / "copy")
    for sample in [*TEXTS, "never seen: \u0e1b\U00020000\x00\u200d"]:
        ids, _ = encoder.encode([sample])
        assert ids.tolist() == theirs.encode(sample, add_special_tokens=False)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == sample
    assert theirs("x", "x")["input_ids"] == [0, *encoder.encode(["x"])[0], 2, 2, *encoder.encode(["x"])[0], 2]


def test_byte_level_training_is_refused(text: Path, tmp_path: Path) -> None:
    def train(size: int, *, kind: str = "byte-bpe", source: Path = text, cased: bool = False) -> None:
        train_tokenizer([source], size, tmp_path / "tok", kind=kind, cased=cased, progress=False)

    with pytest.raises(CorpusError, match=r"vocabulary size 261: must be above 261 \(the special tokens and"):
        train(261)
    with pytest.raises(CorpusError, match=r"which gives .*: the text has no more word pieces"):
        train(100_000)
    with pytest.raises(CorpusError, match="--cased is for kind wordpiece; byte-bpe always keeps case"):
        train(300, cased=True)
    with pytest.raises(CorpusError, match="kind of tokenizer 'unigram': must be wordpiece or byte-bpe"):
        train(300, kind="unigram")
    with pytest.raises(CorpusError, match="the corpus is empty"):
        train(300, source=write_text(tmp_path / "empty.txt", [" "]))
    assert not (tmp_path / "tok").exists()


def test_training_refuses_text_that_changes_meanwhile(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two passes of WordPiece must read the same text."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.read_bytes())
    count = training._letter_counts

    def between_the_passes(*arguments: Any) -> Any:
        path.write_bytes(text.read_bytes().replace(b"that", b"this"))
        return count(*arguments)

    monkeypatch.setattr(training, "_letter_counts", between_the_passes)
    with pytest.raises(CorpusError, match=r"a\.txt: changed since the build started"):
        train_tokenizer([path], 120, tmp_path / "tok", progress=False)
    assert not (tmp_path / "tok").exists()
