"""Initial weights for another vocabulary (`model.vocabulary`): which rows of the model's tables each token starts from.

extend: the corpus' tokenizer has all tokens of the model's under the same ids, and more. match: any other tokenizer;
tokens in common keep their rows, under whatever id, special tokens by their role. A token that the model lacks starts
from the mean of the rows of its pieces under the model's own tokenizer, as do its entries of the decoder and of the
decoder's bias; from random ones if it has no pieces. Loads no torch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.config.model import Vocabulary
from maskvr_ds.data.pieces import Pieces, Surface

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class RowSources:
    """Row i of a new table is the mean of the rows old[bounds[i]:bounds[i + 1]] of the model's; random if there are
    none.

    bounds: int64 [V + 1]. old: int64 [·]. kept, averaged, fresh: numbers of tokens that have the row of the same token,
    the mean of their pieces, random values.
    """

    vocabulary: Vocabulary
    bounds: NDArray[np.int64]
    old: NDArray[np.int64]
    kept: int
    averaged: int
    fresh: int

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1

    def __str__(self) -> str:
        words = (
            f"model.vocabulary {self.vocabulary}: {self.kept:,} tokens keep their embeddings, {self.averaged:,} start"
        )
        return f"{words} from the mean of their pieces, {self.fresh:,} from random values"


def row_sources(folder: Path, rows: int, corpus: Corpus, vocabulary: Vocabulary) -> RowSources:
    """The sources of the rows for the corpus' vocabulary.

    folder: of the model, with its tokenizer. rows: of its embedding table. Raises ConfigError if one of the tokenizers
    cannot be read, if nothing is to be changed, or if the corpus' one does not extend that of the model.
    """
    try:
        model, ours = Pieces(folder), Pieces(corpus.tokenizer_folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    # Tokens beyond the table were added to the tokenizer only.
    known = {token: index for token, index in model.ids.items() if index < rows}
    if known == ours.ids:
        raise ConfigError(
            f"{corpus.folder}: model.vocabulary is {vocabulary}, and its tokenizer has the vocabulary of {folder}; "
            "remove the setting, or build the corpus with the other tokenizer"
        )
    if vocabulary == "extend":
        _check_extends(folder, known, corpus, ours.ids)
        size = max(rows, corpus.manifest.vocab_size)
        same = {index: index for index in range(rows)}
        new = {index: token for token, index in ours.ids.items() if token not in known}
    else:
        size = corpus.manifest.vocab_size
        same = _in_common(model, known, ours, corpus)
        new = {index: token for token, index in ours.ids.items() if index not in same}
    pieces: dict[int, list[int]] = {}
    for index, token in new.items():
        surface = ours.surface(token)
        pieces[index] = [piece for piece in model.pieces(surface) if piece < rows] if surface else []
    kept = {index: [row] for index, row in same.items() if index not in new}
    sources = [pieces.get(index) or kept.get(index, []) for index in range(size)]
    averaged = sum(map(bool, pieces.values()))
    return RowSources(
        vocabulary,
        np.cumsum([0, *map(len, sources)], dtype=np.int64),
        np.array([row for found in sources for row in found], np.int64),
        kept=len(ours.ids) - len(new),
        averaged=averaged,
        fresh=len(new) - averaged,
    )


def _check_extends(folder: Path, known: dict[str, int], corpus: Corpus, ours: dict[str, int]) -> None:
    wrong = [token for token, index in known.items() if ours.get(token) != index]
    if wrong:
        shown = ", ".join(f"{token!r} is {ours.get(token, 'missing')}, not {known[token]}" for token in wrong[:_SHOWN])
        raise ConfigError(
            f"{corpus.folder}: model.vocabulary is extend, and {len(wrong):,} of the {len(known):,} tokens of {folder} "
            f"do not have their ids ({shown}); make the tokenizer with `python -m data_pipeline tokenizer --extend "
            f"{folder}`, or set model.vocabulary to match"
        )


def _in_common(model: Pieces, known: dict[str, int], ours: Pieces, corpus: Corpus) -> dict[int, int]:
    """Id -> row of the tokens that the model has."""
    rows: dict[Surface | str, int] = {model.surface(token) or token: index for token, index in known.items()}
    found = {}
    for token, index in ours.ids.items():
        if (row := rows.get(ours.surface(token) or token)) is not None:
            found[index] = row
    special = corpus.manifest.special_tokens
    for role, token in model.roles.items():
        index = getattr(special, role)
        if index is not None and token in known:
            found[index] = known[token]
    return found
