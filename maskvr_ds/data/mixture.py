"""Mixture: several corpora read as one, each in proportion to its weight.

Rows are numbered consecutively, those of the first corpus, then those of the second, and so on. The number is a row's
sample id, so masks and digests are distinct for rows of different corpora.

In an epoch, a corpus of N rows and weight w has M = round(w · N) slots, at least 1. Slot p of epoch e is use
u = e · M + p of the corpus, a row of its pass u div N: a pass contains every row once, so that over the run weights
hold exactly and no (row, pass) occurs twice. If M is a multiple of N, an epoch consists of complete passes and the
permutation of slots suffices; otherwise each pass has its own permutation (loader.py), since rows are stored in
document order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import Corpus, OpenFiles, open_here
from maskvr_ds import hashing
from maskvr_ds.config import ConfigError, DataConfig

# Manifest fields that the corpora of a mixture must share.
_COMMON = ("tokenizer_sha256", "vocab_size", "special_tokens", "sequence_length")


@dataclass(frozen=True)
class Share:
    """rows: N, rows of a corpus; slots: M, its slots in an epoch."""

    rows: int
    slots: int


class Mixture(Corpus):
    """The shards of several corpora, in order. A single corpus with weight 1 is read exactly as without a mixture.

    Raises ConfigError if corpora are incompatible or one is listed twice.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
        first = corpora[0]
        folders = [corpus.folder.resolve() for corpus in corpora]
        for i, corpus in enumerate(corpora):
            if folders[i] in folders[:i]:
                raise ConfigError(f"{corpus.folder} is listed twice in the mixture; list it once, with a weight")
            for key in _COMMON:
                if (theirs := getattr(corpus.manifest, key)) != (ours := getattr(first.manifest, key)):
                    raise ConfigError(
                        f"{corpus.folder}: {key} {theirs} differs from {ours} of {first.folder}; "
                        "build the corpora of a mixture with one tokenizer and one sequence length"
                    )
        self.corpora, self._weights = tuple(corpora), tuple(weights)
        self.shares = tuple(Share(c.rows, max(1, round(w * c.rows))) for c, w in zip(corpora, weights, strict=True))
        manifests = [corpus.manifest for corpus in corpora]
        self.folder, self.tokenizer_folder = first.folder, first.tokenizer_folder
        self.remarks = tuple(remark for corpus in corpora for remark in corpus.remarks)
        self.manifest = first.manifest.model_copy(
            update={
                "shards": tuple(shard for m in manifests for shard in m.shards),
                "columns": tuple(name for name in first.manifest.columns if all(name in m.columns for m in manifests)),
            }
            | {key: sum(getattr(m, key) for m in manifests) for key in ("rows", "tokens", "documents")}
        )
        self.rows, self.sequence_length, self.dtype = self.manifest.rows, first.sequence_length, first.dtype
        self._paths = [corpus._path(i) for corpus in corpora for i in range(len(corpus.manifest.shards))]
        self._memory = [memory for corpus in corpora for memory in corpus._memory]
        self._batches = [batch for corpus in corpora for batch in corpus._batches]
        self._views = [view for corpus in corpora for view in corpus._views]
        self._bounds = np.cumsum([0, *(len(view) for view in self._views)], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.corpora, self._weights)

    def _path(self, i: int) -> Path:
        return self._paths[i]


def open_mixture(corpora: Sequence[tuple[Path, float]], open_files: OpenFiles = open_here) -> Corpus:
    """Open (folder, weight) pairs; a single corpus with weight 1 is returned as a plain Corpus.

    Raises ConfigError and CorpusError.
    """
    opened = [Corpus(path, open_files) for path, _ in corpora]
    weights = [weight for _, weight in corpora]
    return opened[0] if weights == [1.0] else Mixture(opened, weights)


def open_training_corpus(data: DataConfig, open_files: OpenFiles = open_here) -> Corpus:
    """The corpora of a configuration as one. Raises ConfigError and CorpusError."""
    return open_mixture([(entry.path, entry.weight) for entry in data.corpora], open_files)


def members(corpus: Corpus) -> tuple[Corpus, ...]:
    """The corpora of a mixture; of another corpus, itself."""
    return corpus.corpora if isinstance(corpus, Mixture) else (corpus,)


def shares(corpus: Corpus) -> tuple[Share, ...]:
    """The composition of an epoch."""
    return corpus.shares if isinstance(corpus, Mixture) else (Share(corpus.rows, corpus.rows),)


def real_share(corpus: Corpus) -> float:
    """Share of the tokens of an epoch that are not padding."""
    slots = [share.slots for share in shares(corpus)]
    manifests = [member.manifest for member in members(corpus)]
    real = sum(n * m.tokens / m.rows for n, m in zip(slots, manifests, strict=True))
    return real / (sum(slots) * corpus.sequence_length)


def corpora_identity(corpus: Corpus) -> dict[str, Any]:
    """Properties of the data that must not change during a run, as JSON types: all shards, and a mixture's shares."""
    identity: dict[str, Any] = {"shards": hashing.fold(0, *(int(shard.sha256, 16) for shard in corpus.manifest.shards))}
    if isinstance(corpus, Mixture):
        identity["mixture"] = [[share.rows, share.slots] for share in corpus.shares]
        # A run without a mixture compares only `shards`, which must therefore depend on the shares.
        identity["shards"] = hashing.fold(identity["shards"], *(n for pair in identity["mixture"] for n in pair))
    return identity
