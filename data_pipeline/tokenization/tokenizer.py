"""Tokenizers: train WordPiece, load any Hugging Face tokenizer folder, encode text to arrays of ids.

A folder must hold tokenizer.json (an old BERT folder with vocab.txt alone will do, if its tokenizer_config.json says
`do_lower_case`), and declare the roles cls, sep, pad, mask, unk. Looked for, in this order, in tokenizer_config.json,
special_tokens_map.json, and special tokens of tokenizer.json that are spelled as BERT's. A folder that declares no cls
and sep but bos and eos gets these. Nothing else is guessed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError, atomic_folder, sha256_file
from data_pipeline.shards import SpecialTokens, id_dtype
from data_pipeline.tokenization.word_cache import WordMemo, why_not_word_wise, word_starts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# The most frequent letters get an entry, as in BERT; words with others become [UNK].
_ALPHABET = 1000
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
    """A tokenizer folder, ready to encode.

    `special_tokens`, `vocab_size` (highest id + 1), `dtype` of the ids, `sha256` of tokenizer.json; `memo` of words, or
    None and `why_no_memo`.
    Raises CorpusError where the folder is no tokenizer folder or a role is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        self.tokenizer = _load(path)
        self.sha256 = sha256_file(path)
        # Text that spells "[SEP]" is text: without this it would become the special id.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = id_dtype(self.vocab_size)
        self.special_tokens = _special_tokens(folder, self.tokenizer)
        self._reserved = np.zeros(self.vocab_size, np.bool_)
        self._reserved[list(self.special_tokens.all)] = True
        self._reserved[self.special_tokens.unk] = False
        self.why_no_memo = why_not_word_wise(self.tokenizer)
        self.memo = None if self.why_no_memo else WordMemo(self.tokenizer, self.dtype)

    def encode(self, texts: list[str]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Encode texts, without special tokens.

        Returns the ids of all texts in one array, self.dtype [T], and the number of ids of each, int64
        [len(texts)].
        """
        ids, counts, _ = self._encode(texts, words=False)
        return ids, counts

    def encode_planes(
        self, texts: list[str], sentences: list[list[int]] | None, words: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], dict[str, NDArray[np.bool_]]]:
        """As `encode`, and bool [T] each: `word_start` if `words`, `sentence_start` if `sentences` are given.

        sentences: for each text the characters at which one begins, ascending. A sentence without a token has no bit.
        """
        if sentences is None:
            ids, counts, starts = self._encode(texts, words)
            return ids, counts, {} if starts is None else {"word_start": starts}
        # A word-wise tokenizer may be given the sentences one by one where white space parts them.
        if self.memo and all(
            text[at - 1].isspace() for text, cuts in zip(texts, sentences, strict=True) for at in cuts if at
        ):
            pieces, owner, begins = [], [], []
            for i, (text, cuts) in enumerate(zip(texts, sentences, strict=True)):
                inner = [at for at in cuts if at]
                pieces += [text[a:b] for a, b in zip([0, *inner], [*inner, len(text)], strict=True)]
                owner += [i] * (len(inner) + 1)
                begins += [bool(cuts) and cuts[0] == 0, *[True] * len(inner)]
            ids, lengths, starts = self._encode(pieces, words)
            at = (np.cumsum(lengths) - lengths)[np.array(begins, np.bool_) & (lengths > 0)]
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
        if self.memo:
            ids, counts, starts = self.memo.encode(texts, words)
            return self._without_special(ids), counts, starts
        call = self.tokenizer.encode_batch if words else self.tokenizer.encode_batch_fast
        return self._collect(call(texts, add_special_tokens=False), words)

    def _collect(
        self, encodings: list[Any], words: bool
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.bool_] | None]:
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        # One pass over the ids, whatever the number of texts: an array a text is dearer for short ones.
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), self.dtype, int(counts.sum()))
        starts = None
        if words:
            flags = chain.from_iterable(word_starts(encoding.word_ids) for encoding in encodings)
            starts = np.fromiter(flags, np.bool_, len(ids))
        return self._without_special(ids), counts, starts

    def _without_special(self, ids: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        # Some tokenizers find "<s>" as a whole word in their vocabulary, encode_special_tokens or not.
        reserved = self._reserved[ids]
        if reserved.any():
            ids[reserved] = self.special_tokens.unk
        return ids


def _first_tokens(offsets: list[tuple[int, int]], cuts: list[int]) -> list[int]:
    """First token that begins at or behind each cut and before the next one; cuts without one have none."""
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{path}: a JSON object is needed")
    return value


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
    added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    spelled = {token.content for token in added.values()}
    declared: dict[str, str] = {role: token for role, token in BERT_ROLES.items() if token in spelled}
    for name in "special_tokens_map.json", "tokenizer_config.json":
        for key, value in _read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                declared[key.removesuffix("_token")] = content
    ids: dict[str, int] = {}
    for role in BERT_ROLES:
        token = declared.get(role) or declared.get(_FALLBACK.get(role, ""))
        if token is None:
            raise CorpusError(
                f"{folder}: declares no {role}_token, and training needs cls, sep, pad, mask and unk. "
                f'Add the token to the vocabulary and "{role}_token" to tokenizer_config.json'
            )
        found = tokenizer.token_to_id(token)
        if found is None:
            raise CorpusError(f"{folder}: its {role}_token {token!r} is not in the vocabulary of tokenizer.json")
        ids[role] = found
    for role in "pad", "mask":
        # The trainer tells padding and [MASK] by their ids alone.
        if shared := [other for other in ids if other != role and ids[other] == ids[role]]:
            raise CorpusError(
                f"{folder}: {role}_token and {shared[0]}_token are both {declared.get(role)!r} (id {ids[role]}). "
                f"Give {role}_token a token of its own in tokenizer_config.json"
            )
    return SpecialTokens(**ids, all=tuple(sorted({*added, *ids.values()})))


def _files(folder: Path) -> list[Path]:
    """The files of a tokenizer folder that make the tokenizer, by name."""
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder. --tokenizer takes the folder of a Hugging Face tokenizer")
    return sorted(path for path in folder.iterdir() if path.name in _FILES or path.suffix == ".model")


def fingerprint(folder: str | Path) -> str:
    """One SHA-256 for all files of a tokenizer folder, to know it again. Raises CorpusError where it is missing."""
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in _files(Path(folder)))
    return hashlib.sha256(lines.encode()).hexdigest()


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy a tokenizer folder's files, whole or not at all; make tokenizer.json where there is only vocab.txt.

    Does nothing where `target` exists. Raises CorpusError where `source` is not usable.
    """
    source = Path(source)
    if target.exists():
        return
    with atomic_folder(target) as folder:
        names = [shutil.copyfile(path, folder / path.name).name for path in _files(source)]
        if "tokenizer.json" not in names and "vocab.txt" in names:
            lower = _read_json(source / "tokenizer_config.json").get("do_lower_case")
            if not isinstance(lower, bool):
                raise CorpusError(
                    f"{source}: has vocab.txt but no tokenizer.json, and nothing says whether it is lower-cased. "
                    'Write {"do_lower_case": true} (or false) into its tokenizer_config.json'
                )
            _save_bert(_bert(_read_vocabulary(source / "vocab.txt"), lower), folder, lower)
        try:
            Encoder(folder)
        except CorpusError as error:  # it names the copy, which nobody knows
            raise CorpusError(str(error).replace(str(folder), str(source))) from error


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = {token: i for i, token in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"))}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error}). Convert the file, or save the tokenizer again") from None
    if missing := [token for token in BERT_ROLES.values() if token not in vocabulary]:
        raise CorpusError(f"{path}: has no {', '.join(missing)}: not the vocabulary of a BERT")
    return vocabulary


def _bert(vocabulary: dict[str, int] | None, lower_case: bool) -> Tokenizer:
    """BERT's normaliser, pre-tokeniser and WordPiece, without its post-processor (that needs the ids)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocabulary, unk_token="[UNK]") if vocabulary else models.WordPiece(unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if vocabulary:
        tokenizer.add_special_tokens(list(BERT_ROLES.values()))
    return tokenizer


def _save_bert(tokenizer: Tokenizer, folder: Path, lower_case: bool) -> None:
    """Write the files that transformers reads as a BertTokenizer."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n")
    roles = {f"{role}_token": token for role, token in BERT_ROLES.items()}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower_case,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        **roles,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__)))


def _letter_counts(counts: NDArray[np.int64], normalizer: Any) -> Counter[str]:
    """How often each letter stands in the normalised text, from the counts of the text's own code points."""
    letters: Counter[str] = Counter()
    for point in np.flatnonzero(counts).tolist():
        for letter in normalizer.normalize_str(chr(point)):
            letters[letter] += int(counts[point])
    return letters


def _train(texts: Callable[[], Iterator[list[str]]], vocab_size: int, lower_case: bool) -> dict[str, int]:
    """Train WordPiece in two passes over the text; returns the vocabulary, for the same text always the same.

    The trainer numbers continued letters ("##a") in the order of a hash map, which differs from run to run, and its
    ties follow these numbers. The first pass only finds out which there are; the second gets them in order.
    """
    from tokenizers.trainers import WordPieceTrainer

    special = list(BERT_ROLES.values())
    counts = np.zeros(0x110000, np.int64)

    def counted() -> Iterator[list[str]]:
        for batch in texts():
            points = np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32)
            counts[:] += np.bincount(points, minlength=len(counts))
            yield batch

    first = _bert(None, lower_case)
    first.train_from_iterator(counted(), WordPieceTrainer(vocab_size=1, show_progress=False))
    found = first.get_vocab()
    letters = _letter_counts(counts, first.normalizer)
    ranked = sorted((token for token in found if len(token) == 1), key=lambda c: (-letters[c], c))[:_ALPHABET]
    continued = sorted(f"##{letter}" for letter in ranked if f"##{letter}" in found)
    second = _bert(None, lower_case)
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *continued],
        initial_alphabet=ranked,
        limit_alphabet=len(ranked),
        show_progress=False,
    )
    second.train_from_iterator(texts(), trainer)
    return second.get_vocab()


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    cased: bool = False,
    documents: str = "blank-line",
    text_field: str = "text",
    progress: bool | None = None,
) -> None:
    """Train a BERT WordPiece tokenizer of exactly `vocab_size` entries and write its folder.

    [PAD] [UNK] [CLS] [SEP] [MASK] are 0 to 4. `output` must not exist or be empty; it appears only when whole. The text
    streams by, twice; what stays in memory is the count of each different word. The same text gives the same bytes.
    progress: None shows a bar on a terminal.
    Raises CorpusError where the text yields another number of entries, and as `read_documents` does.
    """
    from data_pipeline.execution.progress import ProgressBar
    from data_pipeline.sources.documents import batches, read_documents
    from data_pipeline.sources.inputs import Piece, find_sources

    if not len(BERT_ROLES) < vocab_size <= 2**32:
        raise CorpusError(
            f"vocabulary size {vocab_size:,}: must be above {len(BERT_ROLES)} (the special tokens) "
            f"and at most {2**32:,} (token ids are at most 32 bits wide)"
        )
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CorpusError(f"{output}: output folder is not empty. Choose another, or remove it first")
    sources = find_sources(inputs)

    def texts() -> Iterator[list[str]]:
        for i, source in enumerate(sources):
            # The whole file; for parquet all its row groups.
            stop = _row_groups(source, text_field) if source.format == ".parquet" else source.bytes
            found = read_documents(source, Piece(i, 0, stop), documents, text_field, bar.update)
            for batch, _ in batches(found, 1 << 20):
                yield batch

    with ProgressBar(2 * sum(source.bytes for source in sources), "train tokenizer", progress) as bar:
        vocabulary = _train(texts, vocab_size, lower_case=not cased)
    found = len(vocabulary)
    if found == len(BERT_ROLES):
        raise CorpusError(f"{', '.join(map(str, inputs))}: the corpus is empty: no text in {len(sources)} file(s)")
    if found != vocab_size:
        rule = "the text has no more word pieces" if found < vocab_size else "its letters alone need more"
        raise CorpusError(
            f"vocabulary size {vocab_size:,} cannot be had from this text, it gives {found:,}: {rule}. "
            f"Give --vocab-size {found} or other text"
        )
    with atomic_folder(output) as folder:
        _save_bert(_bert(vocabulary, lower_case=not cased), folder, lower_case=not cased)


def _row_groups(source: Any, text_field: str) -> int:
    from data_pipeline.sources.inputs import cut_units

    (unit,) = cut_units([source], "file", text_field, 1 << 62)
    return unit[-1].stop
