"""Stages of a schedule of the rate: room for every mask, few shapes, masks and losses of the widest shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.config import MaskingConfig
from maskvr_ds.masking.rates import (
    STAGES,
    Stage,
    hidden_in,
    masking_rate,
    maximum_predictions,
    shares_of_stages,
    stage_at,
    stages,
)
from tests.unit.masking.test_strategies import DRAWN, masker, tokens

rates = st.floats(0.01, 0.99)


@given(st.integers(3, 600), rates, st.none() | rates, st.floats(0, 1))
def test_every_mask_has_room_and_shapes_are_few(length: int, rate: float, final: float | None, t: float) -> None:
    found = stages(length, rate, final)
    ends = [maximum_predictions(length, each) for each in (rate, rate if final is None else final)]
    assert [stage.slots for stage in found] == sorted({stage.slots for stage in found}, reverse=True)
    assert len(found) <= STAGES
    assert (found[0].slots, found[-1].slots) == (max(ends), min(ends))
    # The numbers of predictions between the ends are divided among the stages.
    assert sum(stage.slots - stage.fewest + 1 for stage in found) == max(ends) - min(ends) + 1
    now = rate if final is None else min(max(rate + t * (final - rate), min(rate, final)), max(rate, final))
    stage = stage_at(found, length, now)
    needed = maximum_predictions(length, now)
    assert stage.fewest <= needed <= stage.slots
    # Distances between stages are equal, up to rounding.
    assert stage.slots - needed <= (max(ends) - min(ends)) / (STAGES - 1)


@pytest.mark.parametrize("decay", ["linear", "cosine", "step"])
@pytest.mark.parametrize(("rate", "final"), [(0.45, 0.15), (0.15, 0.45), (0.3, 0.3)])
def test_slots_follow_the_schedule(decay: str, rate: float, final: float) -> None:
    found, total = stages(128, rate, final), 400
    course = [
        stage_at(found, 128, masking_rate(step, rate, final, total_steps=total, decay=decay)).slots
        for step in range(total + 50)
    ]
    assert course == sorted(course, reverse=rate > final)
    assert len(set(course)) == {"step": 2}.get(decay, STAGES) if rate != final else len(set(course)) == 1
    assert course[-1] == maximum_predictions(128, final)
    masking = MaskingConfig.model_validate({"rate": rate, "final_rate": final, "rate_decay": decay})
    for first, steps in ((0, total), (100, 250)):
        shares = shares_of_stages(masking, 128, first=first, steps=steps, total_steps=total)
        part = course[first : first + steps]
        assert {stage.slots: share for stage, share in shares} == {
            slots: pytest.approx(part.count(slots) / steps) for slots in dict.fromkeys(part)
        }
        assert [stage.slots for stage, _ in shares] == list(dict.fromkeys(part))


def test_shares_of_a_long_schedule_are_those_of_all_of_its_steps() -> None:
    """Though only a thousand of them are looked at."""
    masking = MaskingConfig.model_validate({"rate": 0.45, "final_rate": 0.15})
    found, total = stages(128, 0.45, 0.15), 9000
    course = [stage_at(found, 128, masking_rate(step, 0.45, 0.15, total_steps=total)) for step in range(total)]
    for first, steps in ((0, total), (2000, 4321)):
        shares = dict(shares_of_stages(masking, 128, first=first, steps=steps, total_steps=total))
        part = course[first : first + steps]
        assert shares == {stage: pytest.approx(part.count(stage) / steps, abs=2e-3) for stage in set(part)}


@pytest.mark.parametrize("strategy", DRAWN)
def test_masks_are_those_of_the_widest_shape(strategy: str) -> None:
    """Positions, labels and weights in the slots that are used, and what the model sees; the other slots count 0."""
    batch = tokens(40, 64)
    draw, wide = (masker(strategy, 64, rate=0.45, final_rate=0.15) for _ in range(2))
    # 28 to 9 predictions in stages of 28, 25, 21, 17, 13 and 9.
    for rate, K in ((0.45, 28), (0.4, 25), (0.3, 21), (0.21, 13), (0.16, 13), (0.15, 9)):
        draw.set_rate(rate)
        wide.set_rate(rate)
        wide.stage = wide.stages[0]
        ours, theirs = draw(batch), wide(batch)
        assert ours.positions.shape == (40, K)
        assert theirs.positions.shape == (40, 28)
        assert torch.equal(ours.input_ids, theirs.input_ids)
        used = ours.weights != 0
        assert not theirs.weights[:, K:].any()
        for name in ("positions", "labels"):
            assert torch.equal(getattr(ours, name)[used], getattr(theirs, name)[:, :K][used])
        torch.testing.assert_close(ours.weights, theirs.weights[:, :K], rtol=1e-6, atol=0)


def test_hidden_positions_follow_the_stage() -> None:
    masking = MaskingConfig.model_validate({"rate": 0.45, "final_rate": 0.15})
    found = stages(128, 0.45, 0.15)
    assert [hidden_in(masking, 128, stage) for stage in found] == [stage.fewest for stage in found]
    assert found[0] == Stage(57, 51)
    assert found[-1] == Stage(19, 19)
    (constant,) = stages(128, 0.3, None)
    assert constant == Stage(38, 38)
    # Segments have one length throughout: 126 // 7.
    explored = masking.model_copy(update={"strategy": "fully_explored", "rate": 0.15, "final_rate": 0.145})
    assert {hidden_in(explored, 128, stage) for stage in stages(128, 0.15, 0.145)} == {18}
    # Those of the lowest rate too, to which strategy auto may fall.
    auto = masking.model_copy(update={"strategy": "auto"})
    assert {hidden_in(auto, 128, stage) for stage in stages(128, 0.45, None)} == {18}
