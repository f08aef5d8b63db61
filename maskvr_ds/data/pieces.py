"""Tokens of one vocabulary in terms of another: what text a token is, and of which pieces the other makes it.

A token is compared by its text and by whether it starts a word, which tokenizers write differently: "##ing" and "ing",
"ing" and "Ġing", "ing" and "▁ing". Loads no torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from maskvr_ds.data.vocabulary import byte_alphabet, pre_tokenizer_steps, read_tokenizer

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_ROLES = ("cls", "sep", "pad", "mask", "unk")
_FALLBACK = {"cls": "bos", "sep": "eos"}


class Surface(NamedTuple):
    """Text of a token without its mark, and whether it starts a word."""

    text: str
    starts_word: bool


class Pieces:
    """The vocabulary of a folder's tokenizer. `ids`: token -> id, added tokens included; `roles`: token of cls, sep,
    pad, mask and unk, of those that the folder declares.

    Raises ValueError if there is no tokenizer.json that can be read.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{path}: missing, needed for model.vocabulary; load the tokenizer with transformers' AutoTokenizer "
                "and save it there with save_pretrained"
            )
        self._tokenizer = read_tokenizer(folder)
        content = json.loads(path.read_text(encoding="utf-8"))
        self.ids: dict[str, int] = dict(self._tokenizer.get_vocab(with_added_tokens=True))
        self.roles = _roles(folder)
        model = content["model"]
        steps = {step["type"]: step for step in pre_tokenizer_steps(content.get("pre_tokenizer"))}
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._marker: str = steps["Metaspace"].get("replacement", "▁") if "Metaspace" in steps else ""
        self._bytes = byte_alphabet() if "ByteLevel" in steps and not self._prefix else {}
        self._characters = {byte: character for character, byte in self._bytes.items()}
        self._unknown = model.get("unk_token")
        if model.get("type") == "Unigram" and isinstance(model.get("unk_id"), int):
            self._unknown = model["vocab"][model["unk_id"]][0]
        self._added = {token["content"] for token in content.get("added_tokens") or ()}

    def surface(self, token: str) -> Surface | None:
        """None for part of a character of UTF-8. An added token is its own text and starts a word."""
        if token in self._added:
            return Surface(token, True)
        if self._prefix:
            continues = token.startswith(self._prefix)
            return Surface(token.removeprefix(self._prefix), not continues)
        mark = self._marker
        if self._bytes:
            try:
                token, mark = bytes(self._bytes[character] for character in token).decode(), " "
            except (KeyError, UnicodeDecodeError):
                return None
        starts = bool(mark) and token.startswith(mark)
        return Surface(token.removeprefix(mark), starts or not mark)

    def pieces(self, surface: Surface) -> list[int]:
        """Ids of the tokens that this tokenizer's model makes of a text, unknown ones omitted."""
        text = surface.text
        if self._tokenizer.normalizer is not None and text:
            text = self._tokenizer.normalizer.normalize_str(text)
        if self._prefix:
            return self._word_pieces(text, surface.starts_word)
        if self._bytes:
            text = (" " if surface.starts_word else "") + text.removeprefix(" ")
            return self._known("".join(self._characters[byte] for byte in text.encode()))
        if self._marker:
            text = text.replace(" ", self._marker).removeprefix(self._marker)
            text = (self._marker if surface.starts_word else "") + text
        return self._known(text)

    def _known(self, word: str) -> list[int]:
        tokens = self._tokenizer.model.tokenize(word) if word else []
        return [token.id for token in tokens if token.value != self._unknown]

    def _word_pieces(self, text: str, starts_word: bool) -> list[int]:
        """WordPiece: the pre-tokenizer decides what a word is, as "," is one within a word too."""
        step, before = self._tokenizer.pre_tokenizer, "" if starts_word else "x"
        words = [word for word, _ in step.pre_tokenize_str(before + text)] if step else [before + text]
        found: list[int] = []
        for i, word in enumerate(words):
            found += self._known(word) if starts_word or i else self._continued(word[1:])
        return found

    def _continued(self, text: str) -> list[int]:
        """The longest known pieces that continue a word, one after the other; none if a part is unknown."""
        found: list[int] = []
        while text:
            lengths = range(len(text), 0, -1)
            length = next((n for n in lengths if self._prefix + text[:n] in self.ids), 0)
            if not length:
                return []
            found.append(self.ids[self._prefix + text[:length]])
            text = text[length:]
        return found


def _roles(folder: Path) -> dict[str, str]:
    """Role -> token, as the folder's files declare them; bos and eos serve as missing cls and sep."""
    declared: dict[str, str] = {}
    for name in reversed(_SETTINGS):
        for key, value in _read(folder / name).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(token, str):
                declared[key.removesuffix("_token")] = token
    roles = {role: declared.get(role) or declared.get(_FALLBACK.get(role, "")) for role in _ROLES}
    return {role: token for role, token in roles.items() if token}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); save the tokenizer again") from None
    return content if isinstance(content, dict) else {}
