"""The share of unknown tokens: a tokenizer that does not fit the text leaves nothing to predict."""

from __future__ import annotations

import logging

from data_pipeline.files import CorpusError
from data_pipeline.numbers import counted
from data_pipeline.tokenization.token_shards import TokenManifest

_WARN = 0.02
_logger = logging.getLogger(__name__)


def _counts(manifest: TokenManifest, source: int | None = None, side: str | None = None) -> tuple[int, int]:
    """Unknown tokens and all tokens of text, of a source and of a side, or of all."""
    entries = [
        entry
        for shard in manifest.shards
        if source in (None, shard.source)
        for name, entry in shard.sides.items()
        if side in (None, name)
    ]
    return sum(entry.unknown for entry in entries), sum(entry.length - entry.documents for entry in entries)


def describe_unknown(manifest: TokenManifest) -> str:
    unknown, total = _counts(manifest)
    return f"{unknown / max(total, 1):.2%} of the text unknown"


def check_unknown(manifest: TokenManifest, maximum: float) -> None:
    """Compare the share of [UNK] among the tokens of each source, and of the held-out side, with `maximum`.

    Logs a warning for sources with more than 2%. Raises CorpusError if one exceeds the maximum.
    """
    parts = {f"source {name}: " if name else "": _counts(manifest, i) for i, name in enumerate(manifest.names)}
    sides = {f"side {side}: ": _counts(manifest, side=side) for side in manifest.sides[1:]}
    for part, (unknown, total) in (parts | sides).items():
        share = unknown / max(total, 1)
        if share <= min(_WARN, maximum):
            continue
        fact = f"{part}{share:.1%} of {counted(total, 'token')} are unknown ([UNK])"
        remedy = "Language, case and accents of the tokenizer must fit the text: choose another"
        if share > maximum:
            raise CorpusError(f"{fact}, the limit is {maximum:.1%}. {remedy}, or raise --max-unknown")
        if part in parts:
            _logger.warning("warning: %s. %s, or ignore this if it is intended", fact, remedy)
