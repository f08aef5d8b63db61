"""What the heads of a model attend to, on rows of a corpus: patterns, entropy, distance, kinds of tokens.

N applications of a layer, H heads, R rows of at most L tokens; padding is cut off.
"""

import string
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.attention.heads import attention_maps
from maskvr_ds.analysis.attention.patterns import CLASSES, SHORTEST, classify, distance, entropy
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.data.permutation import KeyedPermutation
from maskvr_ds.data.vocabulary import token_ids
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.encoder import MaskedLanguageModel

_SEED = 0
_PUNCTUATION = set(string.punctuation)
TARGETS = ("[CLS]", "[SEP]", "punctuation", "same token")


@dataclass(frozen=True)
class Rows:
    """The rows that all models are measured on. masked: with predictions, for losses; plain: uncorrupted."""

    masked: MaskedBatch
    plain: MaskedBatch
    cls: int
    sep: int
    punctuation: frozenset[int]


def choose_rows(corpus: Corpus, rows: int, device: torch.device) -> Rows:
    """The first rows of a keyed order."""
    chosen = KeyedPermutation(corpus.rows, _SEED)(np.arange(min(rows, corpus.rows)))
    batch: TokenBatch = to_device(read_rows(corpus, chosen, np.zeros_like(chosen)), device)
    masked = Masker.for_corpus(corpus.manifest, seed=_SEED, device=device)(batch)
    names = token_ids(corpus.tokenizer_folder) or {}
    special = corpus.manifest.special_tokens
    signs = {index for token, index in names.items() if token and set(token.removeprefix("##")) <= _PUNCTUATION}
    return Rows(
        masked=masked,
        plain=replace(masked, input_ids=batch.input_ids.long()),
        cls=special.cls,
        sep=special.sep,
        punctuation=frozenset(signs - set(special.all)),
    )


@dataclass(frozen=True)
class HeadFigures:
    """classes: of the maps of each head, by row: [N][H][R]. entropy in nats, distance in tokens: float64 [N, H].
    attention: share of the attention that goes to each of TARGETS: float64 [N, H] each. examples: class -> (layer,
    head, map [l, l]) of its clearest map, by lowest entropy."""

    classes: list[list[list[str]]]
    entropy: NDArray[np.float64]
    distance: NDArray[np.float64]
    attention: dict[str, NDArray[np.float64]]
    examples: dict[str, tuple[int, int, NDArray[np.float64]]]

    def of_heads(self) -> list[list[str]]:
        """The most frequent class of each head, [N][H]."""
        return [[Counter(rows).most_common(1)[0][0] for rows in layer] for layer in self.classes]

    def shares(self) -> list[dict[str, float]]:
        """Share of each class among the maps, by layer and, last, over all layers."""
        layers = [[name for head in layer for name in head] for layer in self.classes]
        return [_shares(names) for names in (*layers, [name for layer in layers for name in layer])]

    def dump(self) -> dict[str, Any]:
        """JSON types."""
        *layers, overall = self.shares()
        return {
            "shares": overall,
            "shares_by_layer": layers,
            "class_of_heads": self.of_heads(),
            "entropy": self.entropy.tolist(),
            "distance": self.distance.tolist(),
            "attention_to": {name: values.tolist() for name, values in self.attention.items()},
        }


def _shares(names: list[str]) -> dict[str, float]:
    counts = Counter(names)
    return {name: counts[name] / len(names) for name in CLASSES}


def measure_heads(model: MaskedLanguageModel, rows: Rows) -> HeadFigures:
    """Rows of fewer than four tokens have no pattern and are skipped. Raises ValueError if all are, the architecture
    returns no attention weights, or a weight is not finite."""
    measured = 0
    classes: list[list[list[str]]] = []
    sums: dict[str, NDArray[np.float64]] = {}
    clearest: dict[str, tuple[float, int, int, NDArray[np.float64]]] = {}
    for row in rows.plain.split(1):
        maps = attention_maps(model, row)[:, 0].double().numpy()
        if not np.isfinite(maps).all():
            raise ValueError("attention weights are not finite: the model is damaged or diverged")
        layers, heads = maps.shape[:2]
        if not classes:
            classes = [[[] for _ in range(heads)] for _ in range(layers)]
            sums = {name: np.zeros((layers, heads)) for name in ("entropy", "distance", *TARGETS)}
        length = maps.shape[-1] if row.attention_mask is None else int(row.attention_mask.sum())
        if length < SHORTEST:
            continue
        measured += 1
        columns = _columns(row.input_ids[0, :length].cpu().numpy(), rows)
        for n in range(layers):
            for h in range(heads):
                attention = maps[n, h, :length, :length]
                name, spread = classify(attention), entropy(attention)
                classes[n][h].append(name)
                sums["entropy"][n, h] += spread
                sums["distance"][n, h] += distance(attention)
                for target, chosen in columns.items():
                    sums[target][n, h] += float((attention * chosen).sum(1).mean())
                if name not in clearest or spread < clearest[name][0]:
                    clearest[name] = (spread, n, h, attention)
    if not measured:
        raise ValueError(f"all rows have fewer than {SHORTEST} tokens: there is no pattern to see")
    means = {name: total / measured for name, total in sums.items()}
    return HeadFigures(
        classes=classes,
        entropy=means["entropy"],
        distance=means["distance"],
        attention={name: means[name] for name in TARGETS},
        examples={name: clearest[name][1:] for name in CLASSES if name in clearest},
    )


def _columns(ids: NDArray[np.int64], rows: Rows) -> dict[str, NDArray[np.bool_]]:
    """For each of TARGETS, the positions attended to: bool [1, l] or [l, l]."""
    same = (ids[:, None] == ids) & ~np.eye(len(ids), dtype=bool)
    return {
        "[CLS]": (ids == rows.cls)[None],
        "[SEP]": (ids == rows.sep)[None],
        "punctuation": np.isin(ids, list(rows.punctuation))[None],
        "same token": same,
    }


def similarity(a: MaskedLanguageModel, b: MaskedLanguageModel, rows: Rows) -> NDArray[np.float64] | None:
    """Cosine similarity of the heads' maps of two models, mean over rows: float64 [N, H]; None if they have other
    numbers of layers or heads."""
    total: NDArray[np.float64] | None = None
    for row in rows.plain.split(1):
        first, second = (attention_maps(model, row)[:, 0].double().flatten(2) for model in (a, b))
        if first.shape != second.shape:
            return None
        found = torch.nn.functional.cosine_similarity(first, second, dim=-1).numpy()
        total = found if total is None else total + found
    return None if total is None else total / len(rows.plain.input_ids)
