"""Learning rate against torch's schedulers and against published formulas in their own step counting; edge cases."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import optimization

from maskvr_ds.config import RunConfig, ScheduleConfig
from maskvr_ds.masking.rates import masking_rate
from maskvr_ds.training.schedule import learning_rate


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


W, T, PEAK, LOWEST = 7, 60, 0.02, 0.002
# Ours -> transformers' scheduler, which reads `optimizer`.
THEIRS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "constant": ({"decay": "constant"}, lambda o: optimization.get_constant_schedule_with_warmup(o, W)),
    "linear": ({"decay": "linear"}, lambda o: optimization.get_linear_schedule_with_warmup(o, W, T)),
    "default": ({}, lambda o: optimization.get_linear_schedule_with_warmup(o, W, T)),
    "cosine": ({"decay": "cosine"}, lambda o: optimization.get_cosine_schedule_with_warmup(o, W, T)),
    "cosine to a minimum": (
        {"decay": "cosine", "final_lr": LOWEST},
        lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, W, T, min_lr=LOWEST),
    ),
    "polynomial": (
        {"power": 2.5, "final_lr": LOWEST},
        lambda o: optimization.get_polynomial_decay_schedule_with_warmup(o, W, T, lr_end=LOWEST, power=2.5),
    ),
    **{
        f"wsd {theirs}": (
            {"decay": ours, "cooldown_steps": 20, "final_lr": LOWEST},
            lambda o, theirs=theirs: optimization.get_wsd_schedule(
                o, W, 20, num_stable_steps=T - W - 20, decay_type=theirs, min_lr_ratio=LOWEST / PEAK
            ),
        )
        for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("1-sqrt", "1-sqrt"))
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_against_transformers(name: str) -> None:
    """From the end of the warm-up to the end of the schedule; before it, theirs is one update behind."""
    ours, make = THEIRS[name]
    schedule = ScheduleConfig(warmup_steps=W, **ours)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer)
    theirs = []
    for _ in range(T + 5):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [learning_rate(step, schedule, peak=PEAK, total_steps=T) for step in range(T + 5)]
    assert found[W : T + 1] == pytest.approx(theirs[W : T + 1], rel=1e-9, abs=1e-12)
    assert found[T:] == [found[T]] * 5, "their cosine rises again"
    if "minimum" not in name and not ours.get("cooldown_steps"):  # theirs warm up from the minimum
        assert found[: W - 1] == pytest.approx(theirs[1:W], rel=1e-9)


@given(
    total=st.integers(2, 5000),
    share=st.floats(0.001, 1.0),
    decay=st.sampled_from(["polynomial", "linear", "cosine", "1-sqrt"]),
    data=st.data(),
)
def test_a_cooldown_by_share_and_its_closed_form(total: int, share: float, decay: str, data: st.DataObject) -> None:
    schedule = ScheduleConfig(decay=decay, cooldown_share=share, final_lr=0.1)
    length = max(1, round(share * total))
    step = data.draw(st.integers(0, total + 3))
    t = min(1.0, max(0, step - (total - length)) / length)
    left = {"cosine": 0.5 + 0.5 * math.cos(t * math.pi), "1-sqrt": 1 - t**0.5}.get(decay, 1 - t)
    assert learning_rate(step, schedule, peak=1.0, total_steps=total) == pytest.approx(0.1 + 0.9 * left, abs=1e-12)
    in_steps = ScheduleConfig(decay=decay, cooldown_steps=length, final_lr=0.1)
    assert learning_rate(step, in_steps, peak=1.0, total_steps=total) == learning_rate(
        step, schedule, peak=1.0, total_steps=total
    )


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 700))
def test_the_stable_part_does_not_depend_on_where_it_ends(stable: int, cooldown: int, step: int) -> None:
    """So that a decay can branch off any checkpoint of it."""
    forever = ScheduleConfig(warmup_steps=50, decay="constant")
    branch = ScheduleConfig(warmup_steps=50, decay="1-sqrt", cooldown_steps=cooldown)
    start = 50 + stable
    expected = learning_rate(step, forever, peak=0.3, total_steps=10**6)
    found = learning_rate(step, branch, peak=0.3, total_steps=start + cooldown)
    assert (found == expected) == (step <= start)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cooldown_steps": 3, "cooldown_share": 0.1}, "both set the length of the decay"),
        ({"decay": "constant", "cooldown_steps": 3}, "decay constant has no end"),
        (
            {"decay": "exponential", "decay_rate": 0.5, "decay_steps": 2, "cooldown_share": 0.1},
            "exponential has no end",
        ),
        ({"decay_from": "start", "cooldown_steps": 3}, "decay_from start begins the decay elsewhere"),
        ({"decay": "cosine", "power": 2}, "power and decay_from belong to decay polynomial"),
        ({"decay": "linear", "decay_from": "start"}, "power and decay_from belong to decay polynomial"),
        ({"decay": "constant", "final_lr": 0.1}, "decay constant never reaches it"),
        ({"decay": "cosine", "decay_rate": 0.5}, "decay_rate and decay_steps belong to decay exponential"),
        ({"decay": "wsd"}, "1-sqrt"),
    ],
)
def test_settings_that_would_be_ignored(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**fields)


def test_warm_up_and_cooldown_share_the_schedule() -> None:
    values = {"output_dir": "x", "data": {"path": "y"}, "training": {"steps": 10}}
    fits = {"warmup_share": 0.5, "cooldown_steps": 5}
    assert RunConfig.model_validate({**values, "schedule": fits}).schedule.decay_start(10) == 5
    with pytest.raises(ValidationError, match="the decay takes 6 of the schedule's 10 steps and the warm-up 5"):
        RunConfig.model_validate({**values, "schedule": {**fits, "cooldown_steps": 6}})


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


@pytest.mark.parametrize("decay", ["linear", "cosine", "step"])
def test_masking_rate_falls_to_its_end(decay: str) -> None:
    found = [masking_rate(step, 0.45, 0.15, total_steps=21, decay=decay) for step in range(25)]
    assert found[0] == 0.45
    assert found[20:] == [0.15] * 5
    assert all(b <= a for a, b in itertools.pairwise(found))
    middle = {"linear": 0.3, "cosine": 0.3, "step": 0.45}[decay]
    assert found[10] == pytest.approx(middle)
    if decay == "cosine":
        assert found[5] == pytest.approx(0.15 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)
    if decay == "step":
        assert sorted(set(found)) == [0.15, 0.45]
        assert found.index(0.15) == 11
    assert masking_rate(7, 0.3, None, total_steps=21, decay="linear") == 0.3
