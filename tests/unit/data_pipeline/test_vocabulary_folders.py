"""Old BERT folders (vocab.txt without tokenizer.json): ids as those of transformers, or refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import build
from data_pipeline.files import CorpusError
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from tests.support.documents import SPECIAL, make_documents, tree, write_text

LETTERS = "abcdeghimnorstuäöéñ漢字東京ABCÄ.,-'[]<>"
WORDS = ["möchte", "mochte", "the", "quick", "東京", "##s", "##京", "<ent>", "new", "wört"]
TEXTS = [
    "Ich möchte nicht, er mochte. The QUICK Ärger",
    "東京漢字 the漢s quick",
    "the <ent> of <ENT> new new-words, wört WÖRT",
    "añb  c\td\né ñ a\u0301e",
    "<s> the </s> [mask]",
]


def write_folder(folder: Path, settings: dict[str, Any], special: list[str] = SPECIAL, **files: Any) -> Path:
    tokens = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in dict.fromkeys(tokens)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def size(folder: Path) -> int:
    return len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())


def check_equal_to_transformers(folder: Path, texts: list[str], again: Path) -> Encoder:
    """The ids of transformers for the folder, and for the copy that is saved with a corpus."""
    from transformers import BertTokenizer

    copy_tokenizer(folder, again)
    encoder = Encoder(again)
    ids, counts = encoder.encode(texts)
    for where in (folder, again):
        theirs = BertTokenizer.from_pretrained(where)
        expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
        assert [i for row in expected for i in row] == ids.tolist(), where
        assert [len(row) for row in expected] == counts.tolist()
        assert len(theirs) == encoder.vocab_size
        for role in ("cls", "sep", "pad", "mask", "unk"):
            assert getattr(theirs, f"{role}_token_id") == getattr(encoder.special_tokens, role)
    return encoder


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("strip", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_settings_of_the_normalizer(lower: bool, strip: bool | None, chinese: bool, tmp_path: Path) -> None:
    config = {
        "do_lower_case": lower,
        "strip_accents": strip,
        "tokenize_chinese_chars": chinese,
        "model_max_length": 512,
    }
    encoder = check_equal_to_transformers(write_folder(tmp_path / "old", config), TEXTS, tmp_path / "new")
    words = [encoder.encode([word])[0].tolist() for word in ("möchte", "mochte")]
    assert (words[0] == words[1]) == (strip if strip is not None else lower)
    saved = json.loads((tmp_path / "new/tokenizer_config.json").read_text(encoding="utf-8"))
    assert (saved["do_lower_case"], saved["strip_accents"], saved["tokenize_chinese_chars"]) == (lower, strip, chinese)


ADDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "added_tokens.json": ({}, {"added_tokens": {"<ent>x": 0, "new words": 1}}),
    "special": (
        {},
        {"added_tokens": {"<ent>": 0}, "special_tokens_map": {"extra_special_tokens": ["<ent>"]}},
    ),
    "additional": ({"additional_special_tokens": ["<a>", "<b>"]}, {}),
    "extra": ({"extra_special_tokens": ["<a>"]}, {}),
    "map": ({}, {"special_tokens_map": {"mask_token": {"content": "[MASK]", "lstrip": True, "normalized": False}}}),
    "other names": ({"cls_token": "<s>", "sep_token": "</s>"}, {}),
}


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("case", ADDED)
def test_added_and_special_tokens(case: str, lower: bool, tmp_path: Path) -> None:
    config, files = ADDED[case]
    special = [*SPECIAL, "<s>", "</s>"] if case == "other names" else SPECIAL
    folder = write_folder(tmp_path / "old", {"do_lower_case": lower, **config}, special, **files)
    if "added_tokens" in files:
        known = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        first, content = len(known), {}
        for token in files["added_tokens"]:
            content[token] = known.index(token) if token in known else first + sum(t not in known for t in content)
        (folder / "added_tokens.json").write_text(json.dumps(content), encoding="utf-8")
    # A special token in a text is plain text here.
    texts = [text for text in (*TEXTS, "the <ent>x of new words") if case == "added_tokens.json" or "<" not in text]
    encoder = check_equal_to_transformers(folder, texts, tmp_path / "new")
    if case == "added_tokens.json":
        assert encoder.encode(["new words"])[0].tolist() == [size(folder) + 1]
        assert not (tmp_path / "new/added_tokens.json").exists()


@pytest.mark.parametrize("normalized", [True, False])
def test_added_tokens_decoder(normalized: bool, tmp_path: Path) -> None:
    base = size(write_folder(tmp_path / "plain", {"do_lower_case": True}))
    token = {"lstrip": True, "rstrip": False, "single_word": True, "normalized": normalized, "special": False}
    decoder = {str(i): token | {"content": name, "special": True} for i, name in enumerate(SPECIAL)}
    decoder[str(base)] = token | {"content": "QUICK"}
    config = {"do_lower_case": True, "added_tokens_decoder": decoder}
    folder = write_folder(tmp_path / "old", config)
    check_equal_to_transformers(folder, [*TEXTS[:-1], "the QUICK quick QUICKs"], tmp_path / "new")


@given(st.lists(st.text(st.sampled_from(LETTERS + " \n"), max_size=30), min_size=1, max_size=4), st.data())
def test_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    config: dict[str, Any] = {"do_lower_case": data.draw(st.booleans())}
    config |= {"strip_accents": data.draw(st.sampled_from([None, True, False]))}
    config |= {"tokenize_chinese_chars": data.draw(st.booleans())}
    check_equal_to_transformers(write_folder(tmp_path / "old", config), texts, tmp_path / "new")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mecab": (
        {"word_tokenizer_type": "mecab", "subword_tokenizer_type": "wordpiece"},
        {},
        r"tokenizer_config\.json: setting word_tokenizer_type \(\"mecab\"\) is not supported with vocab\.txt",
    ),
    "class": (
        {"tokenizer_class": "BertJapaneseTokenizer"},
        {},
        "tokenizer_class 'BertJapaneseTokenizer' is not BERT's",
    ),
    "class of the model": ({}, {"config": {"tokenizer_class": "BertweetTokenizer"}}, r"config\.json: tokenizer_class"),
    "basic": ({"do_basic_tokenize": False}, {}, r"setting do_basic_tokenize \(false\) is not supported"),
    "never split": ({"never_split": ["x"]}, {}, r"setting never_split .* is not supported"),
    "unknown": ({"jumanpp_kwargs": {}}, {}, r"setting jumanpp_kwargs \({}\) is not supported"),
    "text": ({"strip_accents": "false"}, {}, 'strip_accents is "false", must be null or true or false'),
    "number": ({"tokenize_chinese_chars": 1}, {}, "tokenize_chinese_chars is 1, must be true or false"),
    "lower": ({"do_lower_case": "yes"}, {}, "does not say whether it is lower-cased"),
    "added id": (
        {},
        {"added_tokens": {"<x>": 7}},
        r"added_tokens\.json: added token '<x>' has id 7, but would get \d+",
    ),
    "added": ({}, {"added_tokens": {"<x>": "seven"}}, r"added_tokens\.json: added tokens cannot be read"),
    "added list": ({}, {"added_tokens": ["<x>"]}, r"added_tokens\.json: must be a JSON object"),
    "decoder": ({"added_tokens_decoder": {"5": "x"}}, {}, r"tokenizer_config\.json: added tokens cannot be read"),
    "role": ({"cls_token": "<s>"}, {}, r"vocab\.txt: has no <s>: not a BERT vocabulary"),
    "role of another type": ({"cls_token": 3}, {}, "cls_token must be a token, found 3"),
    "map": ({}, {"special_tokens_map": {"mask_token": ["x"]}}, "mask_token must be a token"),
    "merges": ({}, {"vocab": {}}, r"vocab\.json: not part of a BERT tokenizer"),
    "deep": ({}, {"special_tokens_map": "deep"}, r"special_tokens_map\.json: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    config, files, message = REFUSED[case]
    folder = write_folder(tmp_path / "old", {"do_lower_case": True, **config}, **files)
    if case == "deep":
        (folder / "special_tokens_map.json").write_text("[" * 100_000, encoding="utf-8")
    source = write_text(tmp_path / "a.txt", make_documents(2))
    before = tree(tmp_path)
    with pytest.raises(CorpusError, match=message):
        build([source], folder, 16, tmp_path / "out", progress=False)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "ElectraTokenizerFast"])
def test_names_of_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "old", {"do_lower_case": False, "tokenizer_class": name, "never_split": None})
    check_equal_to_transformers(tmp_path / "old", TEXTS, tmp_path / "new")


@pytest.mark.parametrize(
    ("setting", "value", "other"),
    [
        ("do_lower_case", False, "lowercase"),
        ("strip_accents", False, "strip_accents"),
        ("tokenize_chinese_chars", False, "handle_chinese_chars"),
    ],
)
def test_config_that_contradicts_tokenizer_json(setting: str, value: bool, other: str, tmp_path: Path) -> None:
    """transformers goes by the configuration: the corpus would have other ids."""
    source = write_text(tmp_path / "a.txt", make_documents(30))
    train_tokenizer([source], 80, tmp_path / "tok", progress=False)
    path = tmp_path / "tok/tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {setting: value}), encoding="utf-8")
    message = re.escape(f"{setting} is false in tokenizer_config.json, but {other} of tokenizer.json is ")
    with pytest.raises(CorpusError, match=f"{message}.*transformers would give other ids. Make the two files agree"):
        build([source], tmp_path / "tok", 16, tmp_path / "out", progress=False)
    content = json.loads((tmp_path / "tok/tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"][other] = value
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    build([source], tmp_path / "tok", 16, tmp_path / "out", progress=False)
