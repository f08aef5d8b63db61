"""What `maskvr benchmark` prints."""

import pytest

from maskvr_ds.benchmarks.training import _show


def test_spreads_are_a_table_and_rates_are_no_powers_of_ten(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "what": "step",
        "uniform_seconds_median": 0.25,
        "a_longer_strategy_than_others_adds_min": -0.01,
        "a_longer_strategy_than_others_adds_median": 0.05,
        "a_longer_strategy_than_others_adds_max": 0.1,
        "rows_per_cpu_second_min": 877_600.4,
        "rows_per_cpu_second_median": 946_100.0,
        "rows_per_cpu_second_max": 1_022_000.0,
    }
    _show(figures)
    what, alone, head, adds, rates, note = capsys.readouterr().out.splitlines()
    assert (what.split(), alone.split()) == (["what", "step"], ["uniform_seconds_median", "0.25"])
    assert head.split() == ["median", "min", "max"]
    assert adds.split() == ["a_longer_strategy_than_others_adds", "+5.0%", "-1.0%", "+10.0%"]
    assert rates.split() == ["rows_per_cpu_second", "946,100", "877,600", "1,022,000"]
    assert len({len(line) for line in (head, adds, rates)}) == 1, "aligned"
    assert note.startswith("adds: ")
