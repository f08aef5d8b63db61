"""How often strategy auto measures: the share of the seconds of the steps that measurements take, and what is said."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.config import AutoConfig
from maskvr_ds.training.auto_choice import PROPOSAL, SEGMENTS, UNIFORM, MaskingPlan
from maskvr_ds.training.auto_spacing import FEW, Spacing, kinds_of_masks, most_passes, warnings
from maskvr_ds.training.step_costs import StepCosts

seconds = st.floats(1e-4, 1e3)
RATES = (0.45, 0.3, 0.15)


@st.composite
def all_costs(draw: st.DrawFn) -> StepCosts:
    of_rates = st.fixed_dictionaries(dict.fromkeys(RATES, seconds))
    added = st.fixed_dictionaries({SEGMENTS: st.floats(0, 10), PROPOSAL: st.floats(0, 10)})
    late = draw(st.dictionaries(st.integers(1, 3), of_rates, max_size=2))
    return StepCosts(draw(of_rates), draw(added), {}, late, draw(st.floats(1e-7, 10)))


def plans(costs: StepCosts) -> list[MaskingPlan]:
    return [
        MaskingPlan(strategy, 1, rate, late)
        for strategy in (UNIFORM, SEGMENTS, PROPOSAL)
        for rate in RATES
        for late in (0, *costs.late)
    ]


@given(
    all_costs(),
    st.integers(1, 2000),
    st.floats(0.001, 1),
    st.integers(1, 300),
    st.integers(0, 10_000),
    st.none() | st.integers(0, 2000),
    st.integers(8, 5000),
    st.data(),
)
def test_measurements_take_at_most_their_share_whatever_is_chosen(
    costs: StepCosts,
    asked: int,
    share: float,
    per_row: int,
    first: int,
    extra: int | None,
    available: int,
    data: st.DataObject,
) -> None:
    most_rows = None if extra is None else 8 + extra
    config = AutoConfig(every_steps=asked, max_share=share, rows=8, max_rows=most_rows)
    spacing = Spacing.of(config, costs, 8 * per_row, available)
    most = spacing.rows * per_row
    assert costs.per_pass is not None
    assert spacing.every >= asked
    largest = min(16 * 8 if most_rows is None else most_rows, available)
    assert 8 <= spacing.rows <= largest
    assert spacing.price == pytest.approx(most * costs.per_pass / costs.shortest)
    assert spacing.price is not None
    assert spacing.price <= share * spacing.every * (1 + 1e-9)
    # No fewer rows than fit, and no more time between measurements than the fewest need.
    if spacing.rows < largest:
        assert (spacing.rows + 1) * per_row * costs.per_pass > share * asked * costs.shortest * (1 - 1e-9)
    if spacing.rows > 8:
        assert spacing.every == asked
    # Any plan, and any number of passes, between two measurements.
    of_steps = of_measurements = 0.0
    step = first
    for _ in range(6):
        multiples = ((step // spacing.every + i) * spacing.every for i in (1, 2))
        due = next(s for s in multiples if spacing.due(s, first))
        of_steps += (due - step) * costs.seconds(data.draw(st.sampled_from(plans(costs))))
        of_measurements += data.draw(st.integers(1, most)) * costs.per_pass
        assert of_measurements <= share * of_steps * (1 + 1e-9)
        step = due
    # No longer than necessary: one step less would be above the share, with the shortest steps.
    if spacing.every > asked:
        assert most * costs.per_pass > share * (spacing.every - 1) * costs.shortest * (1 - 1e-9)
    assert costs.shortest == min(map(costs.seconds, plans(costs)))


@given(
    st.integers(1, 50),
    st.none() | st.floats(0.01, 100),
    st.none() | st.floats(0.01, 1),
    st.integers(0, 60),
    st.integers(0, 300),
)
def test_the_count_is_that_of_the_due_steps(
    every: int, price: float | None, share: float | None, first: int, steps: int
) -> None:
    spacing = Spacing(every, 32, price, every, share)
    last = first + steps
    assert spacing.count(first, last) == sum(spacing.due(step, first) for step in range(first + 1, last))


def test_without_a_limit_or_a_price_it_is_every_steps() -> None:
    """In the second phase, too, at the run's multiples: as in earlier versions."""
    costs = StepCosts({0.15: 1.0}, {}, {}, per_pass=1.0)
    for found in (
        Spacing.of(AutoConfig(every_steps=10, max_share=None), costs, 500, 1000),
        Spacing.of(AutoConfig(every_steps=10), replace(costs, per_pass=None), 500, 1000),
    ):
        assert found.rows == 32
        assert [step for step in range(8, 41) if found.due(step, 7)] == [10, 20, 30, 40]
    limited = Spacing.of(AutoConfig(every_steps=10, max_share=0.5), costs, 5, 32)
    # The phase's first measurement is preceded by as many steps as the others.
    assert [step for step in range(8, 41) if limited.due(step, 7)] == [20, 30, 40]


def test_the_most_expensive_measurement() -> None:
    """Of all plans: of every rate, and at the highest one of every layer, with the goal's masks."""
    config = AutoConfig(rows=10, draws=3)
    # Five positions have no segments in a batch of 7; the rate of the goal is one of the rates.
    assert most_passes(config, RATES, 5, 7, proposal=False) == 2 * 10 * 3 * 3
    assert most_passes(config, RATES, 5, 6, proposal=True) == 2 * 10 * 3 * (3 + 2)
    assert most_passes(config, (0.45,), 5, 7, proposal=False) == 2 * 10 * 3 * 2
    late = config.model_copy(update={"late_layers": (2, 4)})
    # Say with [MASK] from layer 4: three rates, two other layers, and the goal's masks from the first.
    assert most_passes(late, RATES, 5, 7, proposal=False) == 2 * 10 * 3 * (3 + 2 + 1)
    assert kinds_of_masks([(0.45, 4), (0.15, 4)], segments=True, proposal=False) == 4


def test_what_is_said() -> None:
    costs = StepCosts({0.45: 2.0, 0.15: 1.0}, {}, {}, per_pass=0.1)
    config = AutoConfig(every_steps=100)
    limited = Spacing.of(config, costs, 600, 1000)
    assert str(limited) == (
        "measures on 32 rows every 1,200 steps: a measurement costs as much as 60 steps, at most 5% of the seconds of "
        "the steps (masking.auto.max_share)"
    )
    assert warnings(limited, 0, 4 * 1200 + 1) == []
    (short,) = warnings(limited, 100, 600)
    assert short == (
        "masking.strategy auto: 500 steps have room for no measurements, one every 1,200 steps, and a change takes two "
        "that agree: the masks hardly change. Set masking.strategy to a fixed one, train longer, or raise "
        "masking.auto.max_share"
    )
    cheap = Spacing.of(config, costs, 10, 32)
    assert str(cheap) == (
        "measures on 32 rows every 100 steps: a measurement costs as much as 1 step, 1% of the seconds of the steps"
    )
    # The seconds that are left of the limit are spent on rows.
    more = Spacing.of(config, costs, 10, 1000)
    assert str(more) == (
        "measures on 160 rows every 100 steps: a measurement costs as much as 5 steps, 5% of the seconds of the steps"
    )
    assert Spacing.of(config.model_copy(update={"max_rows": 100}), costs, 10, 1000).rows == 100
    assert Spacing.of(config, costs, 1, 1000).rows == 16 * 32
    (few,) = warnings(cheap, 0, 4 * 100)
    assert "room for 3 measurements, one every 100 steps" in few
    assert few.endswith("or lower masking.auto.every_steps")
    assert warnings(cheap, 0, 4 * 100 + 1) == []
    assert "room for 1 measurement, one" in warnings(cheap, 0, 101)[0]
    unlimited = Spacing.of(config.model_copy(update={"max_share": None}), costs, 600, 1000)
    assert str(unlimited).endswith("a measurement costs as much as 60 steps, without a limit")
    assert warnings(unlimited, 0, 1000) == []
    assert FEW == 4


def test_costs_of_earlier_versions_have_no_price() -> None:
    """Readable; the limit is not applied, which is said."""
    old = StepCosts.read({"uniform": [[0.15, 1.0]], "added": {}, "machine": {}})
    assert old.per_pass is None
    assert "per_pass" not in old.stored()
    found = Spacing.of(AutoConfig(every_steps=10), old, 600, 1000)
    assert found.every == 10
    assert str(found) == "measures on 32 rows every 10 steps: what a measurement takes is not known"
    (text,) = warnings(found, 0, 1000)
    assert text.startswith("masking.auto.max_share 0.05: not applied: the run or its costs are from an earlier version")
    assert "every 10 steps" in text
    assert warnings(Spacing.of(AutoConfig(every_steps=10, max_share=None), old, 600, 1000), 0, 1000) == []
    new = StepCosts.read({**old.stored(), "per_pass": 0.5})
    assert new.stored()["per_pass"] == 0.5
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="seconds of a pass in a measurement must be positive"):
            StepCosts.read({**old.stored(), "per_pass": wrong})
