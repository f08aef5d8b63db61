"""A training step on a CPU against a plain PyTorch loop: BertForMaskedLM, logits of all positions, AdamW.

    python docs/experiments/plain_loop.py --output docs/results/plain_loop.json

In one process the plain loop and ours (masks, digests, DeepSpeed's engine, divergence guard; LAMB and AdamW) take a
step in turn, with equal rows, micro-batches, accumulation, dropout and clipping; who starts rotates from round to
round. Measured are CPU-seconds of all threads, after one step of warm-up. The file is written after every round:
started again, the program measures only what is missing in it. 20 minutes and 8 GiB for BERT-base.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Threads that wait for another one, which may have lost its core to other programs, would count as busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import BertForMaskedLM

from maskvr_ds.benchmarks.corpus import FIRST_ORDINARY, SPECIAL, VOCABULARY
from maskvr_ds.config import BatchConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.config.reliability import DivergenceConfig
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import row_digests
from maskvr_ds.engine.deepspeed_patches import gate_optimizer_step
from maskvr_ds.engine.engine import create_engine
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.reliability.divergence import Guard
from maskvr_ds.runtime import distributed
from maskvr_ds.training.step import run_step

CLIPPING, LR, RATE = 1.0, 1e-4, 0.15
# Name → (loop, optimizer).
WAYS = {
    "plain": ("plain", "adamw"),
    "plain, fused AdamW": ("plain", "fused"),
    "ours, LAMB": ("ours", "lamb"),
    "ours, AdamW": ("ours", "adamw"),
}


def plain(model: ModelConfig, optimizer: str) -> Callable[[TokenBatch, int], float]:
    """Masks by a Bernoulli draw as DataCollatorForLanguageModeling does, torch's AdamW at its defaults or fused."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(transformers_config(model, vocab_size=VOCABULARY, pad_id=SPECIAL.pad)).train()
    adamw = torch.optim.AdamW(bert.parameters(), lr=LR, fused=True if optimizer == "fused" else None)
    special = torch.tensor(SPECIAL.all)

    def step(batch: TokenBatch, micro_size: int) -> float:
        micro_batches = batch.input_ids.long().split(micro_size)
        total = 0.0
        for ids in micro_batches:
            chosen = torch.bernoulli(torch.full(ids.shape, RATE)).bool() & ~torch.isin(ids, special)
            draw = torch.rand(ids.shape)
            inputs = torch.where(chosen & (draw < 0.8), SPECIAL.mask, ids)
            inputs = torch.where(chosen & (draw >= 0.9), torch.randint(VOCABULARY, ids.shape), inputs)
            loss = bert(inputs, labels=torch.where(chosen, ids, -100)).loss / len(micro_batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(bert.parameters(), CLIPPING)
        adamw.step()
        adamw.zero_grad()
        return total

    return step


def ours(model: ModelConfig, optimizer: str, deepspeed: str, micro_size: int) -> Callable[[TokenBatch, int], float]:
    """What `maskvr train` does in a step, except for reading rows and writing metrics."""
    engine = create_engine(
        transformers_config(model, vocab_size=VOCABULARY, pad_id=SPECIAL.pad),
        read_deepspeed_config(deepspeed_config_path(deepspeed)),
        model=model,
        batch=BatchConfig(global_size=micro_size, micro_size=micro_size),
        optimizer=OptimizerConfig.model_validate({"name": optimizer, "lr": LR, "gradient_clipping": CLIPPING}),
        accumulation=1,
        seed=0,
    )
    engine.train()
    guard = Guard(DivergenceConfig(), {})
    gate_optimizer_step(engine, guard.allow_update, guard.read)
    masker: Masker | None = None
    number = 0

    def step(batch: TokenBatch, micro_size: int) -> float:
        nonlocal masker, number
        if masker is None:
            masker = Masker(
                vocab_size=VOCABULARY,
                mask_id=SPECIAL.mask,
                special_ids=SPECIAL.all,
                sequence_length=batch.input_ids.shape[1],
                seed=0,
                rate=RATE,
            )
        engine.set_train_batch_size(len(batch.sample_ids))
        result = run_step(engine, masker, batch, micro_size, guard=guard)
        number += 1
        guard.after_update(number, number, result.grad_norm, loss_scale=None)
        assert not guard.update_skipped
        return float(result.loss_sum) / int(result.counters[2])

    return step


def rows(number: int, length: int, count: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY, (count, length), generator=generator)
    ids[:, 0], ids[:, -1] = SPECIAL.cls, SPECIAL.sep
    samples = torch.arange(count) + number * count
    epochs = torch.zeros_like(samples)
    digests = row_digests(ids.numpy(), samples.numpy(), epochs.numpy(), SPECIAL.pad)
    return TokenBatch(ids.to(torch.uint16), samples, epochs, row_digests=torch.from_numpy(digests))


def measure(arguments: argparse.Namespace, rounds: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append the rounds that are missing: threads, accumulation, and by way the CPU-seconds of a step."""
    wanted = [
        (threads, accumulation)
        for threads in arguments.threads
        for accumulation in arguments.accumulation
        for _ in range(arguments.rounds - sum(_is(one, threads, accumulation) for one in rounds))
    ]
    if not wanted:
        return
    distributed.initialize()
    length, micro_size = arguments.length, arguments.micro_size
    model = ModelConfig.model_validate({"preset": arguments.preset, "max_position_embeddings": max(512, length)})
    steps: dict[str, Callable[[TokenBatch, int], float]] = {}
    for name in arguments.ways:
        loop, optimizer = WAYS[name]
        made = plain(model, optimizer) if loop == "plain" else ours(model, optimizer, arguments.deepspeed, micro_size)
        made(rows(0, length, micro_size), micro_size)  # allocates the optimizer's state
        steps[name] = made
    for number, (threads, accumulation) in enumerate(wanted, 1):
        torch.set_num_threads(threads)
        names = list(steps)
        names = names[number % len(names) :] + names[: number % len(names)]
        seconds = {}
        for name in names:
            batch = rows(number, length, micro_size * accumulation)
            start = time.process_time()
            steps[name](batch, micro_size)
            seconds[name] = time.process_time() - start
        rounds.append({"threads": threads, "accumulation": accumulation, "cpu_seconds": seconds})
        save()
        print(threads, "threads, accumulation", accumulation, {name: round(s, 2) for name, s in seconds.items()})


def _is(one: dict[str, Any], threads: int, accumulation: int) -> bool:
    return (one["threads"], one["accumulation"]) == (threads, accumulation)


def summary(rounds: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Speed relative to the baseline of the same round, > 1: faster; minimum, median and maximum."""
    found = []
    for threads, accumulation in sorted({(one["threads"], one["accumulation"]) for one in rounds}):
        chosen = [one["cpu_seconds"] for one in rounds if _is(one, threads, accumulation)]
        for name in chosen[0]:
            ratios = [seconds[baseline] / seconds[name] for seconds in chosen]
            median = statistics.median(seconds[name] for seconds in chosen)
            figures = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
            found.append(
                {"way": name, "threads": threads, "accumulation": accumulation, "cpu_seconds": median, "speed": figures}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, extended if it exists")
    parser.add_argument("--preset", default="bert-base")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-size", type=int, default=4)
    parser.add_argument("--deepspeed", default="zero1_fp32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("preset", "length", "micro_size", "deepspeed", "ways")}
    content: dict[str, Any] = {**settings, "versions": f"torch {torch.__version__}", "rounds": []}
    if arguments.output.exists():
        content = json.loads(arguments.output.read_text(encoding="utf-8"))
        if differing := [name for name, value in settings.items() if content[name] != value]:
            raise SystemExit(f"{arguments.output} was measured with another {differing[0]}; choose another --output")

    def save() -> None:
        content["summary"] = summary(content["rounds"], next(iter(settings["ways"])))
        temporary = arguments.output.with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(arguments.output)

    measure(arguments, content["rounds"], save)
    for one in content.get("summary", ()):
        print(one)


if __name__ == "__main__":
    main()
