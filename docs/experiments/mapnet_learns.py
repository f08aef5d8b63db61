"""Does MAPNet learn what it should? Trains a small BERT, freezes it, trains MAPNet on it, compares on held-out rows.

    python docs/experiments/mapnet_learns.py --corpus CORPUS [--bert-steps 1500] [--mapnet-steps 1500]

CORPUS as `maskvr demo` builds it, with held-out rows. The reference is √E[s² | x] of every maskable position, from 64
uniform masks of the row; printed for MAPNet (both objectives) and for token frequency alone (−log of the training
corpus' counts): rank correlation with it over all positions, and E[u s²] / E[s²] of the proposal at the floor λ
(smaller is better; the least at this floor is that of the reference itself).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.batch import MaskedBatch, TokenBatch
from maskvr_ds.config import MapNetConfig, ModelConfig
from maskvr_ds.gradient_norm import GradientNorms
from maskvr_ds.loader import Loader, read_rows, to_device
from maskvr_ds.mapnet import inclusion_from_scores
from maskvr_ds.masking import Masker
from maskvr_ds.model import MaskedLanguageModel, bert_config, weighted_loss
from maskvr_ds.proposer import Proposer
from maskvr_ds.strategies import Parameters

CPU = torch.device("cpu")
MASKS, FLOOR = 64, 0.3


def train_bert(corpus: Corpus, masker: Masker, steps: int) -> MaskedLanguageModel:
    torch.manual_seed(0)
    section = ModelConfig(num_hidden_layers=3, hidden_size=128, num_attention_heads=4, max_position_embeddings=64)
    manifest = corpus.manifest
    model = MaskedLanguageModel(
        bert_config(section, vocab_size=manifest.vocab_size, pad_id=manifest.special_tokens.pad)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = Loader(corpus, seed=0, global_size=48, device=CPU).batches()
    mean = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - 0.9 * step / steps)
        masked = masker(next(batches))
        loss = weighted_loss(model, masked) / (masked.weights != 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean += (loss.item() - mean) * max(0.02, 1 / (step + 1))
        if step % 250 == 0 or step == steps - 1:
            print(f"BERT step {step + 1}: loss {mean:.3f}", flush=True)
    return model.eval().requires_grad_(False)


def read_norms(model: MaskedLanguageModel, masked: MaskedBatch, norms: GradientNorms) -> None:
    """Have `norms` read s of the frozen model: a backward pass of the head alone."""
    hidden = model.hidden(masked.input_ids, masked.positions).requires_grad_()
    logits = model.mlm.cls(hidden)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), masked.labels.flatten(), reduction="none")
    losses = losses.view_as(masked.labels)
    norms.watch(hidden, losses)
    (losses * masked.weights).sum().backward()


def reference(model: MaskedLanguageModel, batch: TokenBatch, maskers: list[Masker]) -> tuple[np.ndarray, np.ndarray]:
    """√E[s²] [B, L] and from how many masks, of uniform masks."""
    total, times = torch.zeros(batch.input_ids.shape), torch.zeros(batch.input_ids.shape)
    norms = GradientNorms()
    for masker in maskers:
        masked = masker(batch)
        read_norms(model, masked, norms)
        total.scatter_add_(1, masked.positions, norms.take().square())
        times.scatter_add_(1, masked.positions, (masked.weights != 0).float())
    return (total / times.clamp(min=1)).sqrt().numpy(), times.numpy()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks_of_a, ranks_of_b = (np.argsort(np.argsort(x, kind="stable")) for x in (a, b))
    return float(np.corrcoef(ranks_of_a, ranks_of_b)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--bert-steps", type=int, default=1500)
    parser.add_argument("--mapnet-steps", type=int, default=1500)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    corpus, held_out = Corpus(arguments.corpus), Corpus(arguments.corpus / "held_out")

    def masker(seed: int) -> Masker:
        return Masker.for_corpus(corpus.manifest, seed=seed)

    model = train_bert(corpus, masker(1), arguments.bert_steps)
    rows = np.arange(min(192, held_out.rows))
    test = to_device(read_rows(held_out, rows, np.zeros_like(rows)), CPU)
    root, times = reference(model, test, [masker(1000 + i) for i in range(MASKS)])
    maskable = masker(0).maskable(test)
    seen = torch.from_numpy(times > 0) & maskable
    counts = (maskable.sum(1) * 0.15).round().long().clamp(min=1)
    share = (counts / maskable.sum(1))[:, None]

    def judge(name: str, scores: torch.Tensor) -> dict[str, float | str]:
        pi = inclusion_from_scores(scores, maskable, counts, FLOOR)
        second = torch.from_numpy(root).double().square()
        ratio = (share / pi * second)[seen].sum() / second[seen].sum()
        correlation = rank_correlation(scores[seen].numpy(), root[seen.numpy()])
        line: dict[str, float | str] = {
            "proposal": name,
            "rank_correlation": correlation,
            "second_moment": ratio.item(),
        }
        print(json.dumps(line), flush=True)
        return line

    frequency = np.ones(corpus.manifest.vocab_size)
    for shard in range(len(corpus.manifest.shards)):
        frequency += np.bincount(corpus.input_ids(shard).ravel(), minlength=len(frequency))
    of_tokens = torch.from_numpy(-np.log(frequency))[test.input_ids.long()]
    lines = [judge("reference", torch.from_numpy(root).double().clamp(min=1e-6).log())]
    lines += [judge(f"token frequency^-{power:g}", power * of_tokens) for power in (0.1, 0.3)]
    for objective in ("variance", "regression"):
        config = MapNetConfig.model_validate({"floor": FLOOR, "objective": objective})
        proposer = Proposer(config, vocab_size=len(frequency), max_length=64, seed=3, device=CPU)
        proposing = Masker.for_corpus(
            corpus.manifest, seed=2, strategy="mapnet", parameters=Parameters(proposal=proposer.propose)
        )
        batches = Loader(corpus, seed=5, global_size=48, device=CPU).batches()
        begun = time.monotonic()
        for step in range(arguments.mapnet_steps):
            batch = next(batches)
            masked = proposing(batch)
            read_norms(model, masked, proposer.norms)
            proposer.observe(batch, proposing.maskable(batch), masked)
            figures = proposer.step().values()
            if step % 500 == 499:
                print(f"{objective} step {step + 1}: {time.monotonic() - begun:.0f} s, {figures}", flush=True)
                with torch.no_grad():
                    scores = proposer.net(test.input_ids.long()).double()
                line = judge(f"MAPNet, {objective}, {step + 1} steps", scores)
        lines.append(line)
    if arguments.output is not None:
        arguments.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
