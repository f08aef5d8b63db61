"""Learning rate against torch's schedulers and against published formulas in their own step counting; edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.config import ScheduleConfig
from maskvr_ds.training.schedule import learning_rate, masking_rate


def test_against_torch_schedulers() -> None:
    """LinearLR then PolynomialLR, chained by torch, one optimizer step at a time."""
    peak, warmup, total, power = 0.02, 10, 100, 0.5
    schedule = ScheduleConfig(warmup_steps=warmup, power=power)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    fall = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total - warmup, power=power)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    for step in range(total):
        ours = learning_rate(step, schedule, peak=peak, total_steps=total)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_edge_cases(power: float) -> None:
    def rate(step: int, warmup: int = 4) -> float:
        schedule = ScheduleConfig(warmup_steps=warmup, power=power, final_lr=0.1)
        return learning_rate(step, schedule, peak=1.0, total_steps=20)

    assert [rate(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(12) == pytest.approx(0.1 + 0.9 * 0.5**power)
    assert rate(20) == rate(1000) == 0.1
    assert rate(0, warmup=0) == 1.0
    assert rate(19, warmup=20) == 1.0, "warm-up may take the entire run"


@given(total=st.integers(2, 20_000), share=st.floats(0.0, 0.9), peak=st.floats(1e-6, 1.0), data=st.data())
def test_nvidia_with_its_off_by_one(total: int, share: float, peak: float, data: st.DataObject) -> None:
    """NVIDIA's update number n = 1, 2, … has progress n / T: peak · progress / share below the share, then
    peak · √(1 − progress). Ours is that, the decay one update later, the warm-up's length rounded."""
    schedule = ScheduleConfig(warmup_share=share, power=0.5, decay_from="start")
    warmup = schedule.warmup(total)
    assert abs(warmup - share * total) <= 0.5
    step = data.draw(st.integers(0, total - 1))
    ours = learning_rate(step, schedule, peak=peak, total_steps=total)
    rising = peak * ((step + 1) / total) / (warmup / total) if warmup else math.inf
    theirs = rising if step < warmup else peak * math.sqrt(1 - step / total)
    assert ours == pytest.approx(theirs, rel=1e-9)


@given(
    total=st.integers(10, 20_000),
    warmup=st.integers(1, 9),
    decay_rate=st.floats(0.5, 1.0),
    decay_steps=st.integers(1, 500),
    lr=st.floats(1e-5, 0.1),
    offset=st.floats(0.0, 0.01),
    data=st.data(),
)
def test_bing_bert_ee(
    total: int, warmup: int, decay_rate: float, decay_steps: int, lr: float, offset: float, data: st.DataObject
) -> None:
    """bing_bert at step s = 0, 1, …, x = s / T: offset + lr · (x / share)² below the share, then offset + lr ·
    rate^((s − share · T) / decay_steps). Ours is that, the warm-up one update earlier."""
    schedule = ScheduleConfig(
        warmup_steps=warmup,
        warmup_power=2,
        decay="exponential",
        decay_rate=decay_rate,
        decay_steps=decay_steps,
        initial_lr=offset,
        final_lr=offset,
    )
    step = data.draw(st.integers(0, total - 1))
    share = warmup / total
    decayed = decay_rate ** ((step - share * total) / decay_steps)
    theirs = offset + lr * (((step + 1) / total / share) ** 2 if step < warmup else decayed)
    assert learning_rate(step, schedule, peak=lr + offset, total_steps=total) == pytest.approx(theirs, rel=1e-6)


def test_masking_rate_is_linear_and_stays_within_its_ends() -> None:
    assert masking_rate(7, 0.15, None, total_steps=5) == 0.15
    rates = [masking_rate(step, 0.3, 0.15, total_steps=11) for step in range(14)]
    assert rates[0] == 0.3
    assert rates[5] == pytest.approx(0.225)
    assert rates[10:] == [0.15] * 4
    assert masking_rate(0, 0.3, 0.15, total_steps=1) == 0.3
    for steps in range(2, 200):
        assert all(0.1 <= masking_rate(step, 0.1, 0.7, total_steps=steps) <= 0.7 for step in range(steps + 1))
