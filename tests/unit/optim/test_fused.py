"""LAMB in Triton kernels, run by Triton's interpreter, against the float64 reference and the list operations."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskvr_ds.lamb import Lamb
from maskvr_ds.optim import fused
from maskvr_ds.optim.partitions import Fragment, Partition
from tests.unit.optim.test_lamb import BING_BERT, OPTIMIZERS

# Several blocks, one block to the element, less than one, scalars.
SHAPES = [(3, 5000), (fused.BLOCK,), (7,), (64, 64), ()]
VARIANTS = {"paper": "paper", "nvidia": "nvidia", "deepspeed": "deepspeed", "bing_bert": BING_BERT}


def weights_of(seed: int) -> list[nn.Parameter]:
    random = np.random.default_rng(seed)
    weights = [nn.Parameter(torch.from_numpy(np.asarray(random.normal(size=s) * 0.1, np.float32))) for s in SHAPES]
    with torch.no_grad():
        weights[2].zero_()  # its ratio is 1
    return weights


def groups_of(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights[:3], "weight_decay": 0.1}, {"params": weights[3:], "weight_decay": 0.0}]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference(name: str) -> None:
    weights = weights_of(1)
    optimizer = Lamb(groups_of(weights), 0.01, (0.8, 0.95), 1e-6, variant=VARIANTS[name], fused=True)
    reference = OPTIMIZERS[name][1]([w.data for w in weights], [0.1] * 3 + [0.0] * 2, 0.01, (0.8, 0.95), 1e-6)
    random = np.random.default_rng(2)
    for step in range(8):
        gradients = [torch.from_numpy(np.asarray(random.normal(size=shape), np.float32)) for shape in SHAPES]
        if step == 3:
            gradients[1].zero_()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        reference.step(gradients)
        for weight, gradient, expected in zip(weights, gradients, reference.weights, strict=True):
            assert torch.equal(weight.grad, gradient), "gradients are not modified"
            largest = max(float(expected.abs().max()), 0.01)
            torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-5 * largest)
        ratios = torch.tensor(list(reference.ratios))
        torch.testing.assert_close(optimizer.trust_ratios, ratios, rtol=1e-4, atol=1e-12)


def test_missing_gradients_and_copies() -> None:
    """Tensors that lag behind have steps of their own; a copied optimizer stays fused."""
    pairs = [(weights, Lamb(groups_of(weights), 0.01, fused=is_fused)) for is_fused in (False, True)
             for weights in (weights_of(3),)]  # fmt: skip
    random = np.random.default_rng(4)
    for step in range(6):
        gradients = [torch.from_numpy(np.asarray(random.normal(size=shape), np.float32)) for shape in SHAPES]
        for weights, optimizer in pairs:
            for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                weight.grad = None if (step + number) % 3 == 0 else gradient.clone()
            optimizer.step()
    for ours, theirs in zip(pairs[1][0], pairs[0][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    copied = copy.deepcopy(pairs[1][1])
    assert copied.fused
    assert not copy.deepcopy(pairs[0][1]).fused


def test_partition_with_gaps_and_padding() -> None:
    """A flat partition as ZeRO makes it: pieces of tensors at any place, and padding that stays untouched."""
    layout = Partition([Fragment(2, 10, 3, 5000), Fragment(0, 0, 5003, 1), Fragment(4, 0, 5010, 4097)], [0, 2, 4])
    random = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.rand(9200, generator=random) for _ in range(4))
    before = [tensor.clone() for tensor in (w, m, v)]
    c = fused.Coefficients(beta1=0.9, beta2=0.99, root=0.7, eps=1e-3, decay=0.1)
    update = fused.FusedUpdate([w], [g], [m], [v], [layout], c, torch.tensor(0.5))
    squares = torch.zeros(2, 5)
    update.add_squares(squares)
    ratios = torch.tensor([2.0, 0.0, 0.25, 0.0, 1.0])
    update.subtract(ratios, lr=0.1)

    used = torch.zeros(9200, dtype=torch.bool)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for fragment in layout.fragments:
        part = slice(fragment.partition_start, fragment.partition_start + fragment.length)
        used[part] = True
        w64, m64, v64 = (tensor[part].double() for tensor in before)
        g64 = g[part].double() * 0.5
        m64 = 0.9 * m64 + 0.1 * g64
        v64 = 0.99 * v64 + 0.01 * g64 * g64
        u64 = m64 / (0.7 * v64.sqrt() + 1e-3) + 0.1 * w64
        expected[:, fragment.tensor] = torch.stack([w64.square().sum(), u64.square().sum()])
        torch.testing.assert_close(m[part].double(), m64, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(v[part].double(), v64, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(w[part].double(), w64 - 0.1 * ratios[fragment.tensor] * u64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.double(), expected, rtol=1e-6, atol=0)
    for tensor, original in zip((w, m, v), before, strict=True):
        assert torch.equal(tensor[~used], original[~used])


def test_copies_are_rounded_to_the_nearest_even() -> None:
    """Also halfway between two numbers, at the edges of the range; NaN stays NaN."""
    exact = torch.tensor([1.0, -1.0, 0.0, -0.0, 3.3895e38, -3.3895e38, 1e-40, -1e-45])
    ties = (torch.arange(-300, 300, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    others = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    strange = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    weights = torch.cat([exact, ties, -ties, others, strange])
    n = len(weights)
    copies = torch.full((n + 2,), 7.0, dtype=torch.bfloat16)
    c = fused.Coefficients(beta1=0.9, beta2=0.99, root=1.0, eps=1e-3, decay=0.0)
    states = [torch.zeros(n + 2) for _ in range(3)]
    whole = torch.cat([weights, torch.ones(2)])
    update = fused.FusedUpdate(
        [whole], states[:1], states[1:2], states[2:], [Partition([Fragment(0, 0, 0, n)], [0])], c, None, [copies]
    )
    update.subtract(torch.ones(1), lr=0.0)
    kept, expected = copies[:n].view(torch.int16), weights.to(torch.bfloat16).view(torch.int16)
    number = ~weights.isnan()
    assert torch.equal(kept[number], expected[number])
    assert copies[:n][~number].isnan().all()
    assert torch.equal(copies[n:], torch.full((2,), 7.0, dtype=torch.bfloat16)), "padding is not written"


def test_other_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"contiguous fp32 tensors, found torch\.bfloat16; set fused=False"):
        Lamb([weight], fused=True).step()
    weight = nn.Parameter(torch.ones(4, 3).t())
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"found strides \(1, 3\) of shape \(3, 4\); set fused=False"):
        Lamb([weight], fused=True).step()
    monkeypatch.setattr(fused, "INTERPRETED", False)
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="needs tensors on a GPU, found cpu; set fused=False"):
        Lamb([weight], fused=True).step()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        Lamb([weight], fused=True)
