"""Costs by which `maskvr variance` divides progress, without a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.gradient_variance import measure
from maskvr_ds.analysis.gradient_variance.measure import Measurement
from maskvr_ds.config import MapNetConfig, ModelConfig
from maskvr_ds.config.strategy_spec import parse_strategy
from maskvr_ds.masking.proposer import Proposer
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


def test_mapnet_is_measured_with_the_sampler_and_estimator_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = MapNetConfig(hidden=32, floor=0.4, sampler="conditional_poisson", estimator="whole_mask")
    drawn: list[Any] = []
    measurement: Any = SimpleNamespace(
        arguments=SimpleNamespace(masks=2),
        sample=SimpleNamespace(rows=[0], device=torch.device("cpu"), corpus=SimpleNamespace(), pairs=False),
        sketcher=None,
        common={"rate": 0.3, "mask_probability": 0.8, "random_probability": 0.1},
        copies=lambda spec: 1,
        oracle=lambda spec: None,
        rate=lambda spec: 0.3,
        network=lambda spec: Proposer(trained, vocab_size=9, max_length=8, seed=0, device=torch.device("cpu")),
        masker=lambda masking, purpose, proposal: drawn.append((masking.weighted, proposal)),
    )
    monkeypatch.setattr(measure, "measure_gradients", lambda *_, **__: SimpleNamespace(moments=None, predictions=2))
    Measurement.strategy(measurement, parse_strategy("mapnet"), None)
    weighted, proposal = drawn[0]
    assert (weighted.sampler, weighted.estimator, weighted.floor) == ("conditional_poisson", "whole_mask", 0.4)
    assert proposal is not None
