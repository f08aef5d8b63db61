"""Masks against a plain Python sampler, counting and invariants."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds import hashing
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import row_digests
from maskvr_ds.masking.masker import Corruption, Masker, data_digest, mask_digest, pareto_sample

VOCABULARY, MASK, SPECIAL = 1000, 4, (0, 1, 2, 3, 4)
ALL = (1 << 64) - 1


def tokens(rows: int, length: int = 32, seed: int = 0) -> TokenBatch:
    random = np.random.default_rng(seed)
    ids = random.integers(5, VOCABULARY, (rows, length)).astype(np.uint16)
    ids[:, 0], ids[:, -1] = 2, 3
    ids[random.random((rows, length)) < 0.1] = 3
    samples, epochs = random.permutation(10_000)[:rows].astype(np.int64), random.integers(0, 3, rows)
    return batch_of(torch.from_numpy(ids), torch.from_numpy(samples), torch.from_numpy(epochs))


def batch_of(ids: torch.Tensor, samples: torch.Tensor, epochs: torch.Tensor) -> TokenBatch:
    digests = row_digests(ids.numpy(), samples.numpy(), epochs.numpy(), 0)
    return TokenBatch(ids, samples, epochs, row_digests=torch.from_numpy(digests))


def masker(length: int = 32, *, rate: float = 0.15, seed: int = 5, corruption: Corruption | None = None) -> Masker:
    return Masker(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        special_ids=SPECIAL,
        sequence_length=length,
        seed=seed,
        rate=rate,
        corruption=corruption,
    )


def rows_of(batch: TokenBatch, index: torch.Tensor) -> TokenBatch:
    return batch.map(lambda column: column[index])


def chosen(masked) -> list[set[int]]:
    return [set(p[w != 0].tolist()) for p, w in zip(masked.positions, masked.weights, strict=True)]


def unsigned_mix(z: int) -> int:
    z &= ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


def draw(key: int, counter: int) -> int:
    return unsigned_mix(key + (counter + 1) * 0x9E3779B97F4A7C15)


def plain_uniform_mask(ids: list[int], sample: int, epoch: int, seed: int, rate: float) -> set[int]:
    """The definition, a position at a time: the k maskable positions with the smallest hashes."""
    key = draw(hashing.fold(seed), (epoch << 40) + sample)
    maskable = [i for i, t in enumerate(ids) if t not in SPECIAL]
    k = min(max(1, math.floor(rate * len(maskable) + 0.5)), len(maskable))
    # u is the upper 52 bits as a signed number, moved to (0, 1).
    return set(sorted(maskable, key=lambda i: (((draw(key, i) >> 12) + (1 << 51)) % (1 << 52), i))[:k])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 0.99), st.integers(0, 100))
def test_uniform_masks_are_as_defined(seed: int, rate: float, data_seed: int) -> None:
    batch = tokens(6, seed=data_seed)
    found = chosen(masker(rate=rate, seed=seed)(batch))
    for row, positions in enumerate(found):
        ids = batch.input_ids[row].tolist()
        expected = plain_uniform_mask(ids, int(batch.sample_ids[row]), int(batch.epochs[row]), seed, rate)
        assert positions == expected


def test_layout_does_not_matter() -> None:
    batch = tokens(60)
    full = masker()(batch)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = masker()(rows_of(batch, order))
    assert torch.equal(shuffled.input_ids, full.input_ids[order])
    assert torch.equal(shuffled.positions, full.positions[order])
    pieces = [masker()(piece) for piece in batch.split(7)]
    assert torch.equal(torch.cat([p.input_ids for p in pieces]), full.input_ids)
    assert mask_digest(batch, full) == sum(mask_digest(b, p) for b, p in zip(batch.split(7), pieces, strict=True)), (
        "digests add over parts of a batch"
    )
    assert data_digest(batch) == data_digest(rows_of(batch, order))


def test_epoch_sample_and_seed_each_change_masks_and_digest() -> None:
    batch = tokens(20)
    full = masker()(batch)
    others = [
        (batch_of(batch.input_ids, batch.sample_ids, batch.epochs + 1), masker()),
        (batch_of(batch.input_ids, batch.sample_ids + 1, batch.epochs), masker()),
        (batch, masker(seed=6)),
    ]
    for other, other_masker in others:
        masked = other_masker(other)
        assert chosen(masked) != chosen(full)
        assert mask_digest(other, masked) != mask_digest(batch, full)


def test_digest_does_not_depend_on_unused_slots() -> None:
    batch = tokens(20)
    masked = masker()(batch)
    digest = mask_digest(batch, masked)
    unused = masked.weights == 0
    assert 0 < unused.sum() < unused.numel() / 2
    masked.positions[unused] = 31 - masked.positions[unused]
    assert mask_digest(batch, masked) == digest


def test_labels_weights_and_inputs() -> None:
    batch = tokens(200)
    masked = masker()(batch)
    ids = batch.input_ids.long()
    assert torch.equal(masked.labels, ids.gather(1, masked.positions))
    used = masked.weights != 0
    assert torch.allclose(masked.weights[used], torch.ones(()))
    assert not torch.isin(masked.labels[used], torch.tensor(SPECIAL)).any()
    changed = masked.input_ids != ids
    allowed = torch.zeros_like(changed)
    for row, positions in enumerate(chosen(masked)):
        allowed[row, list(positions)] = True
    assert not (changed & ~allowed).any(), "only positions to predict are corrupted"


def test_corruption_probabilities() -> None:
    batch = tokens(4000)
    masked = masker(corruption=Corruption(0.7, 0.2))(batch)
    used = masked.weights != 0
    shown = masked.input_ids.gather(1, masked.positions)[used]
    labels = masked.labels[used]
    n = len(labels)
    random = (shown != MASK) & (shown != labels)
    # A random token is the label itself once in the ordinary vocabulary.
    for found, expected in [((shown == MASK).sum(), 0.7), (random.sum(), 0.2 * (1 - 1 / (VOCABULARY - 5)))]:
        assert abs(found.item() / n - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
    assert not torch.isin(shown[random], torch.tensor(SPECIAL)).any()
    counts = torch.bincount(shown[random], minlength=VOCABULARY)[5:].double()
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert chi_squared < len(counts) + 6 * (2 * len(counts)) ** 0.5, "random tokens are uniform"


def test_a_row_without_maskable_tokens_gets_no_prediction() -> None:
    batch = tokens(3)
    batch.input_ids[1] = 3
    masked = masker()(batch)
    assert (masked.weights[1] == 0).all()
    assert torch.equal(masked.input_ids[1], batch.input_ids[1].long())
    assert torch.isfinite(masked.weights).all()
    assert (masked.weights[0] != 0).any()


def test_a_single_maskable_token_is_predicted() -> None:
    batch = tokens(1)
    batch.input_ids[0] = 3
    batch.input_ids[0, 9] = 77
    masked = masker(rate=0.01)(batch)
    assert chosen(masked) == [{9}]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5])
def test_rate_outside_of_zero_to_one(rate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        masker(rate=rate)


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="'spam'; it must be one of uniform"):
        Masker(vocab_size=9, mask_id=4, special_ids=SPECIAL, sequence_length=8, seed=0, strategy="spam", rate=0.15)


@pytest.mark.parametrize("pair", [(0.8, 0.5), (-0.1, 0.5), (float("nan"), 0.1), (0.1, 1.5)])
def test_probabilities_of_corruption(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"mask_probability {pair[0]}, random_probability {pair[1]}: must be"):
        Corruption(*pair)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_id": None}, "id None of a special token"),
        ({"mask_id": 9}, "id 9 of a special token: must be below the vocabulary size, 9"),
        ({"special_ids": [0, -1]}, "id -1 of a special token"),
        ({"sequence_length": 0}, "sequence length 0: must be at least 1"),
        ({"strategy": "whole_word"}, "strategy whole_word: needs parameters with word_starts"),
        ({"strategy": "span"}, "span: needs parameters with span_thresholds"),
        ({"strategy": "frequency"}, "frequency: needs parameters with token_scores"),
        ({"strategy": "mapnet"}, "mapnet: needs parameters with proposal"),
    ],
)
def test_a_masker_used_directly_checks_its_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masker(**{"vocab_size": 9, "mask_id": 4, "special_ids": SPECIAL, "sequence_length": 8, "seed": 0, **arguments})


@pytest.mark.parametrize("width", [3, 33])
def test_rows_of_another_length(width: int) -> None:
    """Longer ones got the predictions of L positions, shorter ones an error of topk."""
    columns = torch.full((2, width), 6), torch.arange(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=f"rows of {width} positions: the masker is for rows of 32, padded or down to 5"
    ):
        masker()(TokenBatch(*columns))


def test_certain_and_varying_counts_in_one_batch() -> None:
    inclusion = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5], [0.5, 0.25, 0.25, 0.5, 0.5]], dtype=torch.float64)
    maskable = torch.tensor([[True] * 5, [False, True, True, True, False]])
    counts = torch.tensor([3, 1])
    bits = hashing.stream(torch.tensor([[3], [4]]), torch.arange(5))
    positions, used = pareto_sample(inclusion, bits, maskable, counts, 3)
    assert used.tolist() == [[True, True, True], [True, False, False]]
    assert positions[0, 0] == 0, "π = 1 comes first"
    assert positions[1, 0].item() in (1, 2, 3)


def test_equal_probabilities_rank_as_the_general_path_does() -> None:
    bits = hashing.stream(torch.arange(2000)[:, None], torch.arange(40))
    maskable = torch.ones(2000, 40, dtype=torch.bool)
    share = torch.full((2000, 1), 0.2, dtype=torch.float64)
    counts = torch.full((2000,), 8)
    general, _ = pareto_sample(share.expand(2000, 40), bits, maskable, counts, 8)
    fast, _ = pareto_sample(share, bits, maskable, counts, 8)
    assert torch.equal(general, fast)
