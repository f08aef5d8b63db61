"""Robust statistics against plain definitions."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.analysis.health.series import growth, levels, noise, runs, spread, trailing


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(3, 20), st.integers(3, 10))
def test_trailing_statistics_are_those_of_the_values_before(values: list[float], window: int, fewest: int) -> None:
    medians, deviations = trailing(np.array(values), window, fewest)
    for i in range(len(values)):
        before = np.array(values[max(0, i - window) : i])
        if len(before) < fewest:
            assert np.isnan(medians[i])
        else:
            assert medians[i] == np.median(before)
            assert deviations[i] == pytest.approx(noise(before), abs=1e-9)


def test_missing_values_are_no_values() -> None:
    medians, _ = trailing(np.array([1.0, np.nan, 3.0, 2.0, 5.0]), 4, 3)
    np.testing.assert_array_equal(medians, [np.nan, np.nan, np.nan, np.nan, 2.0])


def test_spread_and_noise_of_normal_values() -> None:
    values = np.random.default_rng(0).normal(0, 2.0, 100_000)
    assert spread(values) == pytest.approx(2.0, rel=0.02)
    # A trend is no noise.
    assert noise(values + np.linspace(0, 100, len(values))) == pytest.approx(2.0, rel=0.02)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4))
def test_runs_cover_the_flags(flags: list[bool], gap: int) -> None:
    found = runs(np.array(flags, dtype=bool), gap)
    covered = {i for first, last in found for i in range(first, last + 1)}
    assert {i for i, flag in enumerate(flags) if flag} <= covered
    assert all(flags[first] and flags[last] for first, last in found)
    assert all(later[0] - earlier[1] > gap for earlier, later in pairwise(found))


@pytest.mark.parametrize("decades", [-2.0, 0.0, 1.5])
def test_growth_is_that_of_an_exponential(decades: float) -> None:
    steps = np.arange(2000) / 2000
    noisy = 10 ** (decades * steps) * np.random.default_rng(1).lognormal(0, 0.3, 2000)
    noisy[::97] *= 1e4  # outliers
    # Between the middles of the first and the last of 20 blocks.
    assert growth(noisy) == pytest.approx(decades * 19 / 20, abs=0.06)


def test_growth_of_zeros_is_unknown() -> None:
    assert np.isnan(growth(np.zeros(100)))


def test_levels() -> None:
    np.testing.assert_array_equal(levels(np.array([1.0, 5.0, 2.0, 9.0]), 3), [2.0, 5.0])
