"""Cost of reaching any architecture's head by a hook, against calling encoder and head by hand.

    python docs/experiments/adapter_cost.py --output RESULT.json

One process, one thread, fp32: forward and backward passes of BERT-mini (4 layers, hidden size 256), one row
of 128 tokens with 19 predictions, 30,522 tokens, in pairs whose order alternates. The same module computes both: once
through `MaskedLanguageModel`, once as encoder, gather, head and cross-entropy written out, without the hook. Losses
and gradients must be equal to the bit. CPU seconds (process time), not wall-clock time: ratio of each pair, their
median, and a 95% interval by bootstrap over pairs. A larger batch only makes the hook's share smaller.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BertConfig

from maskvr_ds.models.encoder import MaskedLanguageModel

ROWS, LENGTH, PREDICTIONS, VOCABULARY = 1, 128, 19, 30_522
SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
WARM_UP, RESAMPLES = 10, 10_000


def seconds(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
    """CPU seconds of a forward and backward pass; gradients accumulate nowhere."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    step().mean().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=1200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    adapter = MaskedLanguageModel(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model = adapter.mlm
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    positions = torch.stack([torch.randperm(LENGTH)[:PREDICTIONS] for _ in range(ROWS)])
    labels = torch.randint(VOCABULARY, (ROWS, PREDICTIONS))

    def hooked() -> torch.Tensor:
        losses: torch.Tensor = adapter(ids, positions, labels)
        return losses

    hooks = model.base_model._forward_hooks
    saved = dict(hooks)

    def by_hand() -> torch.Tensor:
        hooks.clear()
        last = model.bert(input_ids=ids)[0]
        logits = model.cls(last.gather(1, positions[..., None].expand(-1, -1, last.shape[-1])))
        hooks.update(saved)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")

    found = []
    for step in (hooked, by_hand):
        seconds(step, model)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([step().detach().flatten(), *gradients])
    assert len(found[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "not the same computation"

    times = np.empty((arguments.pairs, 2))
    for pair in range(-WARM_UP, arguments.pairs):
        order = (hooked, by_hand) if pair % 2 else (by_hand, hooked)
        both = {step: seconds(step, model) for step in order}
        if pair >= 0:
            times[pair] = both[hooked], both[by_hand]
    ratios = times[:, 0] / times[:, 1]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    result = {
        "pairs": arguments.pairs,
        "seconds": {"adapter": statistics.median(times[:, 0]), "by hand": statistics.median(times[:, 1])},
        "ratio": {"median": float(np.median(ratios)), "interval": [float(low), float(high)]},
        "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
