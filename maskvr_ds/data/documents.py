"""Documents in the rows of a corpus, by the separators that the rows store. Loads no torch.

L: positions of a row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.config.objectives import PAIR_OBJECTIVES
from maskvr_ds.data.mixture import members

# Rows that stand for a corpus.
_SAMPLE = 1024


def check_borders(corpus: Corpus) -> None:
    """Raise ConfigError if the borders of the documents cannot be read from the rows of the corpus, or of a corpus of
    the mixture.

    Reads the separators of a sample of rows.
    """
    for one in members(corpus):
        manifest, where = one.manifest, f"{one.folder}: data.attention is documents, and"
        if manifest.packing in PAIR_OBJECTIVES:
            raise ConfigError(
                f"{where} the corpus has sentence pairs (packing {manifest.packing}), whose segments attend to each "
                "other; pack it with --packing full_sequences, or set data.attention to rows"
            )
        special = manifest.special_tokens
        for role in ("cls", "pad"):
            if getattr(special, role) == special.sep:
                raise ConfigError(
                    f"{where} token {special.sep} is both sep and {role} of its tokenizer, so that the ends of "
                    "documents cannot be found; build the corpus with a tokenizer that has a token for each, or set "
                    "data.attention to rows"
                )
        if not (_rows(one)[:, 1:] == special.sep).any():
            raise ConfigError(
                f"{where} none of {min(one.rows, _SAMPLE):,} rows has a separator (token {special.sep}), which ends a "
                "document: where documents start is not known; build the corpus again by `python -m data_pipeline "
                "build`, or set data.attention to rows"
            )


def remarks(corpus: Corpus) -> list[str]:
    """What should be known of attention within documents on the corpus, one sentence each."""
    return [
        f"{one.folder}: its rows hold one document each (packing documents), so that data.attention documents changes "
        "nothing; pack it with --packing full_sequences for rows of several documents without padding"
        for one in members(corpus)
        if one.manifest.packing == "documents"
    ]


def document_lengths(corpus: Corpus) -> tuple[NDArray[np.int64], int]:
    """Lengths of the documents of a sample of rows, int64 [·], in tokens with their separator, padding behind the last
    one as a document of its own; and the number of rows. The same on all ranks."""
    separator = corpus.manifest.special_tokens.sep
    ids = _rows(corpus)
    first = np.ones(ids.shape, np.bool_)
    # As models/documents.starts: a second separator counts as a document in the last position only.
    first[:, 1:] = (ids[:, :-1] == separator) & ((ids[:, 1:] != separator) | _is_last(ids.shape[1]))
    return np.diff(np.append(np.flatnonzero(first), first.size)), len(ids)


def _is_last(length: int) -> NDArray[np.bool_]:
    return np.arange(1, length) == length - 1


def _rows(corpus: Corpus) -> NDArray[Any]:
    """A sample of rows, evenly spaced: [·, L]."""
    number = min(corpus.rows, _SAMPLE)
    ids = np.empty((number, corpus.sequence_length), corpus.dtype)
    corpus.take(np.arange(number) * corpus.rows // number, out=ids)
    return ids
