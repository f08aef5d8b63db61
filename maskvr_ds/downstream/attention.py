"""`maskvr attention`: heads of models on rows of a corpus; everything is checked before the first model is measured.

One process. Call after `distributed.initialize`.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from maskvr_ds.analysis.attention.heads import Heads, How, listed_heads, rank_correlation
from maskvr_ds.analysis.attention.measure import (
    Rows,
    choose_rows,
    maps_by_row,
    measure_heads,
    similarity,
    weight_similarity,
)
from maskvr_ds.analysis.attention.network import SureMaps
from maskvr_ds.analysis.attention.patterns import CLASSES, SHORTEST, classify
from maskvr_ds.analysis.attention.picture import draw
from maskvr_ds.analysis.attention.words import WordList
from maskvr_ds.analysis.health.probe import copy_for_analysis
from maskvr_ds.config import ConfigError
from maskvr_ds.downstream.mlm import Source, evaluation_corpus, find_model, load_masked_lm
from maskvr_ds.models.encoder import MaskedLanguageModel, build
from maskvr_ds.run_folder.layout import BERT
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import folder_in_progress

CONTROL = "random weights"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Request:
    """rows: to measure on. words: lists of words to which attention is measured. network: classify maps by a network
    that is trained on those of which the rule is sure. off: also measure the loss without each head of the first model,
    and how. prune: number of its heads to switch off in turn; export: folder for the pruned model."""

    rows: int
    words: tuple[WordList, ...] = ()
    network: bool = False
    off: How | None = None
    prune: int = 0
    export: Path | None = None
    plot: Path | None = None


def run(models: Sequence[str], data: Path, request: Request) -> dict[str, Any]:
    """Measure; returns the figures for JSON. Raises ConfigError, CheckpointError or ValueError for a model or corpus
    that does not fit, or an architecture without attention weights."""
    corpus = evaluation_corpus(data)
    sources = {name: find_model(name, corpus) for name in models}
    if request.export is not None and request.export.exists():
        raise ConfigError(f"--export-pruned {request.export}: exists; choose a new folder")
    rows = choose_rows(corpus, request.rows, distributed.device(), request.words)
    # Maps do not depend on the prediction head, which sentence encoders lack; losses do.
    new_head = False if request.off is not None or request.prune else None
    modules = {name: load_masked_lm(source, corpus, new_head=new_head) for name, source in sources.items()}
    for name, module in modules.items():
        if module.separator is not None:
            raise ConfigError(
                f"{name}: was trained with data.attention documents, and heads are measured on complete rows; measure "
                "its export (`maskvr export`) on a corpus of single documents"
            )
    loaded = {name: copy_for_analysis(module.mlm) for name, module in modules.items()}
    first = loaded[models[0]]
    result: dict[str, Any] = {"data": str(corpus.folder), "rows": len(rows.plain.input_ids), "classifier": "rule"}
    classifier = classify
    if request.network:
        sure = _sure_maps(loaded.values(), rows)
        classifier = sure.train().classify
        result |= {"classifier": "network", "trained_on": sure.counts}
    loaded[CONTROL] = _control(first)
    figures = {name: measure_heads(model, rows, classifier) for name, model in loaded.items()}
    result["models"] = {name: found.dump() for name, found in figures.items()}
    for name in (*models[1:], CONTROL) if len(models) > 1 else ():
        found = similarity(first, loaded[name], rows)
        result.setdefault("similarity_to_first", {})[name] = None if found is None else found.tolist()
        weights = weight_similarity(first, loaded[name])
        result.setdefault("weight_similarity_to_first", {})[name] = weights
    increases = None
    if request.off is not None or request.prune:
        result["heads"] = _switched_off(first, rows, request, sources[models[0]])
        if request.off is not None:
            increases = torch.tensor(result["heads"]["increase"]).numpy()
    if request.plot is not None:
        draw(figures, increases, request.plot)
    return result


def _sure_maps(models: Iterable[MaskedLanguageModel], rows: Rows) -> SureMaps:
    sure = SureMaps()
    for model in models:
        for _, maps in maps_by_row(model, rows):
            if maps.shape[-1] >= SHORTEST:
                for attention in maps.reshape(-1, *maps.shape[-2:]):
                    sure.add(attention)
    return sure


def _control(model: MaskedLanguageModel) -> MaskedLanguageModel:
    """The same architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return copy_for_analysis(build(model.mlm.config)).to(distributed.device())


def _switched_off(model: MaskedLanguageModel, rows: Rows, request: Request, source: Source) -> dict[str, Any]:
    heads, how = Heads(model, rows.masked), request.off or "zero"
    found: dict[str, Any] = {"how": how, "loss": heads.loss()}
    if request.off is not None:
        increases, importance = heads.increases(how), heads.importance()
        found |= {"increase": increases.tolist(), "importance": importance.tolist()}
        found["increase_without_layer"] = heads.layer_increases(how)
        found["rank_correlation"] = rank_correlation(importance, increases)
    if request.prune:
        curve = heads.prune(request.prune, how)
        found["pruning"] = [{"layer": n, "head": h, "loss": loss} for n, h, loss in curve]
        if request.export is not None:
            heads.switches.zero_columns([(n, h) for n, h, _ in curve])
            _export(model.mlm, source, request.export)
    return found


def _export(mlm: PreTrainedModel, source: Source, target: Path) -> None:
    """An ordinary model of transformers with its tokenizer."""
    with folder_in_progress(target) as partial:
        mlm.save_pretrained(partial)
        of_tokenizer = source.folder / BERT if source.is_checkpoint else source.folder
        for name in _TOKENIZER_FILES:
            if (of_tokenizer / name).is_file():
                shutil.copyfile(of_tokenizer / name, partial / name)
        partial.rename(target)


def table(result: dict[str, Any]) -> str:
    """Shares of the classes by layer for each model, then the heads that matter most and least."""
    lines = []
    if result["classifier"] == "network":
        counts = ", ".join(f"{number} {name}" for name, number in result["trained_on"].items() if number)
        lines += ["", f"classes by a network, trained on maps of which the rule is sure: {counts or 'none'}"]
    for name, found in result["models"].items():
        lines += ["", f"{name}: share of maps", f"{'layer':>7}" + "".join(f"{title:>21}" for title in CLASSES)]
        for layer, shares in enumerate([*found["shares_by_layer"], found["shares"]]):
            label = "all" if layer == len(found["shares_by_layer"]) else str(layer)
            lines.append(f"{label:>7}" + "".join(f"{shares[title]:>21.0%}" for title in CLASSES))
        means = {target: float(torch.tensor(v).mean()) for target, v in found["attention_to"].items()}
        lines.append("attention to " + ", ".join(f"{target} {share:.1%}" for target, share in means.items()))
    for name, similarity_by_head in result.get("similarity_to_first", {}).items():
        lines += ["", f"{name}: cosine similarity to {next(iter(result['models']))}"]
        lines += _similarity(similarity_by_head, result["weight_similarity_to_first"][name])
    if (heads := result.get("heads")) is None:
        return "\n".join(lines[1:])
    lines += ["", f"heads off ({heads['how']}): loss with all heads {heads['loss']:.4f} nats per masked token"]
    if "increase" in heads:
        order = sorted((x, n, h) for n, layer in enumerate(heads["increase"]) for h, x in enumerate(layer))
        few = listed_heads(len(order))
        for label, chosen in (("least", order[:few]), ("most", order[::-1][:few])):
            lines.append(f"missed {label}: " + ", ".join(f"layer {n} head {h} {x:+.4f}" for x, n, h in chosen))
        each = ", ".join(f"layer {n} {x:+.4f}" for n, x in enumerate(heads["increase_without_layer"]))
        lines.append(f"without all heads of a layer: {each}")
        lines.append(f"{sum(x < 0 for x, *_ in order)} of {len(order)} heads: the loss is lower without them")
        if heads["rank_correlation"] is not None:
            lines.append(f"rank correlation with importance by gradient: {heads['rank_correlation']:.2f}")
    for number, entry in enumerate(heads.get("pruning", ()), 1):
        lines.append(f"{number:>4} off: layer {entry['layer']} head {entry['head']}, loss {entry['loss']:.4f}")
    return "\n".join(lines[1:])


def _similarity(maps: list[list[float]] | None, weights: list[dict[str, float]] | None) -> list[str]:
    """By layer: mean over heads and the head that differs most; matrices as one vector and the one that differs most.
    Layers that share their weights have one line of weights."""
    if maps is None:
        return ["  not compared: other numbers of layers or heads"]
    lines = []
    for n, heads in enumerate(maps):
        low = min(range(len(heads)), key=heads.__getitem__)
        line = f"{n:>7}  maps {sum(heads) / len(heads):.3f}, lowest {heads[low]:.3f} (head {low})"
        if weights is not None and n < len(weights):
            matrices = {name: value for name, value in weights[n].items() if name != "all"}
            lowest = min(matrices, key=matrices.__getitem__)
            line += f"; weights {weights[n]['all']:.4f}, lowest {matrices[lowest]:.4f} ({lowest})"
        lines.append(line)
    return lines
