"""Decisions of strategy auto: enumerated cases, and what holds for any measurements."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.training.auto_choice import (
    PROPOSAL,
    SEGMENTS,
    UNIFORM,
    Interval,
    MaskingPlan,
    ProposalTrial,
    Rating,
    best_plan,
    ladder,
    next_plan,
    plain,
    reason,
    same_round_share,
    segment_counts,
)

HIGH, MIDDLE, LOW = (MaskingPlan(UNIFORM, 1, rate) for rate in (0.45, 0.3, 0.15))
HALVES, PROPOSED = MaskingPlan(SEGMENTS, 2, 0.45), MaskingPlan(PROPOSAL, 1, 0.45)
NAN = math.nan
SAME = (1.0, 1.0, 1.0)


def best(current: MaskingPlan, fallback: MaskingPlan = HIGH, **others: Any) -> MaskingPlan:
    """others: name of a plan above → (interval of progress, relative seconds)."""
    ratings = {current: Rating(SAME, 1.0)} | {globals()[name]: Rating(*rating) for name, rating in others.items()}
    return best_plan(ratings, current, fallback)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, HIGH),
        ({"MIDDLE": ((1.2, 1.1, 1.3), 1.0)}, MIDDLE),
        # Better, but not surely.
        ({"MIDDLE": ((1.2, 0.9, 1.5), 1.0)}, HIGH),
        # Equal: a tie stays.
        ({"MIDDLE": (SAME, 1.0)}, HIGH),
        # Less progress in far less time, and more progress in far more time.
        ({"LOW": ((0.9, 0.88, 0.92), 0.8)}, LOW),
        ({"PROPOSED": ((1.1, 1.09, 1.11), 1.12)}, HIGH),
        ({"PROPOSED": ((1.1, 1.09, 1.11), 1.05)}, PROPOSED),
        # The largest estimate among the sure ones.
        ({"MIDDLE": ((1.2, 1.1, 1.3), 1.0), "LOW": ((1.3, 1.2, 1.4), 1.0), "HALVES": ((1.5, 0.9, 2.5), 1.0)}, LOW),
        # Undefined estimates and intervals change nothing.
        ({"MIDDLE": ((NAN, NAN, NAN), 1.0), "LOW": ((1.3, NAN, NAN), 1.0)}, HIGH),
        ({"MIDDLE": ((math.inf, math.inf, math.inf), 1.0)}, HIGH),
    ],
)
def test_the_best_plan(others: dict[str, Any], expected: MaskingPlan) -> None:
    assert best(HIGH, **others) == expected


def test_the_plain_plan_of_the_present_rate_needs_no_proof() -> None:
    assert best(PROPOSED, HIGH=((1.01, 0.8, 1.3), 1.0)) == HIGH
    assert best(PROPOSED, HIGH=((0.99, 0.8, 1.3), 1.0)) == PROPOSED
    # By its seconds: the proposal makes 5% more progress in 12% more time.
    assert best(PROPOSED, HIGH=((0.95, 0.9, 1.0), 1 / 1.12)) == HIGH
    # That of another rate does.
    assert best(PROPOSED, MIDDLE=((1.01, 0.8, 1.3), 1.0)) == PROPOSED


def test_a_higher_rate_does_not_hide_a_lower_one_that_is_better() -> None:
    better = {"HIGH": ((2.0, 1.9, 2.1), 1.0), "LOW": ((1.3, 1.2, 1.4), 1.0)}
    assert best(MIDDLE, **better) == LOW


def course(measured: list[MaskingPlan], start: MaskingPlan = HIGH) -> list[MaskingPlan]:
    plan, before, taken = start, start, []
    for each in measured:
        plan, before = next_plan(each, before, plan), each
        taken.append(plan)
    return taken


def test_a_change_takes_two_measurements() -> None:
    assert course([HALVES, HIGH, HALVES, HALVES, HIGH, HIGH]) == [HIGH] * 3 + [HALVES] * 2 + [HIGH]
    assert course([HALVES, PROPOSED, PROPOSED]) == [HIGH, HIGH, PROPOSED]


def test_two_lower_rates_agree_on_the_higher_one() -> None:
    assert course([LOW, MIDDLE, LOW, LOW]) == [HIGH, MIDDLE, MIDDLE, LOW]
    assert course([MIDDLE, LOW, LOW]) == [HIGH, MIDDLE, LOW]
    # Not with segments at the present rate.
    assert course([HALVES, LOW, HALVES]) == [HIGH] * 3


PLANS = st.builds(
    MaskingPlan, st.sampled_from((UNIFORM, SEGMENTS, PROPOSAL)), st.integers(1, 3), st.sampled_from((0.15, 0.3, 0.45))
)
INTERVALS: st.SearchStrategy[Interval] = st.one_of(
    st.just((NAN, NAN, NAN)),
    st.floats(0.01, 10).map(lambda x: (x, NAN, NAN)),
    st.lists(st.floats(0.01, 10), min_size=3, max_size=3).map(sorted).map(lambda x: (x[1], x[0], x[2])),
)
RATINGS = st.dictionaries(PLANS, st.builds(Rating, INTERVALS, st.floats(0.1, 10)), max_size=6)


@given(PLANS, PLANS, st.lists(RATINGS, min_size=1, max_size=8))
def test_what_holds_for_any_measurements(start: MaskingPlan, fallback: MaskingPlan, measured: list[Any]) -> None:
    """The rate never rises, nothing is taken that one of the last two measurements did not find best, no change after
    a single measurement, and always a reason."""
    plan = before = start
    for ratings in measured:
        found = best_plan({plan: Rating(SAME, 1.0), **ratings}, plan, fallback)
        chosen = next_plan(found, before, plan)
        assert chosen.rate <= plan.rate
        assert found == plan or ratings[found].per_second[0] > 1
        assert found in (plan, fallback) or ratings[found].per_second[1] > 1
        if chosen != plan:
            assert chosen in (found, before)
            assert found != plan
            assert before != plan or before == found
        assert reason({plan: Rating(SAME, 1.0), **ratings}, found, chosen, plan)
        plan, before = chosen, found


@given(st.floats(0.02, 0.9), st.floats(0.02, 0.9))
def test_rates_fall_in_steps_of_at_most_one_and_a_half(one: float, two: float) -> None:
    high, low = max(one, two), min(one, two)
    rates = ladder(high, low)
    assert (rates[0], rates[-1]) == (high, low)
    assert list(rates) == sorted(set(rates), reverse=True)
    assert all(a / b <= 1.5 + 0.01 for a, b in pairwise(rates))
    assert ladder(high, None) == (high,)


def test_ladder() -> None:
    assert ladder(0.45, 0.15) == (0.45, 0.312, 0.2163, 0.15)
    assert ladder(0.3, 0.3) == (0.3,)


def test_segments_that_a_batch_can_have() -> None:
    assert segment_counts(126, 0.15, 64) == (2, 4)  # of 7
    assert segment_counts(126, 0.15, 42) == (2, 3, 6, 7)
    assert segment_counts(126, 0.15, 13) == ()
    assert segment_counts(6, 0.6, 64) == (2,)


def test_the_plain_plan_predicts_as_many_tokens_as_uniform_masks() -> None:
    assert plain(126, 0.15) == MaskingPlan(UNIFORM, 1, 0.15)  # 18 instead of 19
    assert plain(126, 1 / 7) == MaskingPlan(SEGMENTS, 1, 1 / 7)
    for rate in (0.15, 0.19, 0.24, 0.3, 0.4, 0.6):
        assert plain(126, rate).strategy == UNIFORM
    # Packed rows: one with two documents more makes 17.7 predictions instead of 18.
    assert plain(Counter([126] * 10), 1 / 7).strategy == SEGMENTS
    assert plain(Counter([126] * 9 + [124]), 1 / 7).strategy == UNIFORM
    # All counted rows may have special tokens only.
    assert plain(Counter(), 1 / 7).rate == 1 / 7


@pytest.mark.parametrize(
    ("copies", "of_row", "share"), [(4, 7, 32 / 42), (7, 7, 1), (1, 7, 1), (2, 4, 1), (2, 3, 2 / 3)]
)
def test_share_of_pairs_in_one_round(copies: int, of_row: int, share: float) -> None:
    """By the loader's epochs: e · J + j, of which fully_explored predicts segment epoch mod S of round epoch div S."""
    epochs = np.arange(copies * of_row * 20).reshape(-1, copies)
    rounds = epochs // of_row
    pairs = [rounds[:, a] == rounds[:, b] for a in range(copies) for b in range(a)]
    assert same_round_share(copies, of_row) == pytest.approx(np.mean(pairs) if pairs else 1)
    assert same_round_share(copies, of_row) == pytest.approx(share)


def test_mapnet_is_trained_only_while_it_may_pay() -> None:
    """Promising, used and best at each measurement → whether it is trained after it."""
    nothing = (False, False, False)
    hope, best_so_far, used = (True, False, False), (True, False, True), (True, True, True)

    def trained(*measured: tuple[bool, bool, bool]) -> list[bool]:
        trial, found = ProposalTrial(), []
        for promising, is_used, is_best in measured:
            trial = trial.after(promising=promising, used=is_used, best=is_best)
            found.append(trial.learning)
        return found

    assert trained(*[nothing] * 5) == [False] * 5
    # Two measurements on trial, then off for 1, 2, 4 … measurements.
    assert trained(*[hope] * 14) == [
        *(True, True, False),
        *(False, True, True, False),
        *(False, False, True, True, False),
        *(False, False),
    ]
    assert trained(hope, hope, best_so_far, used, used) == [True] * 5
    # No longer worth it; and once it was used, it gets another trial.
    assert trained(hope, nothing) == [True, False]
    assert trained(hope, best_so_far, used, hope, hope, hope, hope) == [True] * 4 + [False, False, True]


def test_trials_take_a_vanishing_share_of_the_time() -> None:
    trial, learning = ProposalTrial(), 0
    for _ in range(1000):
        trial = trial.after(promising=True, used=False, best=False)
        learning += trial.learning
    assert learning <= 20


def test_reasons_name_the_numbers() -> None:
    ratings = {HIGH: Rating(SAME, 1.0), LOW: Rating((1.2, 1.1, 1.3), 1.0)}
    told = "uniform at rate 0.15 makes 1.200 [1.100, 1.300] times the progress per second"
    assert reason(ratings, LOW, LOW, HIGH) == f"{told}, in two measurements"
    assert reason(ratings, LOW, HIGH, HIGH) == f"{told}; taken if the next measurement agrees"
    assert reason(ratings, LOW, MIDDLE, HIGH) == f"{told}; the measurement before preferred {MIDDLE}"
    assert reason(ratings, HIGH, HIGH, HIGH) == f"no plan is better: {told}"
    unknown = {HIGH: Rating(SAME, 1.0), LOW: Rating((NAN, NAN, NAN), 1.0)}
    assert "masking.auto.rows" in reason(unknown, HIGH, HIGH, HIGH)
    assert reason({HIGH: Rating(SAME, 1.0)}, HIGH, HIGH, HIGH) == "there is no other plan"
