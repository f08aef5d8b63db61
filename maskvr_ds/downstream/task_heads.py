"""`maskvr attention --task`: the score of fine-tuned models without each attention head, and without each layer's.

Heads are switched off one at a time, without training on (Kovaleva et al. 2019, arXiv:1908.08593, section 4.4). All
scores are on the task's evaluation set; intervals are those of a paired bootstrap over its examples and the models
(`comparison.changes`). As the best of many heads looks better than it is, one is also chosen on every other example and
judged on the rest. One process.

N applications of a layer, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from maskvr_ds.analysis.attention.heads import How, Switches, listed_heads, maps_of, prune, rank_correlation
from maskvr_ds.analysis.attention.picture import draw_changes
from maskvr_ds.analysis.health.probe import use_eager_attention
from maskvr_ds.config import ConfigError
from maskvr_ds.downstream.baselines import targets
from maskvr_ds.downstream.command import MODEL
from maskvr_ds.downstream.comparison import changes
from maskvr_ds.downstream.encoding import Encoded, encoded, prediction
from maskvr_ds.downstream.examples import Split, TaskData
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.metrics import score
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.protocol import Protocol
from maskvr_ds.downstream.tasks import Kind, Task, TaskError
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import folder_in_progress

_BATCH = 32
_IGNORED = -100


@dataclass(frozen=True)
class TaskRequest:
    """data: folder as of `maskvr finetune`. how: what a head gives that is off. examples: maximum number, None for all
    of the evaluation set; of several sets the first is read. max_length: in tokens, None: the task's. prune, export,
    plot: as for a corpus."""

    task: Task
    data: Path
    how: How = "zero"
    examples: int | None = None
    max_length: int | None = None
    prune: int = 0
    export: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """predictions: in the form of `baselines.targets`. loss: the model's own, mean over examples, or tagged tokens."""

    predictions: list[Any]
    loss: float


class TaskHeads:
    """The heads of a fine-tuned model on the examples of a split.

    shape: N, H. Raises TaskError if the model does not fit the task, ValueError for an architecture without attention
    weights.
    """

    def __init__(self, encoder: Encoder, data: TaskData, split: Split, max_length: int) -> None:
        self.labels, self.kind = data.labels, data.task.kind
        model = encoder.load_fine_tuned(self.kind, self.labels)
        use_eager_attention(model)
        self.model = model.to(distributed.device())
        found = encoded(encoder, data.task, self.labels, split, max_length, None, labelled=True)
        assert isinstance(found, Encoded)
        self._examples = found
        # By length: batches with little padding.
        self._order = sorted(range(len(found)), key=lambda i: len(found.items[i]["input_ids"]))
        collator = DataCollatorForTokenClassification if self.kind is Kind.TOKENS else DataCollatorWithPadding
        self._collate = collator(encoder.tokenizer)
        (first,) = self._batches(1, self._order[:1])
        maps = maps_of(self.model, {key: value for key, value in first.items() if key != "labels"})
        self.shape = (maps.shape[0], maps.shape[2])
        self.switches = Switches(self.model, self.shape)

    def _batches(self, size: int, order: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        items = [self._examples.items[i] for i in order]
        device = next(self.model.parameters()).device
        loader: DataLoader[dict[str, torch.Tensor]]
        loader = DataLoader(items, batch_size=size, collate_fn=self._collate)  # type: ignore[arg-type]
        return [{key: value.to(device) for key, value in batch.items()} for batch in loader]

    @torch.no_grad()
    def outcome(self, off: torch.Tensor | None = None, how: How = "zero") -> Outcome:
        """With the heads off that are true in bool [N, H]; None: with all heads."""
        if off is not None:
            with self.switches.switched_off(off, how):
                return self.outcome()
        output: list[Any] = [None] * len(self._order)
        total, count, place = 0.0, 0, 0
        for batch in self._batches(_BATCH, self._order):
            found = self.model(**batch)
            judged = int((batch["labels"] != _IGNORED).sum()) if self.kind is Kind.TOKENS else len(batch["labels"])
            # A batch of empty sentences has no tagged token, and a loss that is not a number.
            total, count = total + (float(found.loss) * judged if judged else 0.0), count + judged
            for row in found.logits.float().cpu().numpy():
                i = self._order[place]
                output[i] = prediction(row, self._examples, self.labels, i)
                place += 1
        return Outcome(output, total / max(count, 1))

    def importance(self) -> torch.Tensor:
        """Mean over examples of |∂ℓ/∂ξ| at ξ = 1, ξ the head's gate (Michel et al. 2019, arXiv:1905.10650, equation 2):
        float64 [N, H]."""
        found = torch.zeros(self.shape, dtype=torch.float64)
        for example in self._batches(1, self._order):
            if bool((example["labels"] == _IGNORED).all()):
                continue
            gates = torch.ones(self.shape, requires_grad=True)
            with self.switches.gated(gates), torch.enable_grad():
                (gradient,) = torch.autograd.grad(self.model(**example).loss, gates)
            found += gradient.abs().double()
        return found / len(self._order)


def run(models: Sequence[str], request: TaskRequest) -> dict[str, Any]:
    """Measure; returns the figures for JSON.

    models: of one task, for example of several seeds. Raises TaskError for a model or a file that does not fit, or
    models with other numbers of heads; ConfigError if the folder for the export exists.
    """
    task = request.task
    if task.kind is Kind.SPAN:
        raise TaskError(f"{task.name}: heads are judged on classification, regression and token tasks, not questions")
    if request.export is not None and request.export.exists():
        raise ConfigError(f"--export-pruned {request.export}: exists; choose a new folder")
    length = request.max_length or Protocol().settings(task).max_length
    data = read_task(task, request.data)
    name, split = next(iter(data.dev.items()))
    split = split.subset(range(min(len(split), request.examples or len(split))))
    with prepared([_folder(model) for model in models], {task.kind: length}) as encoders:
        heads = [TaskHeads(encoder, data, split, length) for encoder in encoders]
        for model, found in zip(models, heads, strict=True):
            if found.shape != heads[0].shape:
                raise TaskError(f"{model}: has {found.shape} layers and heads, {models[0]} {heads[0].shape}")
        result = _measure(dict(zip(models, heads, strict=True)), data, split, request)
        result["set"] = name
        if request.prune:
            result["pruning"] = _prune(heads[0], encoders[0], targets(task, data.labels, split), request)
    if request.plot is not None:
        draw_changes(result["without"], f"change of {task.metrics[0]} without the head", request.plot)
    return result


def _folder(model: str) -> str:
    """The model in the output folder of `maskvr finetune`, or the folder given."""
    return str(Path(model) / MODEL) if (Path(model) / MODEL / "config.json").is_file() else model


def _measure(models: dict[str, TaskHeads], data: TaskData, split: Split, request: TaskRequest) -> dict[str, Any]:
    metric, truth = data.task.metrics[0], targets(data.task, data.labels, split)
    layers, width = next(iter(models.values())).shape
    none = torch.zeros(layers, width, dtype=torch.bool)
    single = [
        none.clone().index_put((torch.tensor(n), torch.tensor(h)), torch.tensor(True))
        for n in range(layers)
        for h in range(width)
    ]
    whole = [none.clone().index_fill(0, torch.tensor(n), True) for n in range(layers)]
    base = [heads.outcome() for heads in models.values()]
    off = [[heads.outcome(chosen, request.how) for heads in models.values()] for chosen in (*single, *whole)]
    figures: dict[str, Any] = {}
    for m, (name, heads) in enumerate(models.items()):
        losses = torch.tensor([outcomes[m].loss - base[m].loss for outcomes in off], dtype=torch.float64)
        scores = torch.tensor([score(metric, truth, outcomes[m].predictions) for outcomes in off], dtype=torch.float64)
        of_heads, importance = slice(0, layers * width), heads.importance()
        reference = score(metric, truth, base[m].predictions)
        figures[name] = {
            "score": reference,
            "loss": base[m].loss,
            "score_without_head": scores[of_heads].view(layers, width).tolist(),
            "score_without_layer": scores[layers * width :].tolist(),
            "loss_increase": losses[of_heads].view(layers, width).tolist(),
            "importance": importance.tolist(),
            "rank_correlation": {
                "score": rank_correlation(importance, (reference - scores[of_heads]).view(layers, width)),
                "loss": rank_correlation(importance, losses[of_heads].view(layers, width)),
            },
        }
    predictions = [[outcome.predictions for outcome in outcomes] for outcomes in off]
    found = changes(metric, truth, before := [outcome.predictions for outcome in base], predictions)
    return {
        "task": data.task.name,
        "examples": len(split),
        "metric": metric,
        "how": request.how,
        "models": figures,
        "without": [found[n * width : (n + 1) * width] for n in range(layers)],
        "without_layer": found[layers * width :],
        "chosen_on_half": _chosen_on_half(metric, truth, before, predictions[: layers * width], width),
    }


def _chosen_on_half(
    metric: str, truth: list[Any], before: list[list[Any]], after: list[list[list[Any]]], width: int
) -> dict[str, Any] | None:
    """The head without which the mean score is highest on every other example, judged on the rest; None for fewer than
    four examples."""
    if len(truth) < 4:
        return None
    means = [sum(score(metric, truth[::2], run[::2]) for run in runs) for runs in after]
    best = max(range(len(after)), key=means.__getitem__)
    rest = [[run[1::2] for run in runs] for runs in (before, after[best])]
    ((difference, low, high),) = changes(metric, truth[1::2], rest[0], [rest[1]])
    n, h = divmod(best, width)
    return {"layer": n, "head": h, "examples": len(truth[1::2]), "difference": difference, "low": low, "high": high}


def _prune(heads: TaskHeads, encoder: Encoder, truth: list[Any], request: TaskRequest) -> list[dict[str, Any]]:
    """Of the first model, by its loss: layer, head, loss and score after each."""
    curve = prune(lambda off: heads.outcome(off, request.how).loss, heads.shape, request.prune)
    off, found = torch.zeros(heads.shape, dtype=torch.bool), []
    for n, h, loss in curve:
        off[n, h] = True
        reached = score(request.task.metrics[0], truth, heads.outcome(off, request.how).predictions)
        found.append({"layer": n, "head": h, "loss": loss, "score": reached})
    if request.export is not None:
        heads.switches.zero_columns([(n, h) for n, h, _ in curve])
        with folder_in_progress(request.export) as partial_folder:
            heads.model.save_pretrained(partial_folder)
            encoder.tokenizer.save_pretrained(partial_folder)
            partial_folder.rename(request.export)
    return found


def table(result: dict[str, Any]) -> str:
    """Scores of the models, the heads that are missed least and most, layers, and the cheap estimate."""
    metric, without = result["metric"], result["without"]
    lines = [f"{result['task']}, {result['set']} set: {result['examples']:,} examples; heads off: {result['how']}", ""]
    for name, found in result["models"].items():
        cheap = ", ".join(
            f"{key} {'–' if value is None else f'{value:.2f}'}" for key, value in found["rank_correlation"].items()
        )
        lines.append(f"{name}: {metric} {found['score']:.4f}, loss {found['loss']:.4f}")
        lines.append(f"  rank correlation of importance by gradient with the effect of a head on the {cheap}")
    of = f" (mean of {len(result['models'])} models)" if len(result["models"]) > 1 else ""
    lines += ["", f"change of {metric} without a head{of}, with its 95% interval"]
    order = sorted(((*c, n, h) for n, layer in enumerate(without) for h, c in enumerate(layer)), reverse=True)
    few = listed_heads(len(order))
    for label, chosen in (("missed least", order[:few]), ("missed most", order[::-1][:few])):
        lines += [f"  {label}: layer {n} head {h}  {_change(change)}" for *change, n, h in chosen]
    better, worse = sum(low > 0 for _, low, *_ in order), sum(high < 0 for _, _, high, *_ in order)
    lines.append(
        f"  {better} of {len(order)} heads: better without, beyond the interval (by chance {0.025 * len(order):.1f}); "
        f"{worse}: worse"
    )
    if (choice := result["chosen_on_half"]) is not None:
        change = choice["difference"], choice["low"], choice["high"]
        lines.append(
            f"  head chosen on every other example: layer {choice['layer']} head {choice['head']}; on the other "
            f"{choice['examples']:,} {_change(change)}"
        )
    lines.append(f"change of {metric} without all heads of a layer{of}")
    lines += [f"  layer {n}  {_change(change)}" for n, change in enumerate(result["without_layer"])]
    for number, entry in enumerate(result.get("pruning", ()), 1):
        lines.append(
            f"{number:>4} off: layer {entry['layer']} head {entry['head']}, {metric} {entry['score']:.4f}, "
            f"loss {entry['loss']:.4f}"
        )
    return "\n".join(lines)


def _change(change: Sequence[float]) -> str:
    mean, low, high = change
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
