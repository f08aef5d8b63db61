"""CPU-seconds and FLOPs of a training step with and without late mask tokens, at two rates, alternating in one process.

A step is masks, forward and backward pass, AdamW; random tokens, one thread, no dropout.

    python docs/experiments/late_mask_costs.py --layers 12 --hidden 384 --rounds 6
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import BertConfig

from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.models.losses import weighted_loss

VOCABULARY, LENGTH, ROWS, SPECIAL, MASK = 8192, 128, 16, (0, 1, 2, 3, 4), 4
RATES = (0.15, 0.3)


class Case:
    """A model that is trained at one rate; `step` takes one step and returns its CPU-seconds."""

    def __init__(self, config: BertConfig, rate: float, layer: int) -> None:
        late = LateMasks(layer, MASK, round((LENGTH - 2) * rate)) if layer else None
        self.masker = Masker(
            vocab_size=VOCABULARY,
            mask_id=MASK,
            special_ids=SPECIAL,
            sequence_length=LENGTH,
            seed=0,
            rate=rate,
            corruption=Corruption(1.0, 0.0),
        )
        self.module = MaskedLanguageModel(config, late=late).train()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        most = self.masker.maximum_predictions
        self.flops = flops_per_sequence(config, LENGTH, most, batch=ROWS, late=late)

    def step(self, batch: TokenBatch) -> float:
        started = time.process_time()
        masked = self.masker(batch)
        (weighted_loss(self.module, masked) / (masked.weights != 0).sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def tokens(number: int) -> TokenBatch:
    ids = torch.randint(len(SPECIAL), VOCABULARY, (ROWS, LENGTH)).to(torch.uint16)
    ids[:, 0], ids[:, -1] = 2, 3
    return TokenBatch(ids, torch.arange(ROWS) + ROWS * number, torch.zeros(ROWS, dtype=torch.int64))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64 (default: 256)")
    parser.add_argument("--rounds", type=int, default=8, help="after one that is not counted (default: 8)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, hidden = arguments.layers, arguments.hidden
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=n,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        attn_implementation="sdpa",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    cases = {(rate, layer): Case(config, rate, layer) for rate in RATES for layer in (0, n // 2, n * 2 // 3)}
    times: dict[tuple[float, int], list[float]] = {key: [] for key in cases}
    for number in range(arguments.rounds + 1):
        batch, order = tokens(number), list(cases)
        first = number % len(order)
        for key in order[first:] + order[:first]:
            times[key].append(cases[key].step(batch))
    base = statistics.median(times[RATES[0], 0][1:])
    print("rate, late_layer: CPU-seconds of a step, minimum / median / maximum; median and FLOPs relative to the first")
    for (rate, layer), seconds in times.items():
        low, middle, high = min(seconds[1:]), statistics.median(seconds[1:]), max(seconds[1:])
        flops = cases[rate, layer].flops / cases[RATES[0], 0].flops
        print(f"{rate:g}, {layer}: {low:.3f} / {middle:.3f} / {high:.3f}; {middle / base:.3f}, {flops:.3f}")


if __name__ == "__main__":
    main()
