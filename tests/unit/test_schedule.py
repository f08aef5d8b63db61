"""The learning rate against torch's schedulers and its own definition."""

import pytest
import torch

from maskvr_ds.schedule import learning_rate


def test_against_torch_schedulers() -> None:
    """LinearLR then PolynomialLR, chained by torch, one optimizer step at a time."""
    peak, warmup, total, power = 0.02, 10, 100, 0.5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    fall = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total - warmup, power=power)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    for step in range(total):
        ours = learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total, power=power)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_corners(power: float) -> None:
    def rate(step: int, warmup: int = 4) -> float:
        return learning_rate(step, peak=1.0, warmup_steps=warmup, total_steps=20, power=power, final=0.1)

    assert [rate(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(12) == pytest.approx(0.1 + 0.9 * 0.5**power)
    assert rate(20) == rate(1000) == 0.1
    assert rate(0, warmup=0) == 1.0
    assert rate(19, warmup=20) == 1.0, "a run may be all warm-up"
