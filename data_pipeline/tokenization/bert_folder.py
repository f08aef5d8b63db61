"""BERT's tokenizer: its Hugging Face folder, written with tokenizer.json or read from an older one with only vocab.txt.

The settings of an older folder are in tokenizer_config.json, special_tokens_map.json and added_tokens.json. All that
transformers reads there is honoured or refused by name, so that both give the same ids. The roles cls, sep, pad, mask
and unk have BERT's names unless declared otherwise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import CorpusError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# Tokenizers of transformers that are BERT's under another name; with or without "Fast".
_CLASSES = ("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "Retribert", "SqueezeBert")
# Settings without effect on the ids of a text.
_WITHOUT_EFFECT = {
    "auto_map",
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "full_tokenizer_file",
    "is_local",
    "local_files_only",
    "max_len",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding_side",
    "processor_class",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "tokenizer_version",
    "transformers_version",
    "truncation",
    "truncation_side",
    "truncation_strategy",
    "vocab_file",
}
# Settings that this pipeline knows for one value only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "clean_text": (True,),
    "do_basic_tokenize": (True,),
    "never_split": (None, []),
    "split_special_tokens": (False,),  # a special token in a text is plain text here, whatever the setting
    "wordpieces_prefix": ("##",),
    "mask_token_lstrip": (None,),
}
_REMEDY = (
    "Load the folder with transformers' AutoTokenizer and save it with save_pretrained: that writes a tokenizer.json, "
    "if the tokenizer can have one"
)


@dataclass(frozen=True)
class BertSettings:
    """Settings of a BERT tokenizer. added: tokens added after the vocabulary, in the order of their ids."""

    lower_case: bool
    strip_accents: bool | None = None
    chinese_characters: bool = True
    roles: dict[str, str] = field(default_factory=lambda: dict(BERT_ROLES))
    added: tuple[AddedToken, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is no file. Raises CorpusError if it is something else."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON ({error}). Save the tokenizer again") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{path}: must be a JSON object")
    return value


def convert_vocabulary(source: Path, target: Path) -> None:
    """Write `source`, a folder with vocab.txt but without tokenizer.json, to the folder `target` with both.

    Raises CorpusError naming the file and the setting that cannot be honoured.
    """
    settings = _read_settings(source)
    vocabulary = _read_vocabulary(source / "vocab.txt", settings.roles)
    save_bert(bert_tokenizer(vocabulary, settings, source), target, settings)


def check_agreement(folder: Path) -> None:
    """Raise CorpusError if tokenizer.json of a BERT tokenizer contradicts tokenizer_config.json.

    transformers goes by the latter, and would give other ids than the corpus has.
    """
    config = read_json(folder / "tokenizer_config.json")
    content = read_json(folder / "tokenizer.json")
    normalizer = content.get("normalizer")
    if not is_bert(config.get("tokenizer_class")) or not isinstance(normalizer, dict):
        return
    if normalizer.get("type") != "BertNormalizer":
        return
    pairs = (
        ("do_lower_case", True, "lowercase"),
        ("strip_accents", None, "strip_accents"),
        ("tokenize_chinese_chars", True, "handle_chinese_chars"),
    )
    for setting, default, name in pairs:
        if (stated := config.get(setting, default)) != (found := normalizer.get(name, default)):
            raise CorpusError(
                f"{folder}: {setting} is {json.dumps(stated)} in tokenizer_config.json, but {name} of tokenizer.json "
                f"is {json.dumps(found)}: transformers would give other ids. Make the two files agree"
            )


def is_bert(name: Any) -> bool:
    """Whether the name of a tokenizer class is BERT's, or that of another class with the same tokenizer."""
    return isinstance(name, str) and name.removesuffix("Fast").removesuffix("Tokenizer") in _CLASSES


def _read_settings(folder: Path) -> BertSettings:
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    lower = config.get("do_lower_case")
    if not isinstance(lower, bool):
        raise CorpusError(
            f"{folder}: has vocab.txt but no tokenizer.json, and does not say whether it is lower-cased. "
            'Write {"do_lower_case": true} (or false) to its tokenizer_config.json'
        )
    for other in sorted(folder.iterdir()):
        if other.name in ("vocab.json", "merges.txt") or other.suffix == ".model":
            raise CorpusError(f"{other}: not part of a BERT tokenizer of vocab.txt. {_REMEDY}, or remove the file")
    model = folder / "config.json"
    for file, content in ((path, config), (model, read_json(model))):
        if (name := content.get("tokenizer_class")) is not None and not is_bert(name):
            raise CorpusError(f"{file}: tokenizer_class {name!r} is not BERT's tokenizer of vocab.txt. {_REMEDY}")
    if "added_tokens_decoder" not in config:
        # As in transformers: entries of this file override those of the other, which newer folders have in their stead.
        config |= read_json(folder / "special_tokens_map.json")
    strip, chinese = config.get("strip_accents"), config.get("tokenize_chinese_chars", True)
    known = {"do_lower_case", "tokenizer_class", "strip_accents", "tokenize_chinese_chars", "added_tokens_decoder"}
    known |= {f"{role}_token" for role in BERT_ROLES} | {"additional_special_tokens", "extra_special_tokens"}
    for key, value in config.items():
        if (key in _FIXED and value in _FIXED[key]) or key in known | _WITHOUT_EFFECT or (value is None):
            continue
        raise CorpusError(
            f"{path}: setting {key} ({json.dumps(value)[:60]}) is not supported with vocab.txt. {_REMEDY}"
        )
    for key, value, allowed in (
        ("strip_accents", strip, (None, True, False)),
        ("tokenize_chinese_chars", chinese, (True, False)),
    ):
        if not any(value is one for one in allowed):
            raise CorpusError(f"{path}: {key} is {json.dumps(value)}, must be {' or '.join(map(json.dumps, allowed))}")
    roles = {
        role: _content(config.get(f"{role}_token"), path, f"{role}_token") or name for role, name in BERT_ROLES.items()
    }
    return BertSettings(lower, strip, chinese, roles, _added(folder, config, roles))


def _content(value: Any, path: Path, key: str) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise CorpusError(f"{path}: {key} must be a token, found {json.dumps(value)[:60]}")
    return text


def _added(folder: Path, config: dict[str, Any], roles: dict[str, str]) -> tuple[AddedToken, ...]:
    """The added tokens of a folder in the order of their ids, then its other special tokens. Raises CorpusError if
    their ids do not follow those of vocab.txt, as they do in transformers."""
    from tokenizers import AddedToken

    path = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise CorpusError(f"{path}: extra_special_tokens must be a list of tokens")
    specials = [text for value in extra if (text := _content(value, path, "extra_special_tokens"))]
    found: dict[int, AddedToken] = {}
    try:
        if "added_tokens_decoder" in config:
            for index, value in config["added_tokens_decoder"].items():
                found[int(index)] = AddedToken(**value)
        else:
            path = folder / "added_tokens.json"
            for text, index in read_json(path).items():
                special = text in specials or text in roles.values()
                found[int(index)] = AddedToken(text, normalized=not special, special=special)
    except (TypeError, ValueError, AttributeError) as error:
        raise CorpusError(f"{path}: added tokens cannot be read ({error}). Save the tokenizer again") from None
    vocabulary = _read_vocabulary(folder / "vocab.txt", roles)
    following = len(vocabulary)
    for index, token in sorted(found.items()):
        expected = vocabulary.get(token.content, following)
        following += token.content not in vocabulary
        if index != expected:
            raise CorpusError(
                f"{path}: added token {token.content!r} has id {index}, but would get {expected}: added tokens follow "
                f"the {len(vocabulary):,} entries of vocab.txt. {_REMEDY}"
            )
    names = {token.content for token in found.values()}
    others = [AddedToken(text, special=True) for text in specials if text not in names]
    return (*(token for _, token in sorted(found.items())), *others)


def _read_vocabulary(path: Path, roles: dict[str, str]) -> dict[str, int]:
    try:
        vocabulary = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error}). Convert the file, or save the tokenizer again") from None
    if missing := [token for token in roles.values() if token not in vocabulary]:
        raise CorpusError(f"{path}: has no {', '.join(missing)}: not a BERT vocabulary")
    return vocabulary


def bert_tokenizer(vocabulary: dict[str, int] | None, settings: BertSettings, folder: Path | None = None) -> Tokenizer:
    """BERT's normalizer, pre-tokenizer and WordPiece model, without the post-processor (it needs the ids)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = settings.roles["unk"]
    model = models.WordPiece(vocabulary, unk_token=unknown) if vocabulary else models.WordPiece(unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.lower_case,
        strip_accents=settings.strip_accents,
        handle_chinese_chars=settings.chinese_characters,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if vocabulary:
        names = {token.content for token in settings.added}
        tokenizer.add_tokens(list(settings.added))
        tokenizer.add_special_tokens([token for token in settings.roles.values() if token not in names])
    return tokenizer


def save_bert(tokenizer: Tokenizer, folder: Path, settings: BertSettings) -> None:
    """Save in the format that transformers loads as a BertTokenizer."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = settings.roles["cls"], settings.roles["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    write("tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    roles = {f"{role}_token": token for role, token in settings.roles.items()}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": settings.lower_case,
        "strip_accents": settings.strip_accents,
        "tokenize_chinese_chars": settings.chinese_characters,
        **roles,
    }
    write("tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write("special_tokens_map.json", json.dumps(roles, indent=2) + "\n")
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    write("vocab.txt", "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__)))
    # Now in tokenizer.json.
    (folder / "added_tokens.json").unlink(missing_ok=True)
