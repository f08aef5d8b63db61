"""`StableAdamW` without DeepSpeed, against the paper's algorithm in float64 and against AdamW."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskvr_ds.optim.stable_adamw import StableAdamW
from tests.reference.adam import ReferenceStableAdamW
from tests.unit.optim.test_lamb import draw, groups_by_decay, tensors


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tensors=tensors,
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.8, 0.95), (0.9, 0.0)]),
    eps=st.sampled_from([1e-6, 1e-3, 0.5]),
    spikes=st.lists(st.sampled_from([0.1, 1.0, 10.0, 100.0]), min_size=6, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(
    tensors: Any, betas: tuple[float, float], eps: float, spikes: list[float], seed: int
) -> None:
    random = np.random.default_rng(seed)

    weights = [nn.Parameter(draw(random, shape, kind)) for shape, kind, _, _ in tensors]
    decay = [0.1 if decays else 0.0 for *_, decays in tensors]
    groups = groups_by_decay(weights, decay)
    optimizer = StableAdamW(groups, 0.01, betas, eps)
    reference = ReferenceStableAdamW([w.data for w in weights], decay, 0.01, betas, eps)
    for step, spike in enumerate(spikes):
        gradients = [draw(random, shape, kind, step) * spike for shape, _, kind, _ in tensors]
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g.clone()
        optimizer.step()
        reference.step(gradients)
        for w, g, expected in zip(weights, gradients, reference.weights, strict=True):
            assert torch.equal(w.grad, g), "gradients are not modified"
            largest = max(float(expected.abs().max()), 0.01)
            torch.testing.assert_close(w.double(), expected, rtol=0, atol=1e-5 * largest)
        order = [i for group in groups for p in group["params"] for i, w in enumerate(weights) if w is p]
        expected_rms = torch.tensor([reference.ratios[i] for i in order])
        torch.testing.assert_close(optimizer.update_rms, expected_rms, rtol=1e-4, atol=1e-12)


def test_a_spike_moves_a_tensor_by_no_more_than_the_clipped_rate() -> None:
    weight, other = (nn.Parameter(torch.zeros(2000)) for _ in range(2))
    optimizer = StableAdamW([("spiky", weight), ("calm", other)], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0)
    plain_weight = nn.Parameter(torch.zeros(2000))
    plain = torch.optim.AdamW([plain_weight], lr=1.0, betas=(0.0, 0.999), eps=1e-6, weight_decay=0.0)
    for gradient in (1e-3, 1e-3, 1.0):
        for p in (weight, plain_weight):
            p.grad = torch.full((2000,), gradient)
        other.grad = torch.full((2000,), 1e-3)
        before, before_plain = weight.detach().clone(), plain_weight.detach().clone()
        optimizer.step()
        plain.step()
    ours, theirs = (
        (weight.data - before).square().mean().sqrt(),
        (plain_weight.data - before_plain).square().mean().sqrt(),
    )
    assert float(ours) == pytest.approx(1.0, rel=1e-3), "RMS of the update is at most η if β₁ is 0"
    assert float(theirs) > 1.5
    assert optimizer.tensor_names == ["spiky", "calm"]
    assert optimizer.update_rms[0] > 1.5
    assert float(optimizer.update_rms[1]) == pytest.approx(1, rel=1e-5)


def test_missing_gradients_and_zeros() -> None:
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = StableAdamW([a, b, c], lr=0.1, weight_decay=0.0)
    a.grad, b.grad = torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3)
    optimizer.step()
    assert optimizer.update_rms.tolist() == pytest.approx([(2 / 3) ** 0.5, 0, 0])
    assert float(a.detach()[0]) == pytest.approx(0.9)
    assert torch.equal(b.data, torch.ones(3))
    assert torch.equal(c.data, torch.ones(3))
    assert c not in optimizer.state


def test_divergence_is_visible() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = StableAdamW([weight])
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimizer.step()
    assert optimizer.update_rms.isnan().all()
    assert weight.isnan().all()


def test_state_dict_and_copies_continue_bit_equal() -> None:
    def run(optimizer: StableAdamW, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.sin(torch.arange(12.0) + step) * 10**step
            optimizer.step()

    one = nn.Parameter(torch.linspace(-1, 2, 12))
    first = StableAdamW([one], lr=0.1)
    run(first, one, range(3))
    two = nn.Parameter(one.detach().clone())
    second = StableAdamW([two], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = copy.deepcopy(first)
    (three,) = third.param_groups[0]["params"]
    for optimizer, weight in ((first, one), (second, two), (third, three)):
        run(optimizer, weight, range(3, 6))
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert set(first.state[one]) == {"step", "exp_avg", "exp_avg_sq"}, "the names of AdamW and LAMB"


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-6}, {"weight_decay": -1}])
def test_hyperparameters_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        StableAdamW([nn.Parameter(torch.ones(1))], **arguments)
