"""The collator's masks are those of `maskvr train`, however rows are grouped; labels carry the weights exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.data.keys import MASKS
from maskvr_ds.data.loader import read_rows
from maskvr_ds.integrations.trainer import (
    FILLER,
    IGNORED,
    CorpusDataset,
    EpochDataset,
    MaskingCollator,
    Row,
    masked_lm_loss,
    pack,
    unpack,
)
from maskvr_ds.masking.factory import create_masker
from maskvr_ds.masking.masker import Masker
from tests.support.corpora import make_corpus

SEED = 11
SECTIONS: dict[str, dict[str, Any]] = {
    "uniform": {"rate": 0.3},
    "whole_word": {"mask_probability": 0.5, "random_probability": 0.3},
    "span": {"span": {"geometric_p": 0.4, "max_length": 4}},
    "fully_explored": {},
    "frequency": {"frequency": {"power": 0.7, "document_power": 0.2}},
    "frequency, exact": {"frequency": {"sampler": "conditional_poisson", "estimator": "hajek"}},
}


def section(name: str) -> dict[str, Any]:
    return {"strategy": name.partition(",")[0], **SECTIONS[name]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c", rows=90, length=32, padded_last_row=True)


def train_masks(corpus: Path, masking: dict[str, Any], rows: list[int], epoch: int) -> MaskedBatch:
    """The masks of `maskvr train` without phases: its factory and its reader."""
    opened = Corpus(corpus)
    config = MaskingConfig.model_validate(masking)
    masker = create_masker(config, opened, seed=hashing.fold(SEED, MASKS), device=torch.device("cpu"))
    return masker(read_rows(opened, np.array(rows), np.full(len(rows), epoch)))


def expected(masked: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and weights by position; IGNORED and 0 where nothing is predicted."""
    labels, weights = torch.full_like(masked.input_ids, IGNORED), torch.zeros(masked.input_ids.shape)
    for row, (positions, ids, w) in enumerate(zip(masked.positions, masked.labels, masked.weights, strict=True)):
        for position, label, weight in zip(positions.tolist(), ids, w, strict=True):
            if weight != 0:
                labels[row, position], weights[row, position] = label, weight
    return masked.input_ids, labels, weights


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("workers", [0, 2])
def test_masks_are_those_of_maskvr_train(corpus: Path, name: str, workers: int) -> None:
    """Bit for bit, for all rows of two epochs, by batches of another size and in another order."""
    rows = EpochDataset(CorpusDataset(corpus))
    collator = MaskingCollator.for_corpus(corpus, seed=SEED, **section(name))
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    loader = DataLoader(
        rows, 7, sampler=order, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
    )
    for epoch in (0, 3):
        rows.set_epoch(epoch)
        inputs, labels, weights = expected(train_masks(corpus, section(name), list(range(len(rows))), epoch))
        for number, batch in enumerate(loader):
            here = order[7 * number : 7 * number + 7]
            found = batch["labels"]
            ids, w = unpack(found)
            predicted = found != IGNORED
            assert torch.equal(batch["input_ids"], inputs[here])
            assert torch.equal(torch.where(predicted, ids, IGNORED), labels[here])
            assert torch.equal(torch.where(predicted, w, 0), weights[here])
            assert batch["attention_mask"].sum(1).tolist() == [16 if row == len(rows) - 1 else 32 for row in here]
    if name.startswith("frequency"):
        assert len(weights[weights != 0].unique()) > 5


@given(st.integers(0, 2**32 - 1), st.floats(width=32, min_value=2.0**-100, max_value=2.0**100))
def test_labels_carry_weights_exactly(label: int, weight: float) -> None:
    packed = pack(torch.tensor([label]), torch.tensor([weight]))
    assert packed.item() >= 0
    assert packed.item() != IGNORED
    ids, weights = unpack(packed)
    assert (ids.item(), weights.item()) == (label, weight)
    assert (packed.item() == label) == (weight == 1), "other losses read labels of weight 1"


def test_loss_is_that_of_maskvr_train(corpus: Path) -> None:
    """Σ w ℓ / Σ k over two micro-batches, against the definition by a loop."""
    rows = EpochDataset(CorpusDataset(corpus), epoch=2)
    collator = MaskingCollator.for_corpus(corpus, seed=SEED, **section("frequency"))
    masked = train_masks(corpus, section("frequency"), list(range(8)), 2)
    logits = torch.randn(8, 32, 205, generator=torch.Generator().manual_seed(0))
    total, count = 0.0, int((masked.weights != 0).sum())
    for row in range(8):
        for position, label, weight in zip(masked.positions[row], masked.labels[row], masked.weights[row], strict=True):
            total += float(weight * F.cross_entropy(logits[row, position], label))
    parts = []
    for part in (slice(0, 5), slice(5, 8)):
        batch = collator([rows[i] for i in range(8)[part]])
        parts.append(masked_lm_loss({"logits": logits[part]}, batch["labels"], torch.tensor(count)))
    assert float(sum(parts)) == pytest.approx(total / count, rel=1e-6)
    alone = masked_lm_loss({"logits": logits}, collator([rows[i] for i in range(8)])["labels"])
    assert float(alone) == pytest.approx(total / count, rel=1e-6)


def test_rows_that_fill_a_batch(corpus: Path) -> None:
    rows = EpochDataset(CorpusDataset(corpus), epoch=0, multiple_of=16)
    assert len(rows) == 96
    assert [row.sample_id for row in rows][88:] == [88, 89, *[FILLER] * 6]
    batch = MaskingCollator.for_corpus(corpus, seed=SEED)([rows[95], rows[94]])
    assert batch["labels"].tolist() == [[IGNORED]] * 2
    assert batch["attention_mask"].tolist() == [[1]] * 2
    loss = masked_lm_loss({"logits": torch.zeros(2, 1, 205)}, batch["labels"])
    assert loss == 0


def test_a_batch_is_cut_to_its_longest_row(corpus: Path) -> None:
    """Padding changes no mask."""
    collator = MaskingCollator.for_corpus(corpus, seed=SEED, strategy="span")
    long, short = Row(list(range(5, 35)), 1, 0), Row([2, 7, 8, 9, 10, 11, 12, 13, 14, 3], 2, 0)
    together, alone = collator([long, short]), collator([short])
    assert together["labels"].shape == (2, 30)
    for name, column in alone.items():
        assert column.shape == (1, 10)
        assert torch.equal(column[0], together[name][1, :10]), name


def fast_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(corpus / "tokenizer")


@pytest.mark.parametrize("name", ["uniform", "whole_word", "span", "fully_explored", "frequency"])
def test_a_tokenizer_gives_the_masks_of_its_corpus(corpus: Path, name: str) -> None:
    masking = {**section(name), "frequency": {"power": 0.7}} if name == "frequency" else section(name)
    rows = EpochDataset(CorpusDataset(corpus), epoch=1)
    tokens = np.concatenate([np.asarray(row.input_ids) for row in rows])
    counts = np.bincount(tokens, minlength=205) if name == "frequency" else None
    collators = (
        MaskingCollator.for_corpus(corpus, seed=SEED, **masking),
        MaskingCollator.for_tokenizer(fast_tokenizer(corpus), sequence_length=32, seed=SEED, counts=counts, **masking),
    )
    first, second = (collator([rows[i] for i in range(20)]) for collator in collators)
    for key, column in first.items():
        assert torch.equal(column, second[key]), key


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        ({"strategy": "mapnet"}, "mapnet: needs gradients"),
        ({"strategy": "auto"}, "auto: needs gradients"),
        ({"strategy": "fully_explored", "fully_explored": {"placement": "same_batch"}}, "same_batch"),
        ({"final_rate": 0.3}, "final_rate"),
        ({"late_layer": 1, "mask_probability": 1, "random_probability": 0}, "late_layer"),
        ({"rate": 2}, "masking.rate"),
        ({"strategy": "none"}, "masking.strategy"),
        ({"ratio": 0.2}, "masking.ratio"),
    ],
)
def test_what_is_not_possible_is_refused(corpus: Path, masking: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskingCollator.for_corpus(corpus, seed=0, **masking)


def test_items_without_ids_and_epochs_are_refused(corpus: Path) -> None:
    data = CorpusDataset(corpus)
    collator = MaskingCollator.for_corpus(corpus, seed=0)
    with pytest.raises(TypeError, match="wrap it in EpochDataset"):
        collator([data[0]])  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="EpochCallback"):
        EpochDataset(data)[0]
    with pytest.raises(ValueError, match="row 4 has 33 tokens"):
        collator([Row([5] * 33, 4, 0)])
    with pytest.raises(TypeError, match=r"__getitem__ expected.* Store a stream first, or have it yield Row"):
        EpochDataset(iter([]))
    with pytest.raises(ValueError, match="needs counts"):
        MaskingCollator.for_tokenizer(fast_tokenizer(corpus), sequence_length=32, seed=0, strategy="frequency")
    with pytest.raises(ValueError, match=r"counts has shape \(204,\), and the tokenizer 205 tokens"):
        MaskingCollator.for_tokenizer(
            fast_tokenizer(corpus), sequence_length=32, seed=0, strategy="frequency", counts=np.ones(204, np.int64)
        )
    with pytest.raises(IndexError):
        data[90]


@pytest.mark.parametrize("name", ["whole_word", "span", "frequency"])
def test_a_masker_makes_its_parameters(corpus: Path, name: str) -> None:
    """From the corpus, with default settings; a manifest alone is not enough."""
    opened = Corpus(corpus)
    ours = Masker.for_corpus(opened, seed=5, strategy=name)
    config = MaskingConfig.model_validate({"strategy": name})
    theirs = create_masker(config, opened, seed=5, device=torch.device("cpu"))
    batch = read_rows(opened, np.arange(90), np.zeros(90, np.int64))
    for first, second in zip(vars(ours(batch)).values(), vars(theirs(batch)).values(), strict=True):
        assert first is second is None or torch.equal(first, second)
    with pytest.raises(ValueError, match=f"strategy {name}: needs"):
        Masker.for_corpus(opened.manifest, seed=5, strategy=name)
    with pytest.raises(ValueError, match="mapnet"):
        Masker.for_corpus(opened, seed=5, strategy="mapnet")
