"""What users give to the datasets and collators: indices, items, pairs, tokenizers without roles, ids with holes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from maskvr_ds.integrations.trainer import FILLER, IGNORED, EpochCallback, EpochDataset, MaskingCollator, Row
from tests.support.corpora import make_corpus

ITEM = {"input_ids": [2, 7, 8, 9, 10, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c", rows=8, length=16) / "tokenizer"


def tokenizer(folder: Path, **roles: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder, **roles)


def collator(folder: Path, **roles: Any) -> MaskingCollator:
    return MaskingCollator.for_tokenizer(tokenizer(folder, **roles), sequence_length=16, seed=0)


@pytest.mark.parametrize("index", [-1, 8, 100])
def test_rows_outside_the_dataset(index: int) -> None:
    """-1 was the last row with the mask of another sample, and 100 a row that fills a batch."""
    rows = EpochDataset([ITEM] * 5, epoch=0, multiple_of=4)
    with pytest.raises(IndexError, match=f"index {index}: must be from 0 to 7"):
        rows[index]
    assert [row.sample_id for row in rows] == [0, 1, 2, 3, 4, *[FILLER] * 3]
    assert rows[np.int64(2)] == rows[2] == (ITEM["input_ids"], 2, 0, None)  # type: ignore[index]


@pytest.mark.parametrize(
    ("item", "message"), [([2, 7, 3], "item 0 of the dataset is list: a dict"), ({"text": "a"}, "has text: a dict")]
)
def test_items_without_ids(item: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        EpochDataset([item], epoch=0)[0]


def test_epochs_that_are_none() -> None:
    with pytest.raises(ValueError, match="epoch is -1; a number from 0"):
        EpochDataset([ITEM], epoch=-1)
    with pytest.raises(TypeError):
        EpochDataset([ITEM], epoch=1.5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="group_by_length and batch_rebalance read rows before any epoch"):
        EpochDataset([ITEM])[0]


def test_an_evaluation_does_not_change_the_epoch_of_training() -> None:
    """accelerate calls set_epoch(0) on a dataset that is evaluated in the middle of an epoch."""
    rows = EpochDataset([ITEM] * 10)
    rows.set_epoch(1)
    assert rows[0].epoch == 1
    updates = DataLoader(rows, 2)  # type: ignore[var-annotated]
    arguments, state = SimpleNamespace(gradient_accumulation_steps=1), SimpleNamespace(global_step=10)
    for step, epoch in ((10, 2), (15, 3)):
        state.global_step = step
        EpochCallback().on_epoch_begin(arguments, state, None, train_dataloader=updates)
        rows.set_epoch(0)
        assert rows[0].epoch == epoch


def test_loaders_of_accelerate_do_not_overrule_a_resumed_epoch() -> None:
    """They call set_epoch(0) in a new process: an error instead of the masks of another epoch."""
    rows = EpochDataset([ITEM] * 4)
    rows.set_epoch(3)
    with pytest.raises(ValueError, match=r"epoch 0 after 3: accelerate counts .* set them by follow\(epoch\)"):
        rows.set_epoch(0)
    assert rows[0].epoch == 3
    for epoch in (5, 2):
        rows.follow(epoch)
        rows.set_epoch(0)
        assert rows[0].epoch == epoch
    fixed = EpochDataset([ITEM], epoch=1)
    fixed.follow(4)
    assert fixed[0].epoch == 1


def test_pairs_keep_their_token_types(folder: Path) -> None:
    pair = {"input_ids": [2, 7, 8, 3, 9, 10, 11, 3], "token_type_ids": [0, 0, 0, 0, 1, 1, 1, 1]}
    rows = EpochDataset([ITEM, pair], epoch=0)
    masks = collator(folder)
    batch = masks([rows[0], rows[1]])
    assert batch["token_type_ids"].tolist() == [[0] * 8, pair["token_type_ids"]]
    assert "token_type_ids" not in masks([rows[0]])
    with pytest.raises(ValueError, match="row 4 has 3 tokens and 2 token_type_ids"):
        masks([Row([2, 7, 3], 4, 0, [0, 0])])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 900, 3], "row 4 has ids from 2 to 900, the collator's tokenizer from 0 to 204"),
        ([2, -100, 3], "row 4 has ids from -100 to 3"),
        ([[2, 7, 3]], r"row 4 has input_ids of shape \(1, 3\): a list of ids expected"),
    ],
)
def test_ids_that_are_none(folder: Path, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator(folder)([Row(ids, 4, 0)])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"pad_token": "[SEP]"}, "id 3 is the pad token and that of sep"),
        ({"mask_token": "<unheard>", "unk_token": "[UNK]"}, "id 1 is the mask token and that of unk"),
        ({"pad_token": "[MASK]"}, "id 4 is the pad token and that of mask"),
        ({"pad_token": None}, r"has no pad token; call tokenizer.add_special_tokens\(.*resize_token_embeddings"),
        ({"mask_token": None}, "has no mask token"),
    ],
)
def test_tokenizers_without_tokens_of_their_own(folder: Path, roles: dict[str, Any], message: str) -> None:
    """A pad token that ends texts would hide their ends; a mask token that is not in the vocabulary is unknown."""
    changed = tokenizer(folder)
    for name, token in roles.items():
        setattr(changed, name, token)
    with pytest.raises(ValueError, match=message):
        MaskingCollator.for_tokenizer(changed, sequence_length=16, seed=0)


def test_the_remedy_for_a_missing_token(folder: Path) -> None:
    changed = tokenizer(folder)
    changed.pad_token = None
    changed.add_special_tokens({"pad_token": "<new pad>"})
    batch = MaskingCollator.for_tokenizer(changed, sequence_length=16, seed=0)(
        [Row([2, 7, 3], 0, 0), Row(range(9), 1, 0)]
    )
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["input_ids"][0, -1] == changed.pad_token_id == 205


def test_vocabularies_with_holes(folder: Path, tmp_path: Path) -> None:
    """The highest id is above the number of tokens; ids without a token are not drawn."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 300
    (copy / "tokenizer.json").write_text(json.dumps(content))
    masks = MaskingCollator.for_tokenizer(
        tokenizer(copy), sequence_length=16, seed=0, rate=0.9, mask_probability=0, random_probability=1
    )
    batch = masks([Row([2, *[300] * 14, 3], i, 0) for i in range(200)])
    drawn = set(batch["input_ids"][batch["labels"] != IGNORED].tolist())
    assert len(drawn) > 150
    assert not drawn & set(range(204, 300))


def test_seeds_of_numpy(folder: Path) -> None:
    made = [
        MaskingCollator.for_tokenizer(tokenizer(folder), sequence_length=16, seed=seed)([Row(list(range(5, 15)), 0, 0)])
        for seed in (7, np.int64(7))
    ]
    assert all(torch.equal(column, made[1][name]) for name, column in made[0].items())
