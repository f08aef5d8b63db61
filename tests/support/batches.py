"""Random masked batches for tests of engines on ranks."""

import torch

from maskvr_ds.data.batch import MaskedBatch


def random_masked(seed: int, *, rows: int, length: int, predictions: int, vocabulary: int) -> MaskedBatch:
    """Distinct random positions with weight 1. Ids below 5 are left to special tokens."""
    random = torch.Generator().manual_seed(seed)
    return MaskedBatch(
        torch.randint(5, vocabulary, (rows, length), generator=random),
        torch.stack([torch.randperm(length, generator=random)[:predictions] for _ in range(rows)]),
        torch.randint(5, vocabulary, (rows, predictions), generator=random),
        torch.ones(rows, predictions),
    )
