"""What the heads of a model attend to, on rows of a corpus: patterns, entropy, distance, kinds of tokens.

N applications of a layer, H heads, R rows of at most L tokens; padding is cut off.
"""

import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.attention.heads import attention_maps
from maskvr_ds.analysis.attention.patterns import CLASSES, SHORTEST, classify, distance, entropy
from maskvr_ds.analysis.attention.words import WordFinder, WordList
from maskvr_ds.analysis.health.probe import layers_of
from maskvr_ds.config import ConfigError
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
    """The rows that all models are measured on. masked: with predictions, for losses; plain: uncorrupted. words: finder
    of the words that the user listed; None: of none."""

    masked: MaskedBatch
    plain: MaskedBatch
    cls: int
    sep: int
    punctuation: frozenset[int]
    words: WordFinder | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of tokens to which attention is measured."""
        return TARGETS + (() if self.words is None else tuple(entry.name for entry in self.words.lists))


def choose_rows(corpus: Corpus, rows: int, device: torch.device, lists: tuple[WordList, ...] = ()) -> Rows:
    """The first rows of a keyed order. Raises ConfigError for lists of words that do not occur in them."""
    names = Counter((*TARGETS, *(entry.name for entry in lists)))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"--words: two kinds of tokens have the name {twice[0]!r}; choose another name")
    chosen = KeyedPermutation(corpus.rows, _SEED)(np.arange(min(rows, corpus.rows)))
    batch: TokenBatch = to_device(read_rows(corpus, chosen, np.zeros_like(chosen)), device)
    masked = Masker.for_corpus(corpus.manifest, seed=_SEED, device=device)(batch)
    ids = token_ids(corpus.tokenizer_folder) or {}
    special = corpus.manifest.special_tokens
    signs = {index for token, index in ids.items() if token and set(token.removeprefix("##")) <= _PUNCTUATION}
    words = WordFinder(corpus, lists) if lists else None
    if words is not None:
        found = [words.columns(ids) for ids in batch.input_ids.long().cpu().numpy()]
        for entry in lists:
            if not any(row[entry.name].any() for row in found):
                raise ConfigError(
                    f"--words {entry.name}: none of its {len(entry.words)} words occurs in the {len(found)} rows; read "
                    "more --rows, or give another list"
                )
    return Rows(
        masked=masked,
        plain=replace(masked, input_ids=batch.input_ids.long()),
        cls=special.cls,
        sep=special.sep,
        punctuation=frozenset(signs - set(special.all)),
        words=words,
    )


@dataclass(frozen=True)
class HeadFigures:
    """classes: of the maps of each head, by row: [N][H][R]. entropy in nats, distance in tokens: float64 [N, H].
    attention: share of it that goes to each of `Rows.targets`: float64 [N, H] each. examples: class -> (layer, head,
    map [l, l]) of its clearest map, by lowest entropy."""

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


def maps_by_row(model: MaskedLanguageModel, rows: Rows) -> Iterator[tuple[MaskedBatch, NDArray[np.float64]]]:
    """Each row, and the maps of all heads without its padding: float64 [N, H, l, l]. Raises ValueError if the
    architecture returns no attention weights, or one is not finite."""
    for row in rows.plain.split(1):
        maps = attention_maps(model, row)[:, 0].double().numpy()
        if not np.isfinite(maps).all():
            raise ValueError("attention weights are not finite: the model is damaged or diverged")
        length = maps.shape[-1] if row.attention_mask is None else int(row.attention_mask.sum())
        yield row, maps[:, :, :length, :length]


def measure_heads(
    model: MaskedLanguageModel, rows: Rows, classifier: Callable[[NDArray[np.float64]], str] = classify
) -> HeadFigures:
    """classifier: gives one of CLASSES for a map [l, l].

    Rows of fewer than four tokens have no pattern and are skipped. Raises ValueError if all are, the architecture
    returns no attention weights, or a weight is not finite."""
    measured = 0
    classes: list[list[list[str]]] = []
    sums: dict[str, NDArray[np.float64]] = {}
    clearest: dict[str, tuple[float, int, int, NDArray[np.float64]]] = {}
    for row, maps in maps_by_row(model, rows):
        layers, heads, length = maps.shape[:3]
        if not classes:
            classes = [[[] for _ in range(heads)] for _ in range(layers)]
            sums = {name: np.zeros((layers, heads)) for name in ("entropy", "distance", *rows.targets)}
        if length < SHORTEST:
            continue
        measured += 1
        columns = _columns(row.input_ids[0, :length].cpu().numpy(), rows)
        for n in range(layers):
            for h in range(heads):
                attention = maps[n, h]
                name, spread = classifier(attention), entropy(attention)
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
        attention={name: means[name] for name in rows.targets},
        examples={name: clearest[name][1:] for name in CLASSES if name in clearest},
    )


def _columns(ids: NDArray[np.int64], rows: Rows) -> dict[str, NDArray[np.bool_]]:
    """For each of `rows.targets`, the positions attended to: bool [1, l] or [l, l]."""
    same = (ids[:, None] == ids) & ~np.eye(len(ids), dtype=bool)
    return {
        "[CLS]": (ids == rows.cls)[None],
        "[SEP]": (ids == rows.sep)[None],
        "punctuation": np.isin(ids, list(rows.punctuation))[None],
        "same token": same,
        **({} if rows.words is None else {name: found[None] for name, found in rows.words.columns(ids).items()}),
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


def weight_similarity(a: MaskedLanguageModel, b: MaskedLanguageModel) -> list[dict[str, float]] | None:
    """Cosine similarity of the matrices of each distinct layer of two models, by name, and of `all` of a layer as one
    vector; None if their layers have other matrices."""
    layers = [[_matrices(layer) for layer in layers_of(model.mlm)] for model in (a, b)]
    shapes = [[{name: matrix.shape for name, matrix in layer.items()} for layer in model] for model in layers]
    if shapes[0] != shapes[1]:
        return None
    found = []
    for first, second in zip(*layers, strict=True):
        products = {name: _products(first[name], second[name]) for name in first}
        products["all"] = torch.stack(list(products.values())).sum(0)
        found.append({name: float(ab / (aa * bb).sqrt()) for name, (aa, ab, bb) in products.items()})
    return found


def _matrices(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.removesuffix(".weight"): p.detach() for n, p in layer.named_parameters() if p.dim() == 2}


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·a, a·b, b·b: float64 [3]."""
    a, b = a.double(), b.double()
    return torch.stack([(x * y).sum() for x, y in ((a, a), (a, b), (b, b))])
