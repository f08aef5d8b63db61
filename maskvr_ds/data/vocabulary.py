"""Properties of a vocabulary: token ids, word starts, token frequencies. V vocabulary; NumPy arrays on the host."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.shards import Corpus

# Blocks of kana and Han with their punctuation: scripts without spaces, whose characters BERT takes for words.
_UNSPACED = ((0x3000, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
# Pre-tokenizers that drop white space, so that later steps do not see it.
_DROP_SPACES = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer"}
# Rows of a shard counted at a time.
_BLOCK = 1 << 14


def read_tokenizer(folder: Path) -> Tokenizer:
    """From the folder's tokenizer.json. Raises ValueError if it cannot be read."""
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{path}: not a tokenizer: {error}") from None


def token_ids(folder: Path) -> dict[str, int] | None:
    """Token → id, added tokens included, from the folder's tokenizer.json or else its vocab.txt (one token per line);
    None if it has neither.

    Raises ValueError if tokenizer.json cannot be read.
    """
    lines = folder / "vocab.txt"
    if (folder / "tokenizer.json").is_file():
        return dict(read_tokenizer(folder).get_vocab(with_added_tokens=True))
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
    model = (content.get("model") or {}).get("vocab") or {}
    # `special` includes ids without a token.
    known = set(range(len(model))) if isinstance(model, list) else set(model.values())
    if missing := sorted((set(special) & known) - registered):
        remarks.append(
            f"{path}: special tokens with the ids {', '.join(map(str, missing))} are not registered as special: "
            "their names in a text are split like words; in an export, transformers recognises them"
        )
    return remarks


def word_starts(tokenizer: Path, vocab_size: int) -> NDArray[np.bool_]:
    """bool [V]: whether a token starts a word, from the folder's tokenizer.json.

    WordPiece (and BPE with a continuation prefix): tokens without the prefix. Byte-level BPE: tokens that start with
    white space. Metaspace (Unigram, SentencePiece BPE): tokens that start with its replacement character or white
    space. In both, a token that starts with a character of _UNSPACED starts a word too: text in Chinese or Japanese
    would otherwise be a single word. WordLevel: all tokens, and everywhere all added tokens. Masking strategies also
    treat every token after a special token as a word start, whether or not it is marked ("Hello" of a byte-level
    tokenizer without add_prefix_space). White space other than U+3000 that a byte-level tokenizer splits into several
    tokens is not recognised.

    Raises ValueError if the tokenizer marks words in any other way, or not at all.
    """
    path = tokenizer / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [piece, score], in the order of ids
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    sequence = list(pre_tokenizer_steps(content.get("pre_tokenizer")))
    steps = {step["type"]: step for step in sequence}
    prefix = model.get("continuing_subword_prefix")
    starts = np.ones(vocab_size, np.bool_)
    if model.get("type") == "WordLevel":
        return starts
    starts_word: Callable[[str], bool]
    if prefix:
        starts_word = lambda token: not token.startswith(prefix)  # noqa: E731
    elif "ByteLevel" in steps:
        starts_word = partial(_starts_with_space, byte_alphabet())
    elif "Metaspace" in steps:
        marker = steps["Metaspace"].get("replacement", "▁")
        starts_word = lambda token: token[:1] == marker or _separates(token[:1])  # noqa: E731
    else:
        raise ValueError(
            f"{path}: cannot determine word starts for a {model.get('type')} model with neither a continuation prefix "
            "nor byte-level or Metaspace pre-tokenisation; choose a masking.strategy that needs no words"
        )
    if not prefix and sequence[0]["type"] in _DROP_SPACES and not _adds_prefix(steps):
        raise ValueError(
            f"{path}: its pre-tokenizer drops spaces and marks no words (add_prefix_space false after "
            f"{sequence[0]['type']}); choose a masking.strategy that needs no words"
        )
    added = {token["content"] for token in content.get("added_tokens") or ()}
    for token, index in vocabulary.items():
        starts[index] = token in added or starts_word(token)
    return starts


def word_ends(tokenizer: Path, vocab_size: int) -> NDArray[np.bool_] | None:
    """bool [V]: whether a token of a byte-level tokenizer is text that ends with white space, such as ".\\n" with the
    pattern of Llama 3: the token after it starts a word without a mark. None if there is no such token."""
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    if not any(step["type"] == "ByteLevel" for step in pre_tokenizer_steps(content.get("pre_tokenizer"))):
        return None
    alphabet, ends = byte_alphabet(), np.zeros(vocab_size, np.bool_)
    for token, index in content["model"]["vocab"].items():
        text = bytes(alphabet[character] for character in token if character in alphabet).decode(errors="replace")
        ends[index] = bool(text.strip()) and text != text.rstrip()
    return ends if ends.any() else None


def _adds_prefix(steps: dict[str, Any]) -> bool:
    """Whether the Metaspace or byte-level step puts a space before every word that an earlier step has split off."""
    step = steps.get("ByteLevel") or steps["Metaspace"]
    always = {True: "always", False: "never"}[bool(step.get("add_prefix_space", step["type"] == "Metaspace"))]
    return step.get("prepend_scheme", always) == "always"


def _separates(character: str) -> bool:
    """Whether a character is white space (of Unicode) or of a script without spaces."""
    if not character:
        return False
    point = ord(character)
    space = character.isspace() and not 0x1C <= point <= 0x1F
    return space or any(first <= point <= last for first, last in _UNSPACED)


def byte_alphabet() -> dict[str, int]:
    """Character -> byte in the vocabularies of byte-level tokenizers (GPT-2): printable characters of Latin-1 stand for
    themselves, the characters from U+0100 for the other bytes in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _starts_with_space(alphabet: dict[str, int], token: str) -> bool:
    """`_separates` for the first character of a byte-level token, which may be incomplete."""
    data = bytes(alphabet[character] for character in token if character in alphabet)
    if not data or 0x80 <= data[0] < 0xC0:  # continues a character
        return False
    if 0xE3 <= data[0] <= 0xE9:  # the first byte of U+3000 to U+9FFF
        return True
    return _separates(data.decode("utf-8", errors="replace")[0])


def pre_tokenizer_steps(step: Any) -> Iterable[dict[str, Any]]:
    """A pre-tokenizer's steps, with sequences flattened."""
    if not step:
        return
    if step.get("type") == "Sequence":
        for part in step.get("pretokenizers", ()):
            yield from pre_tokenizer_steps(part)
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


def unigram_entropy(corpus: Corpus) -> float:
    """Entropy in nats of the corpus' distribution of ordinary tokens: the lowest loss of a model without context."""
    counts = token_counts(corpus, range(len(corpus.manifest.shards)), of_passages=False)[0].astype(np.float64)
    counts[list(corpus.manifest.special_tokens.all)] = 0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
