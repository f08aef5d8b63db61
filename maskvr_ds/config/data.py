"""Section `data`: the corpora that a run reads. Loads no torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maskvr_ds.config.base import PathSetting, PositiveCount, PositiveRatio, Section

MAX_WEIGHT = 1000


class MixtureCorpus(Section):
    """One corpus of a mixture."""

    path: PathSetting
    """Folder of the corpus."""
    weight: Annotated[PositiveRatio, Field(le=MAX_WEIGHT)] = 1.0
    """Reads of each of its rows per epoch; 0.5: half of them in each epoch, the other half in the next."""


class DataConfig(Section):
    """Corpora as written by `python -m data_pipeline build`: one in `path`, or several in `mixture`."""

    path: PathSetting | None = None
    """Folder of the only corpus; null with a mixture."""
    mixture: tuple[MixtureCorpus, ...] = ()
    """Several corpora, each with a weight; empty with `path`."""
    held_out_path: PathSetting | None = None
    """Corpus for evaluation. null: the subfolder held_out of the corpus, or of every corpus of the mixture."""
    attention: Literal["rows", "documents"] = "rows"
    """rows: every token attends to all others of its row; documents: to those of its document only, and positions start
    anew in every document (corpora without sentence pairs, and architectures whose attention can be replaced)."""
    verify: Literal["full", "background", "size"] = "full"
    """full: read every shard once at the start, the work divided among the ranks, compare its SHA-256 and check that
    ids are below the vocabulary size; background: the same while training runs, in a thread of each rank: damage ends
    the run, and no checkpoint is written before all shards were compared; size: compare file sizes only."""
    prefetch: PositiveCount = 2
    """Steps that each rank reads ahead."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.path is not None and self.mixture:
            raise ValueError(f"path {self.path} and mixture are both given; remove one of them, or set path to null")
        if self.path is None and not self.mixture:
            raise ValueError("path: required, but not given; name the folder of a corpus (or several in mixture)")
        return self

    @property
    def corpora(self) -> tuple[MixtureCorpus, ...]:
        """The corpora as a mixture, even if there is only one."""
        return self.mixture or (MixtureCorpus(path=self.path or Path()),)
