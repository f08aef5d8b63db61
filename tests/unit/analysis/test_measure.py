"""Costs by which `maskvr variance` divides progress, without a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance.measure import Measurement
from maskvr_ds.config import ModelConfig
from maskvr_ds.config.strategy_spec import parse_strategy
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.planning.sizes import encoder_sizes
from tests.support.architectures import section
from tests.support.corpora import make_corpus
from tests.unit.models.test_architectures import V, config_of


@pytest.mark.parametrize(("layer", "strategy"), [(0, "uniform"), (1, "uniform"), (2, "fully_explored")])
@pytest.mark.parametrize("rate", [0.15, 0.45])
def test_flops_are_those_of_the_strategys_rate(tmp_path: Path, layer: int, strategy: str, rate: float) -> None:
    """Of rows of 24 positions: 3 or 10 predictions, by late mask tokens as many positions less in the lower layers, or
    as many as a segment has: 22 // 8 and 22 // 3."""
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=20, length=24))
    measurement: Any = SimpleNamespace(
        sample=SimpleNamespace(corpus=corpus, micro_size=3),
        common={"rate": 0.3, "mask_probability": 1.0, "random_probability": 0.0},
        model=MaskedLanguageModel(config_of("bert")),
        state=SimpleNamespace(identity={"masking": {"late_layer": layer}, "special_tokens": {"mask": 4}}),
        rate=lambda spec: Measurement.rate(measurement, spec),
    )
    found = Measurement.flops(measurement, parse_strategy(f"{strategy}:rate={rate}"))
    predictions = {0.15: 3, 0.45: 10}[rate]
    hidden = predictions if strategy == "uniform" else {0.15: 22 // 8, 0.45: 22 // 3}[rate]
    sizes = encoder_sizes(ModelConfig.model_validate(section("bert")), V)
    assert found == pytest.approx(sizes.flops(24, predictions, late=(layer, hidden)))
