"""Tokenizers: loading and copying Hugging Face tokenizer folders, encoding text to arrays of ids.

A folder must contain tokenizer.json (an old BERT folder with only vocab.txt is converted: bert_folder.py) and have the
roles cls, sep, pad, mask and unk (roles.py). Ids are those of transformers' AutoTokenizer, or the folder is refused
(bert_folder.py, classes.py). Not supported are tokenizers without a fast version and those that need Python code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError, atomic_folder, sha256_file
from data_pipeline.hub import FAST_TOKENIZER_FILES
from data_pipeline.shards import id_dtype
from data_pipeline.tokenization.bert_folder import check_agreement, convert_vocabulary, read_json
from data_pipeline.tokenization.classes import check_class, class_name, tokenizer_class
from data_pipeline.tokenization.roles import declared_roles, row_template, special_tokens
from data_pipeline.tokenization.word_cache import WordCache, why_not_word_wise, word_starts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_logger = logging.getLogger(__name__)


class Encoder:
    """A tokenizer loaded from a folder.

    `special_tokens`; `row_template`, as in roles.py; `vocab_size` (highest id + 1); `dtype` of the ids; `sha256` of
    tokenizer.json; `word_cache`, or None with the reason in `why_not_cached`.
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
        self.special_tokens = special_tokens(folder, self.tokenizer)
        if len(self.special_tokens.all) == self.vocab_size:
            raise CorpusError(
                f"{path}: has no tokens besides its {len(self.special_tokens.all)} special ones, so every text "
                "would be [UNK]. transformers 5 saves this after BertTokenizer(vocab_file=…), whose argument is now "
                "vocab=…: load and save the tokenizer again"
            )
        self._reserved = np.zeros(self.vocab_size, np.bool_)
        self._reserved[list(self.special_tokens.all)] = True
        if self.special_tokens.unk is not None:
            self._reserved[self.special_tokens.unk] = False
        self.row_template = row_template(folder, self.tokenizer, self.special_tokens)
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
        breaks = self.word_cache.breaks if self.word_cache else ()
        if self.word_cache and all(
            text[at - 1] in breaks for text, cuts in zip(texts, sentences, strict=True) for at in cuts if at
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
                    for text, first, encoding, cuts in zip(texts, firsts.tolist(), encodings, sentences, strict=True)
                    for token in _first_tokens(text, encoding.offsets, cuts)
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
            if self.special_tokens.unk is None:
                token = self.tokenizer.id_to_token(int(ids[reserved][0]))
                raise CorpusError(
                    f"the tokenizer encodes {token!r} in a text as that special token, and has no unk_token that could "
                    "replace it. Declare an unk_token, or remove the words from the text"
                )
            ids[reserved] = self.special_tokens.unk
        return ids


def _first_tokens(text: str, offsets: list[tuple[int, int]], cuts: list[int]) -> list[int]:
    """Index of the first token that starts in each interval [cut, next cut); intervals without tokens are skipped.

    White space at the start of a token ("Ġ", "▁") is not counted: sentences start after it.
    """
    found = []
    offsets = [(stop - len(text[start:stop].lstrip()) if start < stop else start, stop) for start, stop in offsets]
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
        raise _no_fast_tokenizer(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"{path}: cannot be read as a tokenizer ({error})") from error


def _no_fast_tokenizer(path: Path) -> CorpusError:
    """The error for a folder without tokenizer.json, by the files that it has instead."""
    folder = path.parent
    models = sorted(file.name for file in folder.glob("*.model")) if folder.is_dir() else []
    slow = models or [name for name in ("vocab.json", "merges.txt") if (folder / name).is_file()]
    if not slow:
        return CorpusError(f"{path}: missing. Save the tokenizer with transformers' save_pretrained, or train one")
    name = class_name(folder)
    needs = " (with the packages sentencepiece and protobuf installed)" if models else ""
    return CorpusError(
        f"{path}: missing, the folder has only {' and '.join(slow)}{f' of {name}' if name else ''}. Load it with "
        f"transformers' AutoTokenizer{needs} and save it with save_pretrained, which writes a tokenizer.json; a "
        "tokenizer that has no fast version is not supported"
    )


def _files(folder: Path) -> list[Path]:
    """The files that define the tokenizer of a folder, sorted by name. Raises CorpusError if there is no folder."""
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder. --tokenizer must be a Hugging Face tokenizer folder")
    found = sorted(path for path in folder.iterdir() if path.name in FAST_TOKENIZER_FILES or path.suffix == ".model")
    if odd := [path for path in found if not path.is_file()]:
        raise CorpusError(f"{odd[0]}: is no file (a folder, pipe, device or dead link). Restore it, or remove it")
    return found


def fingerprint(folder: str | Path) -> str:
    """SHA-256 that identifies the files of a tokenizer folder. Raises CorpusError if the folder is missing."""
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in _files(Path(folder)))
    return hashlib.sha256(lines.encode()).hexdigest()


def pair_separators(folder: Path) -> int:
    """Number of [SEP] between the segments of a pair: 1 for BERT, 2 for RoBERTa, from the tokenizer's own template.

    Raises CorpusError if the template is of another form.
    """
    separators = Encoder(folder).row_template[1]
    if separators is None:
        raise CorpusError(
            f"{folder / 'tokenizer.json'}: its post_processor does not put a pair as cls A sep B sep (or several sep "
            "between). Correct the post_processor, or use --packing documents or full_sequences"
        )
    return separators


def copy_tokenizer(source: str | Path, target: Path, built: bool = False) -> None:
    """Copy the files of a tokenizer folder atomically; create tokenizer.json if there is only vocab.txt.

    Does nothing if `target` exists. built: the folder belongs to token shards or a corpus, whose ids it explains
    whatever transformers makes of it; otherwise the ids must be those of transformers.
    Raises CorpusError if `source` is not a usable tokenizer.
    """
    source = Path(source)
    if target.exists():
        return
    with atomic_folder(target) as folder:
        names = [shutil.copyfile(path, folder / path.name).name for path in _files(source)]
        if "tokenizer.json" not in names and "vocab.txt" in names:
            convert_vocabulary(source, folder)
        try:
            _complete(source, folder)
            encoder = Encoder(folder)
            if built:
                return
            check_agreement(folder)
            check_class(folder, json.loads(encoder.tokenizer.to_str()))
        except CorpusError as error:  # report the user's folder, not the temporary copy
            raise CorpusError(str(error).replace(str(folder), str(source))) from error
        expected, found = [encoder.special_tokens.cls, encoder.special_tokens.sep], encoder.row_template[0]
        if found not in ([], expected):
            names = [" ".join(map(str, map(encoder.tokenizer.id_to_token, ids))) for ids in (found, expected)]
            _logger.warning(
                "warning: %s: its template puts %s around a text, rows of the corpus have the cls and sep tokens %s. "
                "Set cls_token and sep_token in tokenizer_config.json, or ignore this if it is intended",
                *(source, *names),
            )


def _complete(source: Path, target: Path) -> None:
    """Write to tokenizer_config.json of the copy what transformers takes from config.json: the class of a tokenizer
    that names none, and the special tokens that are defaults of the class."""
    path = target / "tokenizer_config.json"
    config = read_json(path)
    if tokenizer_class(source) is None or isinstance(config.get("tokenizer_class"), str):
        return
    roles = {f"{role}_token": token for role, token in declared_roles(source).items()}
    completed = {"tokenizer_class": class_name(source)} | roles | config
    path.write_text(json.dumps(completed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
