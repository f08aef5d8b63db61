"""Tokenizers: loading and copying Hugging Face tokenizer folders, encoding text to arrays of ids.

A folder must contain tokenizer.json (an old BERT folder with only vocab.txt is converted: bert_folder.py) and declare
the roles cls, sep, pad, mask and unk. These are looked up in tokenizer_config.json,
then special_tokens_map.json, then among the special tokens of tokenizer.json under BERT's names. bos and eos are used
in place of missing cls and sep. Nothing else is guessed.
"""

from __future__ import annotations

import hashlib
import shutil
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError, atomic_folder, sha256_file
from data_pipeline.shards import SpecialTokens, id_dtype
from data_pipeline.tokenization.bert_folder import BERT_ROLES, check_agreement, convert_vocabulary, read_json
from data_pipeline.tokenization.word_cache import WordCache, why_not_word_wise, word_starts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FALLBACK = {"cls": "bos", "sep": "eos"}
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


class Encoder:
    """A tokenizer loaded from a folder.

    `special_tokens`; `vocab_size` (highest id + 1); `dtype` of the ids; `sha256` of tokenizer.json; `word_cache`, or
    None with the reason in `why_not_cached`.
    Raises CorpusError if the folder is not a tokenizer folder or a role is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        self.tokenizer = _load(path)
        self.sha256 = sha256_file(path)
        # "[SEP]" in a text is plain text: otherwise it would be encoded as the special token.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = id_dtype(self.vocab_size)
        self.special_tokens = _special_tokens(folder, self.tokenizer)
        if self.tokenizer.get_vocab_size(with_added_tokens=True) <= len(self.special_tokens.all):
            raise CorpusError(
                f"{path}: has no tokens besides its {len(self.special_tokens.all)} special ones, so every text "
                "would be [UNK]. transformers 5 saves this after BertTokenizer(vocab_file=…), whose argument is now "
                "vocab=…: load and save the tokenizer again"
            )
        self._reserved = np.zeros(self.vocab_size, np.bool_)
        self._reserved[list(self.special_tokens.all)] = True
        self._reserved[self.special_tokens.unk] = False
        self.why_not_cached = why_not_word_wise(self.tokenizer)
        self.word_cache = None if self.why_not_cached else WordCache(self.tokenizer, self.dtype)

    def encode(self, texts: list[str]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Encode texts without adding special tokens.

        Returns the ids of all texts, self.dtype [T], and the number of ids of each text, int64 [len(texts)].
        """
        ids, counts, _ = self._encode(texts, words=False)
        return ids, counts

    def encode_planes(
        self, texts: list[str], sentences: list[list[int]] | None, words: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], dict[str, NDArray[np.bool_]]]:
        """Like `encode`, and also returns planes, bool [T]: `word_start` if `words`, `sentence_start` if `sentences`.

        sentences: for each text, the ascending character offsets at which sentences start. A sentence without tokens
        sets no bit.
        """
        if sentences is None:
            ids, counts, starts = self._encode(texts, words)
            return ids, counts, {} if starts is None else {"word_start": starts}
        # A word-wise tokenizer can encode sentences separately if they are separated by white space.
        if self.word_cache and all(
            text[at - 1].isspace() for text, cuts in zip(texts, sentences, strict=True) for at in cuts if at
        ):
            pieces, owner, is_start = [], [], []
            for i, (text, cuts) in enumerate(zip(texts, sentences, strict=True)):
                inner = [at for at in cuts if at]
                pieces += [text[a:b] for a, b in zip([0, *inner], [*inner, len(text)], strict=True)]
                owner += [i] * (len(inner) + 1)
                is_start += [bool(cuts) and cuts[0] == 0, *[True] * len(inner)]
            ids, lengths, starts = self._encode(pieces, words)
            at = (np.cumsum(lengths) - lengths)[np.array(is_start, np.bool_) & (lengths > 0)]
            counts = np.bincount(np.array(owner, np.int64), lengths, len(texts)).astype(np.int64)
        else:
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            ids, counts, starts = self._collect(encodings, words)
            firsts = np.cumsum(counts) - counts
            at = np.array(
                [
                    first + token
                    for first, encoding, cuts in zip(firsts.tolist(), encodings, sentences, strict=True)
                    for token in _first_tokens(encoding.offsets, cuts)
                ],
                np.int64,
            )
        plane = np.zeros(len(ids), np.bool_)
        plane[at] = True
        return ids, counts, {"sentence_start": plane} | ({} if starts is None else {"word_start": starts})

    def _encode(
        self, texts: list[str], words: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.bool_] | None]:
        if self.word_cache:
            ids, counts, starts = self.word_cache.encode(texts, words)
            return self._without_special(ids), counts, starts
        call = self.tokenizer.encode_batch if words else self.tokenizer.encode_batch_fast
        return self._collect(call(texts, add_special_tokens=False), words)

    def _collect(
        self, encodings: list[Any], words: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.bool_] | None]:
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        # A single pass over all ids: one array per text would be slower for short texts.
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), self.dtype, int(counts.sum()))
        starts = None
        if words:
            flags = chain.from_iterable(word_starts(encoding.word_ids) for encoding in encodings)
            starts = np.fromiter(flags, np.bool_, len(ids))
        return self._without_special(ids), counts, starts

    def _without_special(self, ids: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        # Some tokenizers have "<s>" as a word in their vocabulary, and match it even with encode_special_tokens.
        reserved = self._reserved[ids]
        if reserved.any():
            ids[reserved] = self.special_tokens.unk
        return ids


def _first_tokens(offsets: list[tuple[int, int]], cuts: list[int]) -> list[int]:
    """Index of the first token that starts in each interval [cut, next cut); intervals without tokens are skipped."""
    found = []
    token = 0
    for cut, following in zip(cuts, [*cuts[1:], 1 << 62], strict=True):
        while token < len(offsets) and offsets[token][0] < cut:
            token += 1
        if token < len(offsets) and offsets[token][0] < following:
            found.append(token)
    return found


def _load(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CorpusError(f"{path}: missing. Save the tokenizer with transformers' save_pretrained, or train one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"{path}: cannot be read as a tokenizer ({error})") from error


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
    added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    contents = {token.content for token in added.values()}
    declared: dict[str, str] = {role: token for role, token in BERT_ROLES.items() if token in contents}
    for name in "special_tokens_map.json", "tokenizer_config.json":
        for key, value in read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                declared[key.removesuffix("_token")] = content
    ids: dict[str, int] = {}
    for role in BERT_ROLES:
        token = declared.get(role) or declared.get(_FALLBACK.get(role, ""))
        if token is None:
            raise CorpusError(
                f"{folder}: declares no {role}_token, but training needs cls, sep, pad, mask and unk. "
                f'Add the token to the vocabulary and "{role}_token" to tokenizer_config.json'
            )
        found = tokenizer.token_to_id(token)
        if found is None:
            raise CorpusError(f"{folder}: its {role}_token {token!r} is not in the vocabulary of tokenizer.json")
        ids[role] = found
    for role in "pad", "mask":
        # The trainer recognises padding and [MASK] by their ids.
        if shared := [other for other in ids if other != role and ids[other] == ids[role]]:
            raise CorpusError(
                f"{folder}: {role}_token and {shared[0]}_token are both {declared.get(role)!r} (id {ids[role]}). "
                f"Give {role}_token a distinct token in tokenizer_config.json"
            )
    return SpecialTokens(**ids, all=tuple(sorted({*added, *ids.values()})))


def _files(folder: Path) -> list[Path]:
    """The files that define the tokenizer of a folder, sorted by name. Raises CorpusError if there is no folder."""
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder. --tokenizer must be a Hugging Face tokenizer folder")
    found = sorted(path for path in folder.iterdir() if path.name in _FILES or path.suffix == ".model")
    if odd := [path for path in found if not path.is_file()]:
        raise CorpusError(f"{odd[0]}: is no file (a folder, pipe, device or dead link). Restore it, or remove it")
    return found


def fingerprint(folder: str | Path) -> str:
    """SHA-256 that identifies the files of a tokenizer folder. Raises CorpusError if the folder is missing."""
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in _files(Path(folder)))
    return hashlib.sha256(lines.encode()).hexdigest()


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy the files of a tokenizer folder atomically; create tokenizer.json if there is only vocab.txt.

    Does nothing if `target` exists. Raises CorpusError if `source` is not a usable tokenizer.
    """
    source = Path(source)
    if target.exists():
        return
    with atomic_folder(target) as folder:
        names = [shutil.copyfile(path, folder / path.name).name for path in _files(source)]
        if "tokenizer.json" not in names and "vocab.txt" in names:
            convert_vocabulary(source, folder)
        try:
            Encoder(folder)
            check_agreement(folder)
        except CorpusError as error:  # report the user's folder, not the temporary copy
            raise CorpusError(str(error).replace(str(folder), str(source))) from error
