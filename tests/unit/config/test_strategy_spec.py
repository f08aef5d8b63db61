import pytest

from maskvr_ds.config import MapNetConfig
from maskvr_ds.config.base import ConfigError
from maskvr_ds.config.strategy_spec import parse_strategies, parse_strategy

COMMON = {"rate": 0.2, "mask_probability": 1.0, "random_probability": 0.0}


def test_settings_find_their_section() -> None:
    spec = parse_strategy("mapnet:floor=0.1,rate=0.3,optimizer.lr=0.02")
    assert spec.assignments == (
        "masking.strategy=mapnet",
        "masking.mapnet.floor=0.1",
        "masking.rate=0.3",
        "optimizer.lr=0.02",
    )
    spec = parse_strategy("auto:every_steps=50,lr=0.01,rate=0.3")
    assert spec.assignments == (
        "masking.strategy=auto",
        "masking.auto.every_steps=50",
        "masking.mapnet.lr=0.01",
        "masking.rate=0.3",
    )
    assert parse_strategy("frequency:floor=0.1").masking(COMMON).frequency.floor == 0.1
    masking = parse_strategy("fully_explored:placement=same_batch,segments_per_sequence=3").masking(COMMON)
    assert (masking.fully_explored.segments_per_sequence, masking.rate, masking.mask_probability) == (3, 0.2, 1.0)
    oracle = parse_strategy("oracle_gradient:floor=0.05")
    assert oracle.masking(COMMON).strategy == "mapnet"
    trained = MapNetConfig(floor=0.4, sampler="conditional_poisson", estimator="hajek", layers=3)
    assert oracle.masking(COMMON, trained).mapnet == MapNetConfig(floor=0.05), "oracles draw by the defaults"
    drawing = MapNetConfig(floor=0.4, sampler="conditional_poisson", estimator="hajek")
    assert parse_strategy("mapnet").masking(COMMON, trained).mapnet == drawing
    given = parse_strategy("mapnet:sampler=pareto").masking(COMMON, trained).mapnet
    assert given == drawing.model_copy(update={"sampler": "pareto"})
    assert parse_strategy("mapnet:estimator=hajek").masking(COMMON).weighted.estimator == "hajek"


def test_names_of_files() -> None:
    texts = ["fully_explored:placement=same_batch", "uniform", "span:optimizer.lr=1e-3,max_length=5"]
    folders = [parse_strategy(text).folder for text in texts]
    assert folders == ["fully_explored_placement=same_batch", "uniform", "span_optimizer.lr=1e-3_max_length=5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:", "strategy, or strategy:setting=value"),
        ("uniform:rate", "strategy, or strategy:setting=value"),
        (":rate=0.2", "strategy, or strategy:setting=value"),
        ("unifrom", "unifrom: strategy: Input should be 'uniform'"),
        ("uniform:colour=red", "uniform:colour=red: colour: unknown key; known keys are strategy"),
        ("uniform:optimizer.lr=1", "optimizer cannot be changed here"),
        ("uniform:late_layer=2", "uniform:late_layer=2: late_layer is that of the checkpoint"),
        ("auto", "auto: auto changes strategies during training"),
        ("uniform:rate=2", "rate: Input should be less than 1"),
        ("span:span_maximum=3", "span:span_maximum=3: masking.span_maximum is now masking.span.max_length"),
    ],
)
def test_faults(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_strategy(text).masking(COMMON)


def test_faults_of_the_network() -> None:
    with pytest.raises(ConfigError, match="layers belongs to training; only estimator, floor, sampler apply here"):
        parse_strategy("mapnet:layers=3").masking(COMMON)
    with pytest.raises(ConfigError, match="floor: Input should be greater than 0"):
        parse_strategy("mapnet:floor=0").masking(COMMON)


def test_order_and_repetition() -> None:
    assert [s.text for s in parse_strategies(["span", "uniform"], first="uniform")] == ["uniform", "span"]
    assert [s.text for s in parse_strategies(["span"])] == ["span"]
    with pytest.raises(ConfigError, match="span: named twice"):
        parse_strategies(["span", "uniform", "span"])
