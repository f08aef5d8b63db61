"""Rows of a corpus in readable form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.files import CorpusError
from data_pipeline.shards import Corpus
from data_pipeline.tokenization.tokenizer import Encoder


def decoded_rows(folder: str | Path, first: int, count: int) -> str:
    """Rows [first, first + count) as tokens, each below a line of facts. `¶` marks sentence starts and `·` word starts,
    if the corpus stores them.

    Raises CorpusError if the range is empty or starts outside the corpus.
    """
    if count < 1 or first < 0:
        fault = f"--rows {count:,}: must be at least 1" if count < 1 else f"--first {first:,}: must be at least 0"
        raise CorpusError(fault)
    corpus = Corpus(folder)
    if first >= corpus.rows:
        raise CorpusError(f"rows {first:,} to {first + count - 1:,}: {folder} has the rows 0 to {corpus.rows - 1:,}")
    rows = np.arange(first, min(first + count, corpus.rows))
    ids = np.empty((len(rows), corpus.sequence_length), corpus.dtype)
    corpus.take(rows, out=ids)
    columns = {name: corpus.take_column(name, rows) for name in ("document_end", *corpus.manifest.columns)}
    names = {i: token for token, i in Encoder(corpus.tokenizer_folder).tokenizer.get_vocab(True).items()}
    lines = []
    for i, row in enumerate(rows.tolist()):
        used = int((ids[i] != corpus.manifest.special_tokens.pad).sum())
        facts = [f"row {row:,}", f"{used:,} of {corpus.sequence_length:,} tokens"]
        facts += [f"{name} {columns[name][i]}" for name in ("segment_start", "pair_label") if name in columns]
        facts += ["ends a document"] if columns["document_end"][i] else []
        tokens = []
        for j, token in enumerate(ids[i, :used].tolist()):
            marks = (("sentence_start", "¶"), ("word_start", "·"))
            marked = "".join(mark for name, mark in marks if name in columns and columns[name][i, j])
            tokens.append(marked + names.get(token, f"<{token}>"))
        lines += [", ".join(facts), "  " + " ".join(tokens)]
    return "\n".join(lines)
