"""Clipping without a look at the norm on the host, against DeepSpeed's own."""

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from maskvr_ds.engine.streamline import _unscale_and_clip


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("norm", [0.0, 0.25, 3.0, 5000.0, math.inf, -1.0, math.nan])
def test_equals_deepspeed(norm: float, scale: float, limit: float) -> None:
    optimizer = SimpleNamespace(clip_grad=limit, loss_scale=scale, device="cpu")
    given = torch.randn(100, generator=torch.Generator().manual_seed(0))
    found, expected = [[given.clone()], given.clone()], [[given.clone()], given.clone()]
    _unscale_and_clip(optimizer, found, torch.tensor(norm))
    DeepSpeedZeroOptimizer.unscale_and_clip_grads(optimizer, expected, torch.tensor(norm))
    assert torch.equal(found[0][0], expected[0][0])
    assert torch.equal(found[1], expected[1])
