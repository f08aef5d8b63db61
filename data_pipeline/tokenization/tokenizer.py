"""Tokenizers: training WordPiece, loading Hugging Face tokenizer folders, encoding text to arrays of ids.

A folder must contain tokenizer.json (an old BERT folder with only vocab.txt is accepted if its tokenizer_config.json
sets `do_lower_case`) and declare the roles cls, sep, pad, mask and unk. These are looked up in tokenizer_config.json,
then special_tokens_map.json, then among the special tokens of tokenizer.json under BERT's names. bos and eos are used
in place of missing cls and sep. Nothing else is guessed.
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
from data_pipeline.tokenization.word_cache import WordCache, why_not_word_wise, word_starts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# The most frequent characters get a vocabulary entry, as in BERT; words with other characters become [UNK].
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{path}: must be a JSON object")
    return value


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
    added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    contents = {token.content for token in added.values()}
    declared: dict[str, str] = {role: token for role, token in BERT_ROLES.items() if token in contents}
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
    return sorted(path for path in folder.iterdir() if path.name in _FILES or path.suffix == ".model")


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
            lower = _read_json(source / "tokenizer_config.json").get("do_lower_case")
            if not isinstance(lower, bool):
                raise CorpusError(
                    f"{source}: has vocab.txt but no tokenizer.json, and does not say whether it is lower-cased. "
                    'Write {"do_lower_case": true} (or false) to its tokenizer_config.json'
                )
            _save_bert(_bert(_read_vocabulary(source / "vocab.txt"), lower), folder, lower)
        try:
            Encoder(folder)
        except CorpusError as error:  # report the user's folder, not the temporary copy
            raise CorpusError(str(error).replace(str(folder), str(source))) from error


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = {token: i for i, token in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"))}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error}). Convert the file, or save the tokenizer again") from None
    if missing := [token for token in BERT_ROLES.values() if token not in vocabulary]:
        raise CorpusError(f"{path}: has no {', '.join(missing)}: not a BERT vocabulary")
    return vocabulary


def _bert(vocabulary: dict[str, int] | None, lower_case: bool) -> Tokenizer:
    """BERT's normalizer, pre-tokenizer and WordPiece model, without the post-processor (it needs the ids)."""
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
    """Save in the format that transformers loads as a BertTokenizer."""
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
    """Occurrences of each character in the normalised text, from the code point counts of the raw text."""
    letters: Counter[str] = Counter()
    for point in np.flatnonzero(counts).tolist():
        for letter in normalizer.normalize_str(chr(point)):
            letters[letter] += int(counts[point])
    return letters


def _train(texts: Callable[[], Iterator[list[str]]], vocab_size: int, lower_case: bool) -> dict[str, int]:
    """Train WordPiece in two passes over the text; returns the vocabulary, a deterministic function of the text.

    The trainer numbers continuation characters ("##a") in hash-map order, which differs between runs, and breaks ties
    by these numbers. The first pass collects the characters; the second is given them in a fixed order.
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
    """Train a BERT WordPiece tokenizer with exactly `vocab_size` entries and save it to the folder `output`.

    [PAD] [UNK] [CLS] [SEP] [MASK] get the ids 0 to 4. `output` must be new or empty; it is written atomically. The text
    is streamed twice; memory holds the count of each distinct word. The same text gives the same bytes.
    progress: None shows a bar on a terminal.
    Raises CorpusError if the text yields another number of entries, and like `read_documents`.
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
            # The entire file; for parquet, all row groups.
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
        rule = "the text has no more word pieces" if found < vocab_size else "the characters alone need more"
        raise CorpusError(
            f"vocabulary size {vocab_size:,} is not possible with this text, which gives {found:,}: {rule}. "
            f"Use --vocab-size {found} or other text"
        )
    with atomic_folder(output) as folder:
        _save_bert(_bert(vocabulary, lower_case=not cased), folder, lower_case=not cased)


def _row_groups(source: Any, text_field: str) -> int:
    from data_pipeline.sources.inputs import cut_units

    (unit,) = cut_units([source], "file", text_field, 1 << 62)
    return unit[-1].stop
