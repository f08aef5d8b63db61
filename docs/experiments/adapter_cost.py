"""Cost of reaching any architecture's head by a hook, against calling encoder and head by hand.

    python docs/experiments/adapter_cost.py --output RESULT.json

One process, one thread, fp32: forward and backward passes of one row of 128 tokens with 19 predictions, in pairs whose
order alternates. The same module computes both: once through `MaskedLanguageModel`, once as encoder, gather, head and
cross-entropy written out, without the hook. Losses and gradients must be equal to the bit. CPU seconds (process time),
not wall-clock time, because the machine may be shared. Two models: BERT-mini with 30,522 tokens, for the ratio, and a
tiny one that computes almost nothing, for the seconds that the hook adds, which no size of model or batch changes.
Medians over pairs, 95% intervals by bootstrap over pairs.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import BertConfig

from maskvr_ds.models.encoder import MaskedLanguageModel

LENGTH, PREDICTIONS = 128, 19
MODELS: dict[str, dict[str, int]] = {
    "mini": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 30_522,
    },
    "tiny": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 100,
    },
}
WARM_UP, RESAMPLES = 10, 10_000


def seconds(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
    """CPU seconds of a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    step().mean().backward()
    return time.process_time() - began


def measure(sizes: dict[str, int], pairs: int) -> NDArray[np.float64]:
    """Seconds [pairs, 2] of the adapter, and of the same by hand."""
    torch.manual_seed(0)
    adapter = MaskedLanguageModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model = adapter.mlm
    ids = torch.randint(sizes["vocab_size"], (1, LENGTH))
    positions = torch.randperm(LENGTH)[None, :PREDICTIONS]
    labels = torch.randint(sizes["vocab_size"], (1, PREDICTIONS))
    hooks = model.base_model._forward_hooks
    saved = dict(hooks)

    def hooked() -> torch.Tensor:
        losses: torch.Tensor = adapter(ids, positions, labels)
        return losses

    def by_hand() -> torch.Tensor:
        last = model.bert(input_ids=ids)[0]
        logits = model.cls(last.gather(1, positions[..., None].expand(-1, -1, last.shape[-1])))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    def timed(step: Callable[[], torch.Tensor]) -> float:
        hooks.clear()
        if step is hooked:
            hooks.update(saved)
        return seconds(step, model)

    results = []
    for step in (hooked, by_hand):
        timed(step)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([step().detach(), *gradients])
    assert len(results[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "not the same computation"

    times = np.empty((pairs, 2))
    for pair in range(-WARM_UP, pairs):
        order = (hooked, by_hand) if pair % 2 else (by_hand, hooked)
        both = {step: timed(step) for step in order}
        if pair >= 0:
            times[pair] = both[hooked], both[by_hand]
    return times


def median(values: NDArray[np.float64]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(values, len(values))) for _ in range(RESAMPLES)]
    return {"median": float(np.median(values)), "interval": np.quantile(medians, [0.025, 0.975]).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=1000, help="of BERT-mini; three times as many of the tiny model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"torch": torch.__version__}
    for name, pairs in (("tiny", 3 * arguments.pairs), ("mini", arguments.pairs)):
        times = measure(MODELS[name], pairs)
        results[name] = {
            "pairs": pairs,
            "seconds": dict(zip(("adapter", "by hand"), np.median(times, axis=0).tolist(), strict=True)),
            "ratio": median(times[:, 0] / times[:, 1]),
            "difference": median(times[:, 0] - times[:, 1]),
        }
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
