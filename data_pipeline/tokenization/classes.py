"""Tokenizer classes of transformers 5 that rebuild their pipeline instead of reading it from tokenizer.json.

AutoTokenizer takes vocabulary and merges of these from tokenizer.json, but normalizer, pre-tokenizer, settings of the
model and row template from the class and tokenizer_config.json. Files that contradict their class are refused, since a
corpus would hold other ids than transformers gives. Source: models/*/tokenization_*.py of transformers 5.23.

Other classes (PreTrainedTokenizerFast, TokenizersBackend, as for ModernBERT and EuroBERT) read tokenizer.json as it is;
BERT's is in bert_folder.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import CorpusError
from data_pipeline.tokenization.bert_folder import is_bert, read_json

Step = dict[str, Any]
_UNIGRAM = {"type": "Unigram", "byte_fallback": False}
_BPE = {"type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": False}


@dataclass(frozen=True)
class TokenizerClass:
    """roles: default tokens; separators: number of sep tokens between the texts of a pair; steps: settings and the
    Precompiled steps of tokenizer.json -> (normalizer steps, pre-tokenizer steps); model: settings of the model;
    unk_id: of a Unigram model, by settings and vocabulary."""

    roles: dict[str, str]
    separators: int
    steps: Callable[[dict[str, Any], list[Step]], tuple[list[Step], list[Step]]]
    model: dict[str, Any]
    unk_id: Callable[[dict[str, Any], list[list[Any]]], int] | None = None


def _metaspace(scheme: str) -> Step:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


def _replace(pattern: Step, content: str = " ") -> Step:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _byte_level(config: dict[str, Any], _: list[Step]) -> tuple[list[Step], list[Step]]:
    prefix = config.get("add_prefix_space", False)
    return [], [{"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}]


def _words_of_pieces(config: dict[str, Any]) -> list[Step]:
    scheme = "always" if config.get("add_prefix_space", True) else "never"
    return [{"type": "WhitespaceSplit"}, _metaspace(scheme)]


def _sentence_piece(config: dict[str, Any], precompiled: list[Step]) -> tuple[list[Step], list[Step]]:
    return precompiled, _words_of_pieces(config)


def _albert(config: dict[str, Any], precompiled: list[Step]) -> tuple[list[Step], list[Step]]:
    normalizer = [_replace({"String": "``"}, '"'), _replace({"String": "''"}, '"')]
    if not config.get("keep_accents", False):
        normalizer += [{"type": "NFKD"}, {"type": "StripAccents"}]
    if config.get("do_lower_case", True):
        normalizer.append({"type": "Lowercase"})
    return normalizer + precompiled, _words_of_pieces(config)


def _deberta(config: dict[str, Any], _: list[Step]) -> tuple[list[Step], list[Step]]:
    normalizer: list[Step] = [{"type": "Lowercase"}] if config.get("do_lower_case", False) else []
    normalizer += [_replace({"Regex": r"\s{2,}|[\n\r\t]"}), {"type": "NFC"}]
    normalizer += [{"type": "Strip", "strip_left": False, "strip_right": True}]
    splits: list[Step] = [{"type": "Punctuation", "behavior": "Isolated"}] if config.get("split_by_punct") else []
    return normalizer, [*splits, _metaspace("always" if config.get("add_prefix_space", True) else "first")]


def _word_piece(config: dict[str, Any], _: list[Step]) -> tuple[list[Step], list[Step]]:
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "strip_accents": config.get("strip_accents"),
        "lowercase": config.get("do_lower_case", True),
    }
    return [normalizer], [{"type": "BertPreTokenizer"}]


def _unk_of_camembert(config: dict[str, Any], vocabulary: list[list[Any]]) -> int:
    unk = token_content(config.get("unk_token")) or "<unk>"
    return next((i for i, (token, _) in enumerate(vocabulary) if token == unk), 0)


def _unk_of_deberta(config: dict[str, Any], vocabulary: list[list[Any]]) -> int:
    unk = [token_content(config.get("unk_token")) or "[UNK]", 0.0]
    return vocabulary.index(unk) if unk in vocabulary else config.get("unk_id", 1)


_ANGLED = {"cls": "<s>", "sep": "</s>", "bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"}
_SQUARE = {"cls": "[CLS]", "sep": "[SEP]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}
CLASSES = {
    "Roberta": TokenizerClass(_ANGLED, 2, _byte_level, _BPE),
    "XLMRoberta": TokenizerClass(_ANGLED, 2, _sentence_piece, _UNIGRAM, lambda *_: 3),
    "Camembert": TokenizerClass(_ANGLED, 2, _sentence_piece, _UNIGRAM, _unk_of_camembert),
    "Albert": TokenizerClass(_SQUARE | {"pad": "<pad>", "unk": "<unk>"}, 1, _albert, _UNIGRAM, lambda *_: 1),
    "DebertaV2": TokenizerClass(_SQUARE | {"pad": "[PAD]", "unk": "[UNK]"}, 1, _deberta, _UNIGRAM, _unk_of_deberta),
    "MPNet": TokenizerClass(
        _ANGLED | {"unk": "[UNK]"},
        2,
        _word_piece,
        {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    ),
}
# Classes by model_type, for folders whose tokenizer_config.json names none, as the first releases do.
_OF_MODELS = {
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "albert": "AlbertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "mpnet": "MPNetTokenizer",
    "gte": "XLMRobertaTokenizer",
}


def class_name(folder: Path) -> str | None:
    """The tokenizer class of a folder as AutoTokenizer finds it: in tokenizer_config.json, in config.json, or by the
    model_type there. None if nothing names one."""
    model = read_json(folder / "config.json")
    for name in (read_json(folder / "tokenizer_config.json").get("tokenizer_class"), model.get("tokenizer_class")):
        if isinstance(name, str):
            return name
    return _OF_MODELS.get(str(model.get("model_type")))


def tokenizer_class(folder: Path) -> TokenizerClass | None:
    """The class of a folder if it is in CLASSES."""
    name = class_name(folder) or ""
    return CLASSES.get(name.removesuffix("Fast").removesuffix("Tokenizer")) if "Tokenizer" in name else None


def check_class(folder: Path, content: dict[str, Any]) -> None:
    """Raise CorpusError if a folder needs Python code, or if its tokenizer.json contradicts its class.

    content: tokenizer.json as the library tokenizers writes it.
    """
    path = folder / "tokenizer_config.json"
    config, name, known = read_json(path), class_name(folder), tokenizer_class(folder)
    automatic = config.get("auto_map")
    if isinstance(automatic, dict):
        automatic = automatic.get("AutoTokenizer")
    if automatic and known is None and not is_bert(name):
        raise CorpusError(
            f"{path}: auto_map names Python code ({json.dumps(automatic)[:80]}), which is never run here. Load the "
            "folder with AutoTokenizer (trust_remote_code=True), save backend_tokenizer as tokenizer.json, compare "
            "the ids, and remove auto_map"
        )
    _check_added_tokens(path, config, content, known is not None)
    if known is None:
        return
    found = _flat(content.get("normalizer"), "normalizers"), _flat(content.get("pre_tokenizer"), "pretokenizers")
    precompiled = [step for step in found[0] if step["type"] == "Precompiled"][:1]
    expected = known.steps(config, precompiled)
    for part, mine, theirs in zip(("normalizer", "pre_tokenizer"), found, expected, strict=True):
        if (mine := _effective(mine, found[1])) != _effective(theirs, expected[1]):
            raise _contradiction(folder, name, part, _short(mine), _short(theirs))
    model = content["model"]
    settings = dict(known.model)
    if known.unk_id and model["type"] == "Unigram":
        settings["unk_id"] = known.unk_id(config, model["vocab"])
    for key, value in settings.items():
        if model.get(key) != value and (model.get(key) or value):
            raise _contradiction(folder, name, f"model.{key}", model.get(key), value)


def _check_added_tokens(path: Path, config: dict[str, Any], content: dict[str, Any], rebuilt: bool) -> None:
    """Added tokens of tokenizer_config.json that tokenizer.json lacks get new ids in transformers; classes that rebuild
    their pipeline match only those of tokenizer_config.json."""
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return
    stated = {token_content(token) for token in decoder.values()}
    added = {token["content"]: token["special"] for token in content["added_tokens"]}
    model = content["model"]["vocab"]
    known = added.keys() | (model if isinstance(model, dict) else {token for token, _ in model})
    lacking = sorted(map(str, stated - known))
    if rebuilt:
        lacking += sorted(token for token, special in added.items() if not special and token not in stated)
    if lacking:
        raise CorpusError(
            f"{path}: added token {lacking[0]!r} is in only one of added_tokens_decoder and tokenizer.json: "
            "transformers would give other ids. Load the folder with AutoTokenizer and save it with save_pretrained"
        )


def _contradiction(folder: Path, name: str | None, part: str, found: Any, expected: Any) -> CorpusError:
    return CorpusError(
        f"{folder}: {part} of tokenizer.json is {found}, but transformers' {name} uses {expected} and would give other "
        'ids. To keep those of tokenizer.json, write "tokenizer_class": "PreTrainedTokenizerFast" and the special '
        "tokens to tokenizer_config.json; to keep those of transformers, load the folder with AutoTokenizer and save "
        "it with save_pretrained"
    )


def token_content(value: Any) -> str | None:
    """The text of a token in a settings file: a string, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _flat(step: Any, key: str) -> list[Step]:
    if not step:
        return []
    return [one for part in step[key] for one in _flat(part, key)] if step["type"] == "Sequence" else [step]


def _effective(steps: Iterable[Step], pre_tokenizer: list[Step]) -> list[Step]:
    """Without steps and settings that have no effect on ids."""
    kept = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    if any(step["type"] == "WhitespaceSplit" for step in pre_tokenizer):
        # White space is dropped; how much there is does not matter.
        return [step for step in kept if step["type"] != "Strip" and step != _replace({"Regex": " {2,}"})]
    return kept


def _short(steps: list[Step]) -> str:
    shown = [{key: "…" if key == "precompiled_charsmap" else value for key, value in step.items()} for step in steps]
    return json.dumps(shown, ensure_ascii=False)
