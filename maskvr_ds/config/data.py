"""The section of what a run reads. Loads no torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from maskvr_ds.config.base import Section

MAX_WEIGHT = 1000


class MixtureCorpus(Section):
    """One corpus of several."""

    path: Path
    # How often its rows are read in an epoch; 0.5: half of them in each, the others in the next.
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = 1.0


class DataConfig(Section):
    """Corpora as `python -m data_pipeline build` writes them: `path` of one, or `mixture` of several."""

    path: Path | None = None
    mixture: tuple[MixtureCorpus, ...] = ()
    # None: the folder held_out in the corpus, or those in all corpora of the mixture, where evaluation asks for them.
    held_out_path: Path | None = None
    # "full" reads every shard once at the start and compares its SHA-256, the work divided among the ranks.
    verify: Literal["full", "size"] = "full"
    # Steps that each rank reads ahead.
    prefetch: PositiveInt = 2

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.path is not None and self.mixture:
            raise ValueError(f"path {self.path} and mixture are both given; remove one of them, or set path to null")
        if self.path is None and not self.mixture:
            raise ValueError("path: required, but not given; name the folder of a corpus (or several in mixture)")
        return self

    @property
    def corpora(self) -> tuple[MixtureCorpus, ...]:
        """What is read, also where it is one."""
        return self.mixture or (MixtureCorpus(path=self.path or Path()),)
