"""Special tokens of a tokenizer folder: the roles cls, sep, pad, mask and unk, and the rows that its template makes.

A role is looked up as in transformers: defaults of the tokenizer class (classes.py), overridden by
tokenizer_config.json, and that by special_tokens_map.json in older folders, without added_tokens_decoder. If nothing
declares it, a special token of tokenizer.json with BERT's name has it. bos and eos replace missing cls and sep.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import CorpusError
from data_pipeline.shards import SpecialTokens
from data_pipeline.tokenization.bert_folder import BERT_ROLES, read_json
from data_pipeline.tokenization.classes import token_content, tokenizer_class

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FALLBACK = {"cls": "bos", "sep": "eos"}
# Never in UTF-8; byte-level alphabets write these bytes as the characters of Latin-1.
_UNUSED_BYTES = {0xC0, 0xC1, *range(0xF5, 0x100)}


def declared_roles(folder: Path) -> dict[str, str]:
    """Role -> token, as the files and the class of a folder declare them."""
    config, known = read_json(folder / "tokenizer_config.json"), tokenizer_class(folder)
    roles: dict[str, str | None] = dict(known.roles) if known else {}
    settings = [config]
    if "added_tokens_decoder" not in config:
        settings.append(read_json(folder / "special_tokens_map.json"))
    for content in settings:
        for key, value in content.items():
            if key.endswith("_token") and (value is None or token_content(value)):
                roles[key.removesuffix("_token")] = token_content(value)
    return {role: token for role, token in roles.items() if token}


def special_tokens(folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
    """The special tokens of a folder. unk is None for byte-level tokenizers without one.

    Raises CorpusError if a role is missing, not in the vocabulary, or shared with that of pad or mask.
    """
    added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    contents = {token.content for token in added.values()}
    declared = {role: token for role, token in BERT_ROLES.items() if token in contents} | declared_roles(folder)
    missing_bytes = _missing_bytes(tokenizer)
    ids: dict[str, int] = {}
    for role in BERT_ROLES:
        token = declared.get(role) or declared.get(_FALLBACK.get(role, ""))
        if token is None:
            if role == "unk" and missing_bytes == 0:
                continue
            raise CorpusError(
                f"{folder}: declares no {role}_token, but training needs cls, sep, pad, mask and unk. "
                f'Add the token to the vocabulary and "{role}_token" to tokenizer_config.json'
            )
        found = tokenizer.token_to_id(token)
        if found is None:
            raise CorpusError(f"{folder}: its {role}_token {token!r} is not in the vocabulary of tokenizer.json")
        ids[role] = found
    if missing_bytes:
        raise CorpusError(
            f"{folder / 'tokenizer.json'}: has no token for {missing_bytes} of the 243 bytes of UTF-8, and no "
            "unk_token in its model: characters would be lost. Train it with the initial alphabet of byte-level "
            "tokenizers (tokenizers.pre_tokenizers.ByteLevel.alphabet())"
        )
    for role in "pad", "mask":
        # The trainer recognises padding and [MASK] by their ids.
        if shared := [other for other in ids if other != role and ids[other] == ids[role]]:
            raise CorpusError(
                f"{folder}: {role}_token and {shared[0]}_token are both {declared.get(role)!r} (id {ids[role]}). "
                f"Give {role}_token a distinct token in tokenizer_config.json"
            )
    known = set(tokenizer.get_vocab(with_added_tokens=True).values())
    unassigned = set(range(max(known) + 1)) - known
    return SpecialTokens(
        cls=ids["cls"],
        sep=ids["sep"],
        pad=ids["pad"],
        mask=ids["mask"],
        unk=ids.get("unk"),
        all=tuple(sorted({*added, *ids.values(), *unassigned})),
    )


def _missing_bytes(tokenizer: Tokenizer) -> int | None:
    """Number of bytes that a byte-level model without an unknown token cannot encode; None for other models."""
    from tokenizers.pre_tokenizers import ByteLevel

    if type(tokenizer.model).__name__ != "BPE":
        return None
    content = json.loads(tokenizer.to_str())
    if content["model"].get("unk_token") or not _is_byte_level(content):
        return None
    needed = set(ByteLevel.alphabet()) - set(map(chr, _UNUSED_BYTES))
    return len(needed - content["model"]["vocab"].keys())


def _is_byte_level(content: dict[str, Any]) -> bool:
    def types(step: Any) -> set[str]:
        if not step:
            return set()
        parts = step.get("pretokenizers") or step.get("normalizers") or []
        return {step["type"]}.union(*map(types, parts))

    return "ByteLevel" in types(content.get("pre_tokenizer")) | types(content.get("normalizer"))


def row_template(folder: Path, tokenizer: Tokenizer, special: SpecialTokens) -> tuple[list[int], int | None]:
    """Ids that the tokenizer puts around a single text (those before it, then those after it), and the number of sep
    tokens between the texts of a pair.

    The latter is None if its pairs are not `cls A sep … sep B sep`; 1 if it makes no rows at all (no post-processor).
    """
    known = tokenizer_class(folder)
    around, pair = _special_ids(tokenizer, None), _special_ids(tokenizer, "a")
    if known is not None:
        return [special.cls, special.sep], known.separators
    if not around[0] + around[1] and not any(pair):
        return [], 1
    before, between, after = pair
    regular = before == [special.cls] and after == [special.sep] and between and set(between) == {special.sep}
    return around[0] + around[1], len(between) if regular else None


def _special_ids(tokenizer: Tokenizer, second: str | None) -> tuple[list[int], list[int], list[int]]:
    """Special ids before the first text, between the texts (after the only one), and after the second."""
    encoding = tokenizer.encode("a", second)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    place = 0
    for token, sequence in zip(encoding.ids, encoding.sequence_ids, strict=True):
        if sequence is None:
            parts[place].append(token)
        else:
            place = sequence + 1
    return parts
