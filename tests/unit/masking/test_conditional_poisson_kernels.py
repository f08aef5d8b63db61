"""The Triton kernels of conditional Poisson sampling, run by Triton's interpreter: equal to the list operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds.masking.conditional_poisson import ConditionalPoisson, kernels_are_usable, odds_for_inclusion


def compare(odds: torch.Tensor, counts: torch.Tensor, width: int, bits: torch.Tensor) -> None:
    lists = ConditionalPoisson(odds, counts, width, kernels=False)
    kernels = ConditionalPoisson(odds, counts, width, kernels=True)
    assert torch.equal(kernels._table[:, :, : width + 2].permute(1, 2, 0), lists._table)
    assert torch.equal(kernels.inclusion(), lists.inclusion())
    for ours, theirs in zip(kernels.sample(bits), lists.sample(bits), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(kernels.log_normaliser(), lists.log_normaliser())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 24),
    width=st.integers(1, 7),
    scale=st.sampled_from([0.0, 1.0, 40.0]),
    seed=st.integers(0, 2**31),
)
def test_equal_to_the_bit(rows: int, length: int, width: int, scale: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    odds = torch.randn(rows, length, dtype=torch.float64, generator=random).mul(scale).exp()
    odds[torch.rand(rows, length, generator=random) < 0.3] = 0
    counts = torch.minimum((odds > 0).sum(1), torch.randint(0, width + 1, (rows,), generator=random))
    bits = torch.randint(-(2**63), 2**63 - 1, (rows, length), generator=random)
    compare(odds, counts, width, bits)


def test_sizes_of_training() -> None:
    random = torch.Generator().manual_seed(1)
    odds = torch.rand(2, 128, dtype=torch.float64, generator=random)
    odds[:, 0] = odds[:, -1] = 0
    bits = torch.randint(-(2**63), 2**63 - 1, (2, 128), generator=random)
    compare(odds, torch.tensor([19, 17]), 19, bits)


def test_cpus_use_lists() -> None:
    assert not kernels_are_usable(torch.device("cpu"))
    assert ConditionalPoisson(torch.ones(1, 4), torch.tensor([2]), 2)._kernels is None


def test_fault_of_the_kernels_is_reported(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device where they do not compile, lists are used, with a warning: the masks are the same."""
    monkeypatch.setattr("torch.Tensor.to", lambda tensor, place: (_ for _ in ()).throw(RuntimeError("no such device")))
    kernels_are_usable.cache_clear()
    assert not kernels_are_usable(torch.device("cuda"))
    assert caplog.messages == [
        "conditional Poisson sampling uses no Triton kernels (slower, same masks): RuntimeError: no such device"
    ]


def test_exact_odds_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvr_ds.masking.conditional_poisson.kernels_are_usable", lambda device: True)
    maskable = torch.ones(1, 6, dtype=torch.bool)
    wanted = torch.tensor([[0.9, 0.6, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64)
    odds = odds_for_inclusion(wanted, maskable, torch.tensor([2]), 2)
    design = ConditionalPoisson(odds, torch.tensor([2]), 2)
    assert design._kernels is not None
    torch.testing.assert_close(design.inclusion(), wanted, rtol=0, atol=1e-5)
