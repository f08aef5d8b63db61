"""Properties of a vocabulary: token ids, word starts, token frequencies. V vocabulary; NumPy arrays on the host."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.shards import Corpus

# Space, line feed, tab and carriage return in the alphabet of byte-level tokenizers.
_BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")
# Rows of a shard counted at a time.
_BLOCK = 1 << 14


def token_ids(folder: Path) -> dict[str, int] | None:
    """Token → id, added tokens included, from the folder's tokenizer.json or else its vocab.txt (one token per line);
    None if it has neither.

    Raises ValueError if tokenizer.json cannot be read.
    """
    path, lines = folder / "tokenizer.json", folder / "vocab.txt"
    if path.is_file():
        try:
            return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
    if lines.is_file():
        # Tokens may be characters that str.splitlines treats as line ends.
        with lines.open(encoding="utf-8", newline="\n") as file:
            return {line.rstrip("\r\n"): index for index, line in enumerate(file)}
    return None


def tokenizer_remarks(folder: Path, special: Iterable[int]) -> list[str]:
    """What a folder's tokenizer.json does to every text besides tokenising it, one sentence each: nothing is wrong with
    the corpus, which is built without, but programs that use the file should know. special: ids of special tokens.
    """
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # reported where the file is needed
        return []
    remarks = []
    if used := [name for name in ("padding", "truncation") if content.get(name)]:
        remarks.append(
            f"{path}: has {' and '.join(used)}, used by neither corpus nor training; an export keeps the file"
        )
    registered = {token.get("id") for token in content.get("added_tokens") or []}
    if missing := sorted(set(special) - registered):
        remarks.append(
            f"{path}: special tokens with the ids {', '.join(map(str, missing))} are not registered as special: "
            "their names in a text are split like words; in an export, transformers recognises them"
        )
    return remarks


def word_starts(tokenizer: Path, vocab_size: int) -> NDArray[np.bool_]:
    """bool [V]: whether a token starts a word, from the folder's tokenizer.json.

    WordPiece (and BPE with a continuation prefix): tokens without the prefix. Byte-level BPE: tokens that start with a
    space. Metaspace (Unigram, SentencePiece BPE): tokens that start with its replacement character. WordLevel: all
    tokens. Masking strategies also treat every token after a special token as a word start.

    Raises ValueError if the tokenizer marks words in any other way.
    """
    path = tokenizer / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [piece, score], in the order of ids
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    steps = {step["type"]: step for step in _steps(content.get("pre_tokenizer"))}
    prefix = model.get("continuing_subword_prefix")
    starts = np.ones(vocab_size, np.bool_)
    if model.get("type") == "WordLevel":
        return starts
    markers: tuple[str, ...]
    if prefix:
        markers, marks_start = (prefix,), False
    elif "ByteLevel" in steps:
        markers, marks_start = _BYTE_LEVEL_SPACES, True
    elif "Metaspace" in steps:
        markers, marks_start = (steps["Metaspace"].get("replacement", "▁"),), True
    else:
        raise ValueError(
            f"{path}: cannot determine word starts for a {model.get('type')} model with neither a continuation prefix "
            "nor byte-level or Metaspace pre-tokenisation; choose a masking.strategy that needs no words"
        )
    for token, index in vocabulary.items():
        starts[index] = token.startswith(markers) == marks_start
    return starts


def _steps(step: Any) -> Iterable[dict[str, Any]]:
    """A pre-tokenizer's steps, with sequences flattened."""
    if not step:
        return
    if step.get("type") == "Sequence":
        for part in step.get("pretokenizers", ()):
            yield from _steps(part)
    else:
        yield step


def token_counts(corpus: Corpus, shards: Iterable[int], *, of_passages: bool) -> NDArray[np.int64]:
    """int64 [2, V]: occurrences of each token in the given shards, and the number of passages that contain it.

    A passage is the text between special tokens in a row: a document, or the part of it in the row.
    of_passages: whether to count passages, which needs a sort; otherwise 0.
    """
    vocab_size, special = corpus.manifest.vocab_size, np.zeros(corpus.manifest.vocab_size, np.bool_)
    special[list(corpus.manifest.special_tokens.all)] = True
    counts = np.zeros((2, vocab_size), np.int64)
    for shard in shards:
        ids = corpus.input_ids(shard)
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            counts[0] += np.bincount(block.ravel(), minlength=vocab_size)
            if of_passages:
                # Rows start with a special token: the running count of special tokens numbers the passages of all rows.
                edges = special[block]
                edges[:, 0] = True
                once = np.unique(np.cumsum(edges.ravel()) * vocab_size + block.ravel())
                counts[1] += np.bincount(once % vocab_size, minlength=vocab_size)
    return counts


def frequency_scores(counts: NDArray[np.int64], power: float, document_power: float = 0.0) -> NDArray[np.float64]:
    """(count + 1)^(−power) · (passages + 1)^(−document_power): int64 [2, V] → float64 [V].

    The second factor is a power of the inverse document frequency. power = −document_power gives the mean count in the
    passages that contain the token, which separates content words from function words (Church & Gale 1995).
    """
    tokens, passages = counts + 1.0
    return np.power(tokens, -power) * np.power(passages, -document_power)
