"""What is known of a vocabulary: its tokens' ids, which begin words, how often each occurs. V entries; on the host."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.shards import Corpus

# How byte-level tokenizers spell space, line feed, tab and carriage return.
_BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")
# Rows of a shard counted at once.
_BLOCK = 1 << 14


def token_ids(folder: Path) -> dict[str, int] | None:
    """Token → id, those of added tokens too, as the folder's tokenizer.json has them, or else its vocab.txt (a token a
    line, by number); None where it has neither. Raises ValueError where tokenizer.json cannot be read."""
    path, lines = folder / "tokenizer.json", folder / "vocab.txt"
    if path.is_file():
        try:
            return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
        except Exception as error:  # tokenizers raises no other
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
    if lines.is_file():
        # Tokens may be such characters as str.splitlines would end a line at.
        with lines.open(encoding="utf-8", newline="\n") as file:
            return {line.rstrip("\r\n"): index for index, line in enumerate(file)}
    return None


def word_starts(tokenizer: Path, vocab_size: int) -> NDArray[np.bool_]:
    """bool [V]: whether a token begins a word, read from the folder's tokenizer.json.

    WordPiece (and BPE with a continuation prefix): tokens without the prefix. Byte-level BPE: tokens that begin with a
    space. Metaspace (Unigram, SentencePiece BPE): tokens that begin with its sign. WordLevel: all. A token behind a
    special one begins a word whatever its spelling; masking sees to that.
    Raises ValueError where the file tells words apart in another way.
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
    signs: tuple[str, ...]
    if prefix:
        signs, begins_with_sign = (prefix,), False
    elif "ByteLevel" in steps:
        signs, begins_with_sign = _BYTE_LEVEL_SPACES, True
    elif "Metaspace" in steps:
        signs, begins_with_sign = (steps["Metaspace"].get("replacement", "▁"),), True
    else:
        raise ValueError(
            f"{path}: a {model.get('type')} model with neither a continuation prefix nor byte-level or Metaspace "
            "pre-tokenisation: where words begin is not known; choose a masking.strategy that needs no words"
        )
    for token, index in vocabulary.items():
        starts[index] = token.startswith(signs) == begins_with_sign
    return starts


def _steps(step: Any) -> Iterable[dict[str, Any]]:
    """A pre-tokenizer's steps, sequences opened."""
    if not step:
        return
    if step.get("type") == "Sequence":
        for part in step.get("pretokenizers", ()):
            yield from _steps(part)
    else:
        yield step


def token_counts(corpus: Corpus, shards: Iterable[int], *, of_passages: bool) -> NDArray[np.int64]:
    """int64 [2, V]: how often each token stands in the given shards, and in how many passages. Reads them in blocks.

    A passage is what stands between special tokens in a row: a document, or the piece of it that the row holds.
    of_passages: whether to count the latter, which takes a sort; else 0.
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
                # Rows begin with a special token: the running number of these tells passages apart, rows too.
                edges = special[block]
                edges[:, 0] = True
                once = np.unique(np.cumsum(edges.ravel()) * vocab_size + block.ravel())
                counts[1] += np.bincount(once % vocab_size, minlength=vocab_size)
    return counts


def frequency_scores(counts: NDArray[np.int64], power: float, document_power: float = 0.0) -> NDArray[np.float64]:
    """(count + 1)^(−power) · (passages + 1)^(−document_power): int64 [2, V] → float64 [V].

    The second is the passage's inverse document frequency to a power. power = −document_power: the mean count in
    the passages that hold the token, which tells content words from function words (Church & Gale 1995).
    """
    tokens, passages = counts + 1.0
    return np.power(tokens, -power) * np.power(passages, -document_power)
