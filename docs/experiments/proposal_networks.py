"""Comparison of proposal networks, trained side by side on a frozen BERT and evaluated on held-out rows.

    python docs/experiments/proposal_networks.py --checkpoint RUN_OR_CHECKPOINT --corpus CORPUS --output networks.jsonl

CORPUS must have held-out rows. All networks see the same rows and the same targets (s of uniform masks,
masking/gradient_norms.py), from one forward pass of BERT and a backward pass of its head. The objective is `variance`
(masking/mapnet.py) unless stated otherwise, the optimizer that of masking/proposer.py. The reference is √E[s² | x] of
every maskable position from 64 uniform masks. Prints every --every steps: the rank correlation with the reference, the
second moment E[u s²] / E[s²] at the floor λ, and its reduction as a share of the reference's reduction; also for the
exponential moving average of the network's parameters.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data_pipeline.shards import Corpus
from maskvr_ds.checkpoint.export import load_model
from maskvr_ds.checkpoint.load import read_extra
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import Loader, read_rows, to_device
from maskvr_ds.masking.gradient_norms import GradientNorms
from maskvr_ds.masking.mapnet import OBJECTIVES, MapNet, inclusion_from_scores
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.run_folder.checkpoints import newest
from maskvr_ds.run_folder.layout import MAPNET_STATE

CPU = torch.device("cpu")
MASKS, FLOOR, ROWS = 64, 0.3, 48
_AVERAGE = 0.995


class Candidate(nn.Module):
    """MapNet with parts removed or added. words: BERT's embeddings [V, H], added to its own."""

    def __init__(
        self, net: MapNet, words: torch.Tensor | None = None, neighbours: bool = True, product: bool = True
    ) -> None:
        super().__init__()
        hidden = net.score.in_features
        self.net, self.neighbours, self.product = net, neighbours, product
        self.words = None if words is None else F.layer_norm(words.detach(), words.shape[1:])
        self.map = None if words is None else nn.Linear(words.shape[1], hidden)
        if not product:
            net.confront = nn.Linear(2 * hidden, hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        net = self.net
        e = x = net.tokens(ids)
        if self.map is not None and self.words is not None:
            e = x = e + self.map(self.words[ids])
        if self.neighbours:
            c = F.gelu(net.expected(e))
            x = net.confront(torch.cat([e, c, e * c] if self.product else [e, c], -1))
        x = x + net.positions.weight[: ids.shape[1]]
        for layer in net.layers:
            x = layer(x, None)
        return net.score(net.norm(x)).squeeze(-1)


class Learner:
    """A network with its optimizer, objective and averaged parameters."""

    def __init__(self, name: str, make: Callable[[], nn.Module], objective: str = "variance") -> None:
        torch.manual_seed(3)
        self.name, self.net, self.objective = name, make(), OBJECTIVES[objective]
        self.average = copy.deepcopy(self.net)
        # As in proposer.py.
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)

    def step(self, batch: TokenBatch, maskable: torch.Tensor, masked: MaskedBatch, s: torch.Tensor) -> None:
        used = masked.weights != 0
        counts = used.sum(1)
        scores = self.net(batch.input_ids.long()).double()
        inclusion = inclusion_from_scores(scores, maskable, counts, FLOOR)
        u = (counts.double() / maskable.sum(1))[:, None] / inclusion
        mean = s[used].mean()
        loss = self.objective.loss(
            scores.gather(1, masked.positions), used.double(), u.gather(1, masked.positions), s.double(), mean
        )
        self.optimizer.zero_grad()
        (loss / used.sum() / mean**self.objective.degree).backward()
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 1 - _AVERAGE)


def read_norms(model: MaskedLanguageModel, masked: MaskedBatch) -> torch.Tensor:
    """s of a frozen model, float32 [B, K]: a backward pass of the head alone."""
    norms = GradientNorms()
    model.observer = norms.watch
    with model.head_alone():
        losses = model(masked.input_ids, masked.positions, masked.labels)
    (losses * masked.weights).sum().backward()
    return norms.take()


def reference(
    model: MaskedLanguageModel, batch: TokenBatch, maskers: list[Masker]
) -> tuple[torch.Tensor, torch.Tensor]:
    """√E[s²] float32 [B, L], and the number of masks it is estimated from."""
    total, times = torch.zeros(batch.input_ids.shape), torch.zeros(batch.input_ids.shape)
    for masker in maskers:
        masked = masker(batch)
        total.scatter_add_(1, masked.positions, read_norms(model, masked).square())
        times.scatter_add_(1, masked.positions, (masked.weights != 0).float())
    return (total / times.clamp(min=1)).sqrt(), times


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    first, second = (np.argsort(np.argsort(x, kind="stable")) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    corpus, held_out = Corpus(arguments.corpus), Corpus(arguments.corpus / "held_out")
    folder = newest(arguments.checkpoint)
    mlm = load_model(folder)
    model = MaskedLanguageModel(mlm)
    model.eval().requires_grad_(False)
    V, L = corpus.manifest.vocab_size, corpus.sequence_length

    def masker(seed: int) -> Masker:
        return Masker.for_corpus(corpus.manifest, seed=seed)

    rows = np.arange(min(192, held_out.rows))
    test = to_device(read_rows(held_out, rows, np.zeros_like(rows)), CPU)
    root, times = reference(model, test, [masker(1000 + i) for i in range(MASKS)])
    maskable = masker(0).maskable(test)
    seen = (times > 0) & maskable
    counts = (maskable.sum(1) * 0.15).round().long().clamp(min=1)
    share = (counts / maskable.sum(1))[:, None]

    def second_moment(scores: torch.Tensor) -> float:
        pi = inclusion_from_scores(scores.double(), maskable, counts, FLOOR)
        second = root.double().square()
        return ((share / pi * second)[seen].sum() / second[seen].sum()).item()

    best = second_moment(root.clamp(min=1e-6).log())

    def judge(name: str, net: nn.Module, step: int) -> dict[str, str | float]:
        with torch.no_grad():
            scores = net(test.input_ids.long())
        second = second_moment(scores)
        line: dict[str, str | float] = {
            "network": name,
            "step": step,
            "rank_correlation": round(rank_correlation(scores[seen].numpy(), root[seen].numpy()), 4),
            "second_moment": round(second, 4),
            "share": round((1 - second) / (1 - best), 3),
        }
        print(json.dumps(line), flush=True)
        return line

    words = mlm.get_input_embeddings().weight

    def mapnet(layers: int = 1, reach: int = 4) -> MapNet:
        return MapNet(vocab_size=V, max_length=L, layers=layers, hidden=96, reach=reach)

    made: dict[str, Callable[[], nn.Module]] = {
        "MAPNet": mapnet,
        "no neighbours, 2 layers": lambda: Candidate(mapnet(layers=2), neighbours=False),
        "token alone": lambda: Candidate(mapnet(layers=0), neighbours=False),
        "no layers": lambda: Candidate(mapnet(layers=0)),
        "no product": lambda: Candidate(mapnet(), product=False),
        "2 neighbours on either side": lambda: mapnet(reach=2),
        "8 neighbours on either side": lambda: mapnet(reach=8),
        "BERT's embeddings": lambda: Candidate(mapnet(), words),
    }
    learners = [Learner(name, make) for name, make in made.items()]
    learners.append(Learner("MAPNet, objective regression", mapnet, "regression"))
    batches = Loader(corpus, seed=5, global_size=ROWS, device=CPU).batches()
    draw = masker(2)
    lines: list[dict[str, str | float]] = [{"network": "reference", "second_moment": round(best, 4), "share": 1}]
    if state := read_extra(folder, MAPNET_STATE):
        # The run's own network, trained together with this BERT.
        positions = len(state["parameters.positions.weight"])
        own = MapNet(vocab_size=V, max_length=positions, layers=1, hidden=96, reach=4)
        own.load_state_dict({name: state[f"parameters.{name}"] for name, _ in own.named_parameters()})
        lines.append(judge("MAPNet as it learnt in training", own, -1))
    for step in range(1, arguments.steps + 1):
        batch = next(batches)
        masked = draw(batch)
        s = read_norms(model, masked)
        for learner in learners:
            learner.step(batch, draw.maskable(batch), masked, s)
        if step % arguments.every == 0:
            for learner in learners:
                lines.append(judge(learner.name, learner.net, step))
                lines.append(judge(f"{learner.name}, averaged", learner.average, step))
            arguments.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
