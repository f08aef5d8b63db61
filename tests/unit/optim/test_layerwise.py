"""Tensors concatenated in flat partitions, as under ZeRO, against the same tensors as separate parameters."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskvr_ds.lamb import Lamb
from maskvr_ds.optim import layerwise
from maskvr_ds.optim.partitions import Fragment, Layout, Partition

# Per tensor: its elements, and the padding elements before it.
pieces = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 0, 0, 3])), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.lists(pieces, min_size=1, max_size=3),
    tail=st.sampled_from([0, 2]),
    chunk=st.sampled_from([7, layerwise.NORM_CHUNK]),
    spread=st.booleans(),
    seed=st.integers(0, 99),
)
def test_flat_partitions_step_like_full_tensors(
    groups: list[list[tuple[int, int]]], tail: int, chunk: int, spread: bool, seed: int
) -> None:
    """For every way to chunk norms and to apply ratios. The padding between tensors is NaN and must not enter them."""
    random = torch.Generator().manual_seed(seed)
    tensors: list[nn.Parameter] = []
    partitions: dict[torch.Tensor, Partition] = {}
    for group in groups:
        fragments: list[Fragment] = []
        end = 0
        for length, gap in group:
            fragments.append(Fragment(len(tensors), 0, end + gap, length))
            tensors.append(nn.Parameter(torch.randn(length, generator=random)))
            end += gap + length
        flat = nn.Parameter(torch.full((end + tail,), torch.nan))
        for fragment in fragments:
            fragment.of_partition(flat.data).copy_(tensors[fragment.tensor].data)
        partitions[flat] = Partition(fragments, [fragment.tensor for fragment in fragments])
    full, zero = Lamb(tensors, lr=0.1), Lamb(list(partitions), lr=0.1)
    zero._layout, zero._bound = Layout(tensors, [str(i) for i in range(len(tensors))], partitions), True
    # As on GPUs, if there are no gaps; and as on CPUs.
    spreads = (lambda layout, _: layout.is_dense) if spread else layerwise._spreads
    for _ in range(3):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=random)
        for flat, partition in partitions.items():
            flat.grad = torch.full_like(flat, torch.nan)
            for fragment in partition.fragments:
                fragment.of_partition(flat.grad).copy_(tensors[fragment.tensor].grad)
        full.step()
        with mock.patch.multiple(layerwise, NORM_CHUNK=chunk, _spreads=spreads):
            zero.step()
    assert zero.trust_ratios is not None
    torch.testing.assert_close(zero.trust_ratios, full.trust_ratios)
    for flat, partition in partitions.items():
        for view, fragment in zip(partition.views(flat), partition.fragments, strict=True):
            torch.testing.assert_close(view, tensors[fragment.tensor])
        assert partition.end == partition.fragments[-1].partition_start + partition.fragments[-1].length
        inside = torch.zeros(len(flat), dtype=torch.bool)
        for view in partition.views(inside):
            view.fill_(True)
        assert flat.isnan().logical_not().equal(inside)
