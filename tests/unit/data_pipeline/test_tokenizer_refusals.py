"""Tokenizer folders that are refused, by name and with a remedy, or that differ from their own template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data_pipeline.build import build
from data_pipeline.files import CorpusError
from data_pipeline.tokenization.tokenizer import Encoder, copy_tokenizer
from maskvr_ds.data.vocabulary import word_starts
from tests.support.documents import write_text
from tests.support.tokenizers import TEXT, save


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "roberta": (
        "pre_tokenizer",
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "pre_tokenizer .* transformers' RobertaTokenizer uses",
    ),
    "xlm-roberta": (
        "pre_tokenizer",
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
        "pre_tokenizer .* transformers' XLMRobertaTokenizer uses",
    ),
    "albert": ("normalizer", {"type": "NFC"}, "normalizer .* transformers' AlbertTokenizer uses"),
    "deberta-v2": ("normalizer", {"type": "Lowercase"}, "normalizer .* transformers' DebertaV2Tokenizer uses"),
    "mpnet": ("normalizer", {"type": "NFC"}, "normalizer .* transformers' MPNetTokenizer uses"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_tokenizer_json_that_transformers_ignores_is_refused(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = save(kind, tmp_path / "tok")
    part, step, message = CONTRADICTIONS[kind]
    change(folder, "tokenizer.json", lambda content: content.update({part: step}))
    exact = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXT, "fox  É\nÉcole, a\tb"]
    assert any(
        theirs.encode(t, add_special_tokens=False) != exact.encode(t, add_special_tokens=False).ids for t in texts
    )
    with pytest.raises(CorpusError, match=message):
        copy_tokenizer(folder, tmp_path / "copy")
    # Either remedy of the message is accepted.
    theirs.save_pretrained(tmp_path / "again")
    copy_tokenizer(tmp_path / "again", tmp_path / "copy")
    encoder = Encoder(tmp_path / "copy")
    assert all(encoder.encode([t])[0].tolist() == theirs.encode(t, add_special_tokens=False) for t in texts)
    change(folder, "tokenizer_config.json", lambda content: content.update(tokenizer_class="PreTrainedTokenizerFast"))
    copy_tokenizer(folder, tmp_path / "exact")
    encoder, theirs = Encoder(tmp_path / "exact"), AutoTokenizer.from_pretrained(folder)
    assert all(encoder.encode([t])[0].tolist() == theirs.encode(t, add_special_tokens=False) for t in texts)


def only(*names: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for file in folder.iterdir():
            if file.name != "tokenizer_config.json":
                file.unlink()
        for name in names:
            (folder / name).write_text("x", encoding="utf-8")

    return prepare


def without_mask(folder: Path) -> None:
    change(folder, "tokenizer_config.json", lambda content: content.update(mask_token=None))


def python_code(folder: Path) -> None:
    changes = {
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
    }
    change(folder, "tokenizer_config.json", lambda content: content.update(changes))


def few_bytes(folder: Path) -> None:
    def remove(content: dict[str, Any]) -> None:
        content["model"] |= {"merges": [], "vocab": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}}

    change(folder, "tokenizer.json", remove)


def other_added_tokens(folder: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    decoder = {"420": {"content": "<new>"} | flags}
    change(folder, "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=decoder))


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "SentencePiece only": (
        "albert",
        only("spiece.model"),
        r"tokenizer\.json: missing, the folder has only spiece\.model of AlbertTokenizer\. Load it with transformers' "
        r"AutoTokenizer \(with the packages sentencepiece and protobuf installed\) and save it with save_pretrained",
    ),
    "merges only": ("roberta", only("vocab.json", "merges.txt"), r"has only vocab\.json and merges\.txt of Roberta"),
    "no mask": ("modernbert", lambda folder: change(folder, "tokenizer.json", no_mask), "declares no mask_token"),
    "null mask": ("roberta", without_mask, "declares no mask_token"),
    "Python code": ("modernbert", python_code, r"auto_map names Python code .*OwnTokenizer.*which is never run here"),
    "few bytes": ("roberta", few_bytes, "has no token for 242 of the 243 bytes of UTF-8.*characters would be lost"),
    "added tokens": ("eurobert", other_added_tokens, "added token '<new>' is in only one of"),
}


def no_mask(content: dict[str, Any]) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[MASK]"]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, prepare, message = REFUSED[case]
    folder = save(kind, tmp_path / "tok")
    prepare(folder)
    if case == "no mask":
        change(folder, "tokenizer_config.json", lambda content: content.pop("mask_token"))
    with pytest.raises(CorpusError, match=message):
        build([write_text(tmp_path / "a.txt", TEXT)], folder, 32, tmp_path / "corpus", progress=False)
    assert not (tmp_path / "corpus/manifest.json").exists()


def test_templates_of_other_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pairs are refused before tokenization; rows of single texts differ from the template with a warning."""
    folder = save("modernbert", tmp_path / "tok")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] [CLS] $B:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    text = write_text(tmp_path / "a.txt", TEXT)
    with pytest.raises(CorpusError, match="its post_processor does not put a pair as cls A sep B sep"):
        build([text], folder, 32, tmp_path / "pairs", packing="sop", progress=False)
    assert not list((tmp_path / "pairs").glob("*/results/*"))
    with caplog.at_level("WARNING"):
        build([text], folder, 32, tmp_path / "corpus", progress=False)
    assert (
        r"its template puts [SEP] around a text, rows of the corpus have the cls and sep tokens [CLS] [SEP]"
        in caplog.text
    )


def test_words_that_are_not_marked_are_refused(tmp_path: Path) -> None:
    folder = save("xlm-roberta", tmp_path / "tok")
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    change(
        folder,
        "tokenizer.json",
        lambda content: content.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, step]}
        ),
    )
    with pytest.raises(ValueError, match=r"drops spaces and marks no words.*needs no words"):
        word_starts(folder, 200)


def test_ids_without_a_token_are_special(tmp_path: Path) -> None:
    """They are neither predicted nor drawn as random tokens."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])} | {"a": 9, "b": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok/tokenizer.json"))
    encoder = Encoder(tmp_path / "tok")
    assert encoder.vocab_size == 10
    assert encoder.special_tokens.all == (0, 1, 2, 3, 4, 5, 6, 8)
