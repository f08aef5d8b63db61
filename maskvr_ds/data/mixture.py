"""Several corpora read as one, each as often as its weight says.

Rows are numbered through: those of the first corpus, then those of the second, and so on. The number is a row's sample
id, and so its mask and its share in digests are its own whatever corpus it is of.

In an epoch a corpus of N rows and weight w has M = round(w · N) places, at least 1. Place p of epoch e is use
u = e · M + p of the corpus, which is a row of its pass u div N: every pass has every row once, so that over the run
weights hold exactly and (row, pass) never comes twice. Where M is a multiple of N an epoch is whole passes, and a pass
needs no order of its own; elsewhere it has one (`loader`), for rows lie in the order of the documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import Corpus, OpenFiles, open_here
from maskvr_ds import hashing
from maskvr_ds.config.base import ConfigError

# What rows of one batch must have in common.
_COMMON = ("tokenizer_sha256", "special_tokens", "sequence_length")


@dataclass(frozen=True)
class Share:
    """rows: N, of a corpus; places: M, what it has of an epoch."""

    rows: int
    places: int


class Mixture(Corpus):
    """The shards of several corpora, in their order. One with weight 1 is read as by itself.

    Raises ConfigError where two do not fit together, or one is there twice.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
        first = corpora[0]
        folders = [corpus.folder.resolve() for corpus in corpora]
        for i, corpus in enumerate(corpora):
            if folders[i] in folders[:i]:
                raise ConfigError(f"{corpus.folder}: is in the mixture twice; name it once, with a weight")
            for key in _COMMON:
                if (theirs := getattr(corpus.manifest, key)) != (ours := getattr(first.manifest, key)):
                    raise ConfigError(
                        f"{corpus.folder}: {key} {theirs} differs from {ours} of {first.folder}; "
                        "build the corpora of a mixture with one tokenizer and one sequence length"
                    )
        self.corpora = tuple(corpora)
        self.shares = tuple(Share(c.rows, max(1, round(w * c.rows))) for c, w in zip(corpora, weights, strict=True))
        manifests = [corpus.manifest for corpus in corpora]
        self.folder, self.tokenizer_folder = first.folder, first.tokenizer_folder
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

    def _path(self, i: int) -> Path:
        return self._paths[i]


def open_mixture(corpora: Sequence[tuple[Path, float]], open_files: OpenFiles = open_here) -> Corpus:
    """Open corpora with their weights; one with weight 1 is itself. Raises ConfigError and CorpusError."""
    opened = [Corpus(path, open_files) for path, _ in corpora]
    weights = [weight for _, weight in corpora]
    return opened[0] if weights == [1.0] else Mixture(opened, weights)


def shares(corpus: Corpus) -> tuple[Share, ...]:
    """What an epoch is made of."""
    return corpus.shares if isinstance(corpus, Mixture) else (Share(corpus.rows, corpus.rows),)


def corpora_identity(corpus: Corpus) -> dict[str, Any]:
    """What must not change while a run reads a corpus, in JSON types: every shard and, of a mixture, the shares."""
    found: dict[str, Any] = {"shards": hashing.fold(0, *(int(shard.sha256, 16) for shard in corpus.manifest.shards))}
    if isinstance(corpus, Mixture):
        found["mixture"] = [[share.rows, share.places] for share in corpus.shares]
        # A run without a mixture does not look at the line above.
        found["shards"] = hashing.fold(found["shards"], *(n for pair in found["mixture"] for n in pair))
    return found
