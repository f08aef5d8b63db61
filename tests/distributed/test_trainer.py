"""Masks in transformers' Trainer: workers, ranks, accumulation, a resumed Trainer, a short last batch.

What the model reads is recorded by a hook, what it predicts by the loss; rows are recognised by their tokens.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.keys import MASKS
from maskvr_ds.data.loader import read_rows
from maskvr_ds.masking.factory import create_masker
from tests.distributed.ranks import run_ranks
from tests.support.corpora import make_corpus

pytest.importorskip("accelerate")

ROWS, LENGTH, WORDS, SEED = 45, 32, 1000, 7
# Row, epoch, and a hash of inputs and labels of the row.
Read = tuple[int, int, int]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c", rows=ROWS, length=LENGTH, words=WORDS, seed=1)


def fingerprint(inputs: torch.Tensor, labels: torch.Tensor) -> int:
    """Of one row: int64 [L] each, IGNORED where nothing is predicted."""
    ids = torch.cat([inputs, labels])
    return int(hashing.stream(5, ids * 4096 + torch.arange(len(ids)) + 2**40).sum())


def run_trainer(corpus: Path, output: Path, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Train; returns the rows read in order, loss sums over predictions, and the weights.

    options: masking, multiple_of, resume, stop_at (a step at which training stops after saving).
    """
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

    from maskvr_ds.integrations.trainer import (
        IGNORED,
        CorpusDataset,
        EpochCallback,
        EpochDataset,
        MaskingCollator,
        masked_lm_loss,
        unpack,
    )

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    rows = EpochDataset(CorpusDataset(corpus), multiple_of=options.get("multiple_of", 1))
    numbers = {tuple(rows.dataset[i]["input_ids"].tolist()): i for i in range(len(rows.dataset))}
    assert len(numbers) == ROWS, "rows are distinct"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=WORDS + 5, max_position_embeddings=LENGTH, **sizes, **dropout))
    read: list[Read] = []
    inputs: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True)
    counts: list[float] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        counts.append(float(num_items_in_batch))
        ids = torch.where(labels == IGNORED, IGNORED, unpack(labels)[0])
        for x, y in zip(inputs.pop(), ids, strict=True):
            row = tuple(torch.where(y == IGNORED, x, y).tolist())
            if row in numbers:
                read.append((numbers[row], int(rows._epoch), fingerprint(x, y)))
        return masked_lm_loss(outputs, labels, num_items_in_batch)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == options.get("stop_at"):
                control.should_save = control.should_training_stop = True

    defaults: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.01}
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    trainer = Trainer(
        model,
        TrainingArguments(str(output), **{**fixed, **defaults, **arguments}),
        train_dataset=rows,
        data_collator=MaskingCollator.for_corpus(corpus, seed=SEED, **options.get("masking", {})),
        compute_loss_func=loss,
        callbacks=[EpochCallback(), Stop()],
    )
    trainer.train(resume_from_checkpoint=options.get("resume"))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"read": read, "counts": counts, "weights": weights.numpy()}


def expected(corpus: Path, epochs: int, masking: dict[str, Any]) -> list[Read]:
    """Every row once an epoch with the mask of `maskvr train`, sorted."""
    opened = Corpus(corpus)
    config = MaskingConfig.model_validate(masking)
    masker = create_masker(config, opened, seed=hashing.fold(SEED, MASKS), device=torch.device("cpu"))
    found = []
    for epoch in range(epochs):
        masked = masker(read_rows(opened, np.arange(ROWS), np.full(ROWS, epoch)))
        for row in range(ROWS):
            labels, used = torch.full((LENGTH,), -100), masked.weights[row] != 0
            labels[masked.positions[row][used]] = masked.labels[row][used]
            found.append((row, epoch, fingerprint(masked.input_ids[row], labels)))
    return sorted(found)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no workers, short last batch": ({}, {"strategy": "span"}),
    "persistent workers": (
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 3},
        {"strategy": "whole_word"},
    ),
    "accumulation": ({"gradient_accumulation_steps": 5}, {"strategy": "frequency"}),
    "in order": ({"train_sampling_strategy": "sequential", "dataloader_num_workers": 1}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_once_an_epoch_with_the_mask_of_maskvr_train(corpus: Path, tmp_path: Path, name: str) -> None:
    arguments, masking = CASES[name]
    (found,) = run_ranks(run_trainer_with, 1, corpus, tmp_path, arguments, {"masking": masking})
    assert sorted(found["read"]) == expected(corpus, arguments.get("num_train_epochs", 2), masking)


def run_trainer_with(corpus: Path, output: Path, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    return run_trainer(corpus, output, arguments, **options)


def test_fully_explored_covers_every_token_once_a_round(corpus: Path, tmp_path: Path) -> None:
    """⌈30/k⌉ = 4 epochs at rate 0.3, on 2 ranks whose last batch would be filled with rows read before."""
    from maskvr_ds.integrations import trainer

    masking = {"strategy": "fully_explored", "rate": 0.3}
    arguments = {"num_train_epochs": 4}
    ranks = run_ranks(run_trainer_with, 2, corpus, tmp_path, arguments, {"masking": masking, "multiple_of": 8})
    read = sorted(row for found in ranks for row in found["read"])
    assert read == expected(corpus, 4, masking)
    rows = trainer.EpochDataset(trainer.CorpusDataset(corpus))
    collator = trainer.MaskingCollator.for_corpus(corpus, seed=SEED, **masking)
    predicted: Counter[tuple[int, int]] = Counter()
    for row, epoch, _ in read:
        rows.follow(epoch)
        for position in (collator([rows[row]])["labels"][0] != trainer.IGNORED).nonzero().flatten().tolist():
            predicted[row, position] += 1
    maskable = sum(int((torch.tensor(rows[i].input_ids) > 4).sum()) for i in range(ROWS))
    assert set(predicted.values()) == {1}
    assert len(predicted) == maskable


def test_ranks_and_accumulation_do_not_change_the_training(corpus: Path, tmp_path: Path) -> None:
    """Weights after 2 epochs with importance weights: 1 rank × 8, 2 ranks × 4, 2 ranks × 2 accumulations × 2; without
    the filling rows, the last batch of 2 ranks has rows that were read before."""
    masking = {"strategy": "frequency", "frequency": {"power": 1.0}}
    options = {"masking": masking, "multiple_of": 8}
    order = {"train_sampling_strategy": "sequential"}
    layouts = {
        (1, 8): {"per_device_train_batch_size": 8},
        (2, 4): {"per_device_train_batch_size": 4},
        (2, 2): {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    found = {
        layout: run_ranks(run_trainer_with, layout[0], corpus, tmp_path, {**order, **arguments}, options)
        for layout, arguments in layouts.items()
    }
    reference = found[1, 8][0]
    for layout, ranks in found.items():
        assert sorted(row for rank in ranks for row in rank["read"]) == expected(corpus, 2, masking), layout
        for rank in ranks:
            assert np.allclose(rank["weights"], reference["weights"], atol=2e-5), layout
            assert set(rank["counts"]) <= set(reference["counts"]), "predictions over all ranks and micro-batches"
    unfilled = run_ranks(run_trainer_with, 2, corpus, tmp_path, {**order}, {"masking": masking})
    assert sum(len(rank["read"]) for rank in unfilled) > 2 * ROWS


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_trainer_reads_what_is_left(corpus: Path, tmp_path: Path, ranks: int) -> None:
    """Stopped in the second epoch and resumed in new processes, against a training that was not stopped."""
    masking, filled = {"strategy": "span"}, {"multiple_of": 4 * ranks}
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True} if ranks == 1 else {}
    arguments = {"num_train_epochs": 3, **workers}
    options = {"masking": masking, **filled}
    whole = run_ranks(run_trainer_with, ranks, corpus, tmp_path / "whole", arguments, options)
    steps = -(-ROWS // (4 * ranks))
    stop = {**options, "stop_at": steps + 2}
    first = run_ranks(run_trainer_with, ranks, corpus, tmp_path / "stopped", arguments, stop)
    resume = {**options, "resume": str(tmp_path / "stopped" / f"checkpoint-{steps + 2}")}
    second = run_ranks(run_trainer_with, ranks, corpus, tmp_path / "stopped", arguments, resume)
    for complete, before, after in zip(whole, first, second, strict=True):
        assert before["read"] + after["read"] == complete["read"]
        assert np.allclose(after["weights"], complete["weights"], atol=1e-6)
    assert sorted(row for rank in whole for row in rank["read"]) == expected(corpus, 3, masking)
