"""Options of `maskvr variance` that name strategies."""

import pytest

from maskvr_ds.analysis.gradient_variance.options import read_seconds, with_rates
from maskvr_ds.config import ConfigError
from maskvr_ds.config.strategy_spec import parse_strategies


def test_every_strategy_at_every_rate() -> None:
    texts = with_rates(["span:max_length=5", "oracle_mask"], [0.15, 0.3])
    assert texts == [
        "span:max_length=5",
        "oracle_mask",
        "uniform:rate=0.15",
        "uniform:rate=0.3",
        "span:max_length=5,rate=0.15",
        "span:max_length=5,rate=0.3",
    ]
    specs = parse_strategies(texts, first="uniform")
    assert specs[-1].masking({"rate": 0.2}).rate == 0.3
    assert with_rates(["uniform"], []) == ["uniform"]


def test_seconds_of_all_strategies_or_none() -> None:
    names = ["uniform", "span:max_length=5"]
    assert read_seconds([], names) == {}
    assert read_seconds(["uniform=1.5", "span:max_length=5=2"], names) == {"uniform": 1.5, "span:max_length=5": 2.0}
    for given, said in (
        (["uniform=1"], "--seconds: missing for span:max_length=5"),
        (["uniform=0", "span:max_length=5=2"], "--seconds uniform=0: STRATEGY=SECONDS expected"),
        (["other=1"], "--seconds other=1: STRATEGY=SECONDS expected, for one of uniform"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_seconds(given, names)
