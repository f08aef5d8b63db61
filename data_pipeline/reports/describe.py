"""Statistics of a corpus as text."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import CorpusError
from data_pipeline.numbers import counted
from data_pipeline.packing.source_counts import is_repeated
from data_pipeline.reports.scan import QUANTILES, scan
from data_pipeline.shards import Corpus, MixtureEntry
from data_pipeline.tokenization.tokenizer import Encoder


def describe(
    folder: str | Path, top: int = 20, progress: Callable[[int], object] | None = None, png: Path | None = None
) -> str:
    """Text printed by the command stats: counts, unknown rate, repeated and dropped documents, sources, document
    lengths, and the `top` most frequent tokens. png: file to plot the last three to.

    Raises CorpusError if top < 0, if `png` cannot be written, or if the corpus is damaged.
    """
    if top < 0:
        raise CorpusError(f"--top {top}: must be at least 0")
    if png is not None:
        from data_pipeline.reports.figures import check_plot, plot

        check_plot(png)
    corpus = Corpus(folder)
    manifest = corpus.manifest
    found = scan(corpus, progress, hashes=True)
    if found.faults:
        raise CorpusError("\n".join(found.faults))
    if png is not None:
        plot(folder, found, top, png)
    special = manifest.special_tokens
    # Special tokens added by the packing are not text.
    text = found.counts.copy()
    text[[i for i in special.all if i != special.unk]] = 0
    total = int(text.sum())
    unknown = 0 if special.unk is None else text[special.unk]
    size = sum(shard.bytes for shard in manifest.shards)
    facts = {
        "sequence length": f"{manifest.sequence_length:,}",
        "vocabulary": f"{manifest.vocab_size:,}",
        "shards": f"{len(manifest.shards):,}",
        "rows": f"{manifest.rows:,}",
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,} ({total:,} of text)",
        "unigram entropy": f"{_entropy(found.counts, special.all):.3f} nats per token, the loss without context",
        "unknown": f"{unknown:,} ({unknown / total:.4%} of text)",
        "bytes on disk": f"{size:,} ({size / manifest.tokens:.4f} per token)",
        "sources": f"{len(manifest.sources):,} ({sum(s.bytes for s in manifest.sources):,} bytes)",
    }
    if found.hashes and (hashes := np.concatenate(found.hashes)).size:
        share = is_repeated(hashes).mean()
        of = "" if found.modulus == 1 else f", estimated from a sample of {len(hashes):,}"
        number = round(share * manifest.documents)
        facts["repeated"] = f"{counted(number, 'document')} ({share:.2%}) equal{'s' * (number == 1)} an earlier one{of}"
    facts |= {f"dropped, {reason}": f"{count:,}" for reason, count in manifest.dropped.items()}
    if manifest.replaced:
        facts["replaced bytes"] = counted(manifest.replaced, "document")
    if manifest.pair_probability:
        facts["labelled pairs"] = f"{manifest.labelled:,} ({manifest.labelled / manifest.rows:.2%})"
        facts["unused tokens"] = f"{manifest.unused:,}"
    used = sum(entry.tokens for entry in manifest.mixture)
    for entry in manifest.mixture:
        share = (
            f"{counted(entry.tokens, 'token')} ({entry.tokens / used:.2%}) of {counted(entry.documents, 'document')}"
        )
        facts[f"source {entry.name}"] = f"{share}, weight {entry.weight:g}{_of_source(entry)}"
    quantiles = zip(QUANTILES, found.length_quantiles(), strict=True) if found.lengths else ()
    width = max(16, *map(len, facts))
    order = np.argsort(-text, kind="stable")[:top]
    words = Encoder(corpus.tokenizer_folder).tokenizer
    return "\n".join(
        [
            *(f"{name:{width}} {value}" for name, value in facts.items()),
            *(["", "tokens per document"] if found.lengths else []),
            *(f"  {quantile:>6.0%}  {length:>12,}" for quantile, length in quantiles),
            "",
            "most frequent tokens",
            *(f"  {words.id_to_token(i):20} {text[i]:>14,}  {text[i] / total:.3%}" for i in order.tolist() if text[i]),
        ]
    )


def _entropy(counts: NDArray[np.int64], special: Sequence[int]) -> float:
    """Entropy in nats of the distribution of ordinary tokens: the lowest masked-LM loss of a model without context."""
    ordinary = counts.astype(np.float64)
    ordinary[list(special)] = 0
    shares = ordinary[ordinary > 0] / max(ordinary.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def _of_source(entry: MixtureEntry) -> str:
    shares = {"unknown": entry.unknown, "repeated": entry.repeated}
    found = [f"{name} {share:.2%}" for name, share in shares.items() if share is not None]
    found += [f"{count:,} {reason}" for reason, count in entry.dropped.items()]
    return "".join(f", {item}" for item in found)
