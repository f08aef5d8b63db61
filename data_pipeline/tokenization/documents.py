"""What a build took as documents: in words, and a warning if paragraphs may have become documents."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_pipeline.numbers import counted
from data_pipeline.sources.description import Description
from data_pipeline.sources.inputs import Source
from data_pipeline.tokenization.token_shards import TokenManifest

# Paragraphs of prose have about 100 tokens, articles several hundred.
_SHORT = 150
_MANY_PER_FILE = 20

_logger = logging.getLogger(__name__)


def describe_documents(tokens: TokenManifest) -> str:
    """Documents, tokens per document and files: "read 120 documents of 85 tokens on average from 3 files"."""
    documents, length = _counts(tokens, None)
    each = f" of {counted(round(length / documents), 'token')} on average" if documents else ""
    files = len(tokens.sources)
    held_out = sum(shard.sides["held_out"].documents for shard in tokens.shards if "held_out" in shard.sides)
    split = f", {held_out:,} of them held out" if held_out else ""
    return f"read {counted(documents, 'document')}{each} from {counted(files, 'file')}{split}"


def warn_of_paragraphs(
    about: Description, groups: Sequence[Sequence[Source]], tokens: TokenManifest, held_out_by: str
) -> None:
    """Log a warning for each source whose text files hold many short documents separated by blank lines."""
    for number, (section, files) in enumerate(zip(about.sources, groups, strict=True)):
        if section.documents != "blank-line" or any(source.format != ".txt" for source in files):
            continue
        documents, length = _counts(tokens, number)
        if documents <= _MANY_PER_FILE * len(files) or length >= _SHORT * documents:
            continue
        remedy = "--documents file (documents: file in a description) makes each file a document"
        if tokens.held_out and held_out_by == "document":
            remedy += (
                "; --held-out-by file holds out complete files: the held-out split now has paragraphs of texts that "
                "are trained on"
            )
        _logger.warning(
            "%s%s %s split at blank lines into %s of %.0f tokens on average. If these are paragraphs of longer texts: "
            "%s",
            f"source {section.name}: " if len(groups) > 1 else "",
            counted(len(files), "text file"),
            "was" if len(files) == 1 else "were",
            counted(documents, "document"),
            length / documents,
            remedy,
        )


def _counts(tokens: TokenManifest, source: int | None) -> tuple[int, int]:
    """Documents and their tokens, of one source or of all."""
    sides = [side for shard in tokens.shards if source in (None, shard.source) for side in shard.sides.values()]
    documents = sum(side.documents for side in sides)
    # Each document ends with a separator, which is none of its tokens.
    return documents, sum(side.length for side in sides) - documents
