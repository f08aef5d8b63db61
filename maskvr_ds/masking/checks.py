"""Whether a corpus allows the masking settings; the numbers of positions and segments that follow from them. Loads no
torch."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, MaskingConfig, RunConfig
from maskvr_ds.data.token_scores import read_token_scores
from maskvr_ds.data.vocabulary import word_starts

# Rows read at a time in search of a token to predict.
_BLOCK = 256


def round_half_up(x: float) -> int:
    """Round to nearest, halves up: the rule of `prediction_counts` (Python's `round` rounds halves to even)."""
    return math.floor(x + 0.5)


def check_ids(ids: Sequence[int | None], vocab_size: int) -> None:
    """Raise ValueError unless all special tokens are in the vocabulary."""
    for i in ids:
        if i is None or not 0 <= i < vocab_size:
            raise ValueError(f"id {i} of a special token: must be below the vocabulary size, {vocab_size}")


def segments(n: int, rate: float) -> int:
    """S = ⌈n/k⌉: the number of segments into which `fully_explored` divides a row of n maskable positions."""
    return -(-n // max(1, round_half_up(n * rate)))


# Share of the predictions that `fully_explored` may lose to equal segments before a warning.
_LOSS_ALLOWED = 0.02
# Rows whose tokens are counted for it, at equal distances.
_COUNTED = 256


def maskable_counts(corpus: Corpus) -> Counter[int]:
    """Numbers n of maskable positions in some rows of the corpus, with how many of these rows have n; without rows that
    have none. Ends of documents are special tokens, so packed rows differ by a few positions."""
    rows = np.unique(np.linspace(0, corpus.rows - 1, min(corpus.rows, _COUNTED)).round().astype(np.int64))
    ids = np.empty((len(rows), corpus.sequence_length), corpus.dtype)
    corpus.take(rows, out=ids)
    found = Counter((~np.isin(ids, np.array(corpus.manifest.special_tokens.all))).sum(1).tolist())
    del found[0]
    return found


def predictions_lost(counts: int | Counter[int], rate: float) -> float:
    """Share of the k predictions that `fully_explored` does not make: 1 − Σ (n/S) / Σ k, in a row of n maskable
    positions, or in rows as `maskable_counts` counts them; 0 without rows."""
    rows = Counter([counts]) if isinstance(counts, int) else counts
    made = sum(times * n / segments(n, rate) for n, times in rows.items())
    uniform = sum(times * max(1, round_half_up(n * rate)) for n, times in rows.items())
    return 1 - made / uniform if uniform else 0.0


def rate_without_loss(counts: Counter[int], rate: float) -> float | None:
    """The nearest rate, to four digits, at which segments are at most 2% shorter than uniform masks; None: of those
    tried, none. A little above 1/S, rows with a few maskable positions less have S segments too."""
    n = max(counts)
    rates = {round(x, 4) for s in range(2, n + 1) for x in (1 / s, 1.01 / s, 1.02 / s, 1.03 / s, -(-n // s) / n)}
    nearest = sorted((x for x in rates if 0 < x < 1), key=lambda other: abs(other - rate))
    return next((x for x in nearest if predictions_lost(counts, x) <= _LOSS_ALLOWED), None)


def effective_predictions(masking: MaskingConfig, n: int) -> str:
    """Number of predictions in a row of n maskable positions, in words."""
    k = max(1, round_half_up(n * masking.rate))
    if masking.strategy != "fully_explored":
        last = "" if masking.final_rate is None else f", {max(1, round_half_up(n * masking.final_rate))} at the end"
        at_most = "up to " if masking.strategy in ("whole_word", "span") else ""
        return f"{at_most}{k} of {n} tokens of a full row{last}"
    parts = segments(n, masking.rate)
    return f"{n / parts:.4g} of {n} tokens of a full row on average, in {parts} disjoint masks"


def fewer_predictions(masking: MaskingConfig, corpus: Corpus) -> str | None:
    """A warning if fully_explored makes over 2% fewer predictions in the corpus's rows than uniform masks would."""
    if masking.strategy != "fully_explored" or not (counts := maskable_counts(corpus)):
        return None
    if (lost := predictions_lost(counts, masking.rate)) <= _LOSS_ALLOWED:
        return None
    better = rate_without_loss(counts, masking.rate)
    return (
        f"masking.rate {masking.rate:g}: fully_explored divides the tokens of a row into equal masks, which have "
        f"{lost:.1%} fewer predictions in the rows of {corpus.folder} than uniform masks at this rate"
        + ("" if better is None else f"; at rate {better:g} it loses at most 2%")
    )


def hidden_positions(masking: MaskingConfig, length: int) -> int:
    """Positions of a full row of `length` tokens that are [MASK] in every mask and at every rate of the schedule: what
    the layers below masking.late_layer do not compute."""
    rate = min(masking.rate, masking.final_rate or masking.rate)
    return hidden_at(length - 2, rate, disjoint=masking.strategy in ("fully_explored", "auto"))


def hidden_at(n: int, rate: float, *, disjoint: bool) -> int:
    """`hidden_positions` at one rate, in a row of n maskable positions. disjoint: whether masks are segments."""
    return n // segments(n, rate) if disjoint else max(1, round_half_up(n * rate))


def check_rates(masking: MaskingConfig, longest: int) -> None:
    """Raise ConfigError if a rate predicts less than one of `longest` maskable positions."""
    for name, rate in (("rate", masking.rate), ("final_rate", masking.final_rate)):
        if rate is not None and round_half_up(longest * rate) < 1:
            raise ConfigError(
                f"masking.{name} {rate:g}: less than one prediction in a row of {longest} tokens; set it to at least "
                f"{0.5 / longest:.3g}"
            )


def check_masking(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError if the corpus's sequence length, size or vocabulary does not allow the masking settings."""
    masking, longest = config.masking, corpus.sequence_length - 2
    check_rates(masking, longest)
    if masking.strategy in ("fully_explored", "auto"):
        if masking.final_rate is not None and masking.strategy == "fully_explored":
            for n in range(1, longest + 1):
                if (before := segments(n, masking.rate)) != (after := segments(n, masking.final_rate)):
                    raise ConfigError(
                        f"masking.final_rate {masking.final_rate:g}: with strategy {masking.strategy} the rate must "
                        f"not change the number of segments within a round, but rows of {n} tokens would change from "
                        f"{before} to {after}; remove final_rate, or change the rate between phases"
                    )
        if (copies := sequence_copies(masking, corpus)) > (most := segments(longest, masking.rate)):
            raise ConfigError(
                f"masking.fully_explored.segments_per_sequence {copies} exceeds the maximum: a sequence of "
                f"{corpus.sequence_length} tokens has {most} segments at rate {masking.rate:g}"
            )
        if config.batch.global_size % copies:
            below = config.batch.global_size // copies * copies
            sizes = [size for size in (below, below + copies) if size]
            raise ConfigError(
                f"batch.global_size {config.batch.global_size} is not a multiple of {copies}, the number of segments "
                f"of a sequence in one global batch; set it to {' or '.join(str(b) for b in sizes)}, or "
                "masking.fully_explored.segments_per_sequence to a divisor of it"
            )
    if masking.strategy == "auto" and masking.auto.rows > corpus.rows:
        raise ConfigError(f"masking.auto.rows {masking.auto.rows}: {corpus.folder} has only {corpus.rows} rows")
    if masking.strategy == "frequency" and masking.frequency.scores is not None:
        read_token_scores(masking.frequency.scores, corpus.manifest)
    if masking.strategy in ("whole_word", "span"):
        word_starts(corpus.tokenizer_folder, corpus.manifest.vocab_size)


def sequence_copies(masking: MaskingConfig, corpus: Corpus) -> int:
    """J: copies of a row in a global batch; by default (placement same_batch) one per segment of a full row."""
    if masking.fully_explored.placement != "same_batch":
        return 1
    return masking.fully_explored.segments_per_sequence or segments(corpus.sequence_length - 2, masking.rate)


def check_maskable(corpus: Corpus, rows: NDArray[np.int64] | range, use: str, remedy: str) -> None:
    """Raise ConfigError if there is nothing to predict in the given rows, int64 [·]: every token is a special one,
    [UNK] included. The loss of such a training would be 0, that of such held-out rows 0/0.

    use: what the rows are for. Reads tokens, but only up to the first ordinary one: usually a single block of rows.
    """
    special = np.array(corpus.manifest.special_tokens.all)
    for start in range(0, len(rows), _BLOCK):
        block = np.sort(np.asarray(rows[start : start + _BLOCK], dtype=np.int64))
        ids = np.empty((len(block), corpus.sequence_length), corpus.dtype)
        corpus.take(block, out=ids)
        if not np.isin(ids, special).all():
            return
    raise ConfigError(
        f"{corpus.folder}: nothing to predict: all tokens of its {len(rows):,} rows for {use} are special tokens, or "
        f"unknown to the tokenizer ([UNK]); {remedy}"
    )
