"""What `maskvr plan` knows of the corpora of a run. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.manifest import Manifest, read_manifest
from maskvr_ds.config import ConfigError, RunConfig
from maskvr_ds.config.data import DataConfig
from maskvr_ds.data.documents import check_borders, document_lengths
from maskvr_ds.data.mixture import open_training_corpus


@dataclass(frozen=True)
class Corpus:
    """What is needed to know of a phase's corpus: positions per row, entries of its vocabulary.

    padding: share of the positions that are padding; None without the corpus. pairs: with attention within documents,
    ordered pairs of positions of the same document, mean over rows; None for attention over rows or without the corpus.
    """

    length: int
    vocabulary: int
    padding: float | None = None
    pairs: float | None = None


def corpora_of(config: RunConfig, lengths: Sequence[int] | None, vocabulary: int | None) -> list[Corpus]:
    """The corpora of all phases, from their manifests or from the command line.

    A length from the command line describes a corpus that may be another one: nothing is read of its rows then.
    Raises ConfigError if a manifest is missing and the command line does not say what it would.
    """
    phases = config.named_phases()
    if lengths is not None and len(lengths) not in (1, len(phases)):
        raise ConfigError(
            f"--sequence-length: {len(lengths)} values for {len(phases)} phases; give one, or one per phase"
        )
    found = []
    for index, (_, phase) in enumerate(phases):
        data, size = phase.data, vocabulary
        length = None if lengths is None else lengths[index % len(lengths)]
        padding = pairs = pad = None
        if length is None or size is None:
            try:
                manifests = [read_manifest(corpus.path) for corpus in data.corpora]
                if length is None:
                    padding, pairs = _padding(data, manifests), _pairs(data)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{error}\n  without the corpus, give --sequence-length and --vocab-size (30522 for BERT's)"
                ) from None
            length, size = length or manifests[0].sequence_length, size or manifests[0].vocab_size
            pad = manifests[0].special_tokens.pad
        if fault := config.model.row_fault(length, pad):
            raise ConfigError(fault)
        found.append(Corpus(length, size, padding, pairs))
    return found


def _padding(data: DataConfig, manifests: Sequence[Manifest]) -> float:
    """Share of the positions of an epoch that are padding."""
    both = list(zip((corpus.weight for corpus in data.corpora), manifests, strict=True))
    positions = sum(weight * one.rows * one.sequence_length for weight, one in both)
    return 1 - sum(weight * one.tokens for weight, one in both) / positions


def _pairs(data: DataConfig) -> float | None:
    """Pairs of positions within documents per row, of a sample of rows; None for attention over rows."""
    if data.attention == "rows":
        return None
    corpus = open_training_corpus(data)
    check_borders(corpus)
    lengths, rows = document_lengths(corpus)
    return int((lengths**2).sum()) / rows
