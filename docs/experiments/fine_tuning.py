"""Fine-tuning by `maskvr evaluate`, by transformers' Trainer alone, and by a loop of plain PyTorch.

    python docs/experiments/fine_tuning.py MODEL --data glue --task sst2 --output RESULT.json

The same examples, head, order of the data, learning rate, schedule and seed three times, taking turns in one process:
scores per seed, the share of equal predictions, and CPU-seconds, each from tokenising to the last prediction. The loop
shares no code with the other two beyond the reading of the files, and transformers' model and tokenizer.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from maskvr_ds.downstream.examples import Split, limited
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.fine_tuning import Settings, fine_tune
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.tasks import GLUE, Kind

EPOCHS, BATCH, PREDICTION_BATCH = 3, 32, 64


class Case:
    """A task's examples, and what all three ways are given. Predictions are label ids of the evaluation set."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        data = limited(read_task(GLUE[arguments.task], arguments.data), arguments.max_train)
        self.task, self.model = GLUE[arguments.task], str(arguments.model)
        self.labels, self.train, self.dev = data.labels, data.train, data.dev["dev"]
        self.length, self.rate = arguments.max_length, arguments.learning_rate
        self.truth = self.ids(self.dev)

    def ids(self, split: Split) -> list[int]:
        return [self.labels.index(str(label)) for label in split.labels]

    def tokenised(self, tokenizer: Any, split: Split) -> list[dict[str, list[int]]]:
        columns = list(zip(*split.texts, strict=True))
        found = tokenizer(*(list(column) for column in columns), truncation=True, max_length=self.length)
        return [{key: found[key][i] for key in found} for i in range(len(split))]


def by_maskvr(case: Case, encoder: Encoder, seed: int) -> list[int]:
    outcome = fine_tune(
        encoder, case.task, case.labels, case.train, {"dev": case.dev},
        Settings(EPOCHS, BATCH, case.length, "fp32"), learning_rate=case.rate, seed=seed,
    )  # fmt: skip
    return outcome.predictions["dev"]


def by_trainer(case: Case, encoder: Encoder, seed: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    rows = case.tokenised(tokenizer, case.train)
    train = [row | {"labels": label} for row, label in zip(rows, case.ids(case.train), strict=True)]
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder.folder, num_labels=len(case.labels))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=BATCH, per_device_eval_batch_size=PREDICTION_BATCH,
            num_train_epochs=EPOCHS, learning_rate=case.rate, warmup_steps=0.1, lr_scheduler_type="linear",
            weight_decay=0.01, max_grad_norm=1.0, seed=seed, use_cpu=True, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=train)
        trainer.train()
        logits = trainer.predict(case.tokenised(tokenizer, case.dev)).predictions
    return list(map(int, logits.argmax(-1)))


def by_loop(case: Case, encoder: Encoder, seed: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    train, labels = case.tokenised(tokenizer, case.train), case.ids(case.train)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder.folder, num_labels=len(case.labels))
    decayed = [p for name, p in model.named_parameters() if not name.endswith("bias") and "LayerNorm" not in name]
    others = [p for name, p in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=case.rate)
    steps = EPOCHS * math.ceil(len(train) / BATCH)
    warmup = math.ceil(0.1 * steps)

    def factor(step: int) -> float:
        return step / warmup if step < warmup else (steps - step) / (steps - warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    torch.manual_seed(seed)  # dropout
    model.train()
    for epoch in range(EPOCHS):
        # The order in which accelerate's seedable sampler draws.
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(order), BATCH):
            drawn = order[start : start + BATCH]
            inputs = tokenizer.pad([train[i] for i in drawn], return_tensors="pt")
            F.cross_entropy(model(**inputs).logits, torch.tensor([labels[i] for i in drawn])).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    rows, found = case.tokenised(tokenizer, case.dev), []
    with torch.no_grad():
        for start in range(0, len(rows), PREDICTION_BATCH):
            inputs = tokenizer.pad(rows[start : start + PREDICTION_BATCH], return_tensors="pt")
            found += model(**inputs).logits.argmax(-1).tolist()
    return found


WAYS: dict[str, Callable[[Case, Encoder, int], list[int]]] = {
    "maskvr": by_maskvr,
    "trainer": by_trainer,
    "loop": by_loop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, type=Path, help="folder with the tasks of GLUE")
    parser.add_argument("--task", default="sst2", choices=("cola", "sst2", "mrpc", "rte"))
    parser.add_argument("--max-train", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(arguments)
    runs: list[dict[str, Any]] = []
    with prepared([case.model], {Kind.CLASSIFICATION: case.length}) as (encoder,):
        for seed in range(arguments.seeds):
            names = list(WAYS)
            predictions, seconds = {}, {}
            for name in names[seed % 3 :] + names[: seed % 3]:
                began = time.process_time()
                predictions[name] = WAYS[name](case, encoder, seed)
                seconds[name] = time.process_time() - began
            runs.append({"seed": seed, "cpu_seconds": seconds})
            for measure in ("accuracy", "equal_to_maskvr"):
                other = case.truth if measure == "accuracy" else predictions["maskvr"]
                runs[-1][measure] = {
                    name: 100 * statistics.fmean(map(int.__eq__, found, other)) for name, found in predictions.items()
                }
            print(json.dumps(runs[-1]), flush=True)
    ratios = {
        name: [run["cpu_seconds"]["maskvr"] / run["cpu_seconds"][name] for run in runs] for name in ("trainer", "loop")
    }
    settings = {key: value for key, value in vars(arguments).items() if key not in ("model", "data", "output")}
    result = {
        "settings": settings | {"model": arguments.model.name, "epochs": EPOCHS, "batch_size": BATCH},
        "runs": runs,
        "cpu_seconds_of_maskvr_per": ratios,
        "largest_difference_in_points": max(abs(r["accuracy"]["maskvr"] - r["accuracy"]["loop"]) for r in runs),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({name: statistics.median(found) for name, found in ratios.items()})


if __name__ == "__main__":
    main()
