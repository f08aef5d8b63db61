"""Plots of a corpus: document lengths, most frequent tokens, sources."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipeline.files import CorpusError, atomic_file
from data_pipeline.reports.scan import Scan
from data_pipeline.shards import Corpus
from data_pipeline.tokenization.tokenizer import Encoder

# Bars that fill the height of a panel, at least.
_THICKNESS = 8


def check_plot(path: Path) -> None:
    """Raise CorpusError if matplotlib is missing, or if `path` cannot be written: before a scan that takes hours."""
    if find_spec("matplotlib") is None:
        raise CorpusError("--png: requires the package matplotlib. Install it, or omit --png")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise CorpusError(f"--png {path}: {what}. Give the name of a file in a folder that exists")


def plot(folder: str | Path, found: Scan, top: int, path: Path) -> None:
    """Plot document lengths, the `top` most frequent tokens, and tokens per source to a PNG file.

    Raises CorpusError if the disk is full.
    """
    from matplotlib.figure import Figure

    corpus = Corpus(folder)
    manifest = corpus.manifest
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    lengths, tokens, sources = figure.subplots(1, 3)
    edges = 2.0 ** np.arange(0, np.log2(max(found.lengths, default=1)) + 2)
    lengths.hist(list(found.lengths), bins=edges.tolist(), weights=list(found.lengths.values()))
    lengths.set(xscale="log", xlabel="tokens per document", ylabel="documents", title="document lengths")
    _bars(tokens, *top_tokens(corpus, found, top), "most frequent tokens", "occurrences")
    names = [entry.name for entry in manifest.mixture] or ["all"]
    _bars(
        sources, names, [entry.tokens for entry in manifest.mixture] or [manifest.tokens], "tokens by source", "tokens"
    )
    with atomic_file(path) as file:
        figure.savefig(cast(Any, file), format="png", metadata={"Software": None})


def top_tokens(corpus: Corpus, found: Scan, top: int) -> tuple[list[str], list[int]]:
    """The most frequent tokens of the text, and their counts."""
    special = corpus.manifest.special_tokens
    counts = found.counts.copy()
    counts[[i for i in special.all if i != special.unk]] = 0
    order = np.argsort(-counts, kind="stable")[:top].tolist()
    words = Encoder(corpus.tokenizer_folder).tokenizer
    return [words.id_to_token(i) or f"<{i}>" for i in order], counts[order].tolist()


def _bars(axes: Any, names: Sequence[str], values: Sequence[int], title: str, unit: str) -> None:
    # Escape "$", which starts a formula in matplotlib.
    labels = [name.replace("$", r"\$") for name in names]
    axes.barh(range(len(names)), list(values), tick_label=labels)
    # Of a few sources, as thick as of many.
    axes.set_ylim(max(len(names), _THICKNESS) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title=title, xlabel=unit)
