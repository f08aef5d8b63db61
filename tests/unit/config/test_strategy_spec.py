import pytest

from maskvr_ds.config.base import ConfigError
from maskvr_ds.config.strategy_spec import parse_strategies, parse_strategy

COMMON = {"rate": 0.2, "mask_probability": 1.0, "random_probability": 0.0}


def test_settings_find_their_section() -> None:
    spec = parse_strategy("mapnet:floor=0.1,rate=0.3,optimizer.lr=0.02")
    assert spec.assignments == ("masking.strategy=mapnet", "mapnet.floor=0.1", "masking.rate=0.3", "optimizer.lr=0.02")
    spec = parse_strategy("auto:every_steps=50,lr=0.01,rate=0.3")
    assert spec.assignments == ("masking.strategy=auto", "auto.every_steps=50", "mapnet.lr=0.01", "masking.rate=0.3")
    assert parse_strategy("frequency:floor=0.1").masking(COMMON).floor == 0.1
    masking = parse_strategy("fully_explored:placement=same_batch,segments_per_sequence=3").masking(COMMON)
    assert (masking.segments_per_sequence, masking.rate, masking.mask_probability) == (3, 0.2, 1.0)
    oracle = parse_strategy("oracle_gradient:floor=0.05")
    assert oracle.masking(COMMON).strategy == "mapnet"
    assert oracle.floor(0.3) == 0.05
    assert parse_strategy("mapnet").floor(0.3) == 0.3


def test_names_of_files() -> None:
    texts = ["fully_explored:placement=same_batch", "uniform", "span:optimizer.lr=1e-3,span_maximum=5"]
    folders = [parse_strategy(text).folder for text in texts]
    assert folders == ["fully_explored_placement=same_batch", "uniform", "span_optimizer.lr=1e-3_span_maximum=5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:", "strategy, or strategy:setting=value"),
        ("uniform:rate", "strategy, or strategy:setting=value"),
        (":rate=0.2", "strategy, or strategy:setting=value"),
        ("unifrom", "unifrom: strategy: Input should be 'uniform'"),
        ("uniform:colour=red", "uniform:colour=red: colour: unknown key; known here: strategy"),
        ("uniform:optimizer.lr=1", "optimizer cannot be changed here"),
        ("auto", "auto: auto goes from one strategy to another; name those"),
        ("uniform:rate=2", "rate: Input should be less than 1"),
    ],
)
def test_faults(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_strategy(text).masking(COMMON)


def test_faults_of_the_network() -> None:
    with pytest.raises(ConfigError, match="layers belongs to training; only floor counts here"):
        parse_strategy("mapnet:layers=3").floor(0.3)
    with pytest.raises(ConfigError, match="floor: Input should be greater than 0"):
        parse_strategy("mapnet:floor=0").floor(0.3)


def test_order_and_repetition() -> None:
    assert [s.text for s in parse_strategies(["span", "uniform"], first="uniform")] == ["uniform", "span"]
    assert [s.text for s in parse_strategies(["span"])] == ["span"]
    with pytest.raises(ConfigError, match="span: named twice"):
        parse_strategies(["span", "uniform", "span"])
