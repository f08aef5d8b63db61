"""The network trained on maps of which the rule is sure: constructed maps that it has not seen, labels by eye."""

import numpy as np
import pytest
import torch

from maskvr_ds.analysis.attention.constructed import MAKERS, noisy
from maskvr_ds.analysis.attention.network import MapNetwork, SureMaps, image, train_on
from maskvr_ds.analysis.attention.patterns import classify, classify_surely, features
from tests.support.experiments import load_experiment


@pytest.fixture(scope="module")
def network() -> MapNetwork:
    return train_on(load_experiment("real_maps").read()[0])


def test_constructed_maps(network: MapNetwork) -> None:
    random = np.random.default_rng(23)
    right = [
        network.classify(noisy(name, random, length, noise)) == name
        for length in (16, 32, 64, 128, 256, 512)
        for noise in (0.0, 0.1, 0.2, 0.3)
        for name in MAKERS
        for _ in range(2)
    ]
    assert np.mean(right) >= 0.95


def test_labels_by_eye(network: MapNetwork) -> None:
    """The figures of docs/results/heads.md; training may differ by a map or two between releases of torch."""
    _, agreement = load_experiment("real_maps").confusion(classifier=network.classify)
    assert agreement == pytest.approx(0.85, abs=0.025)


def test_training_is_a_function_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvr_ds.analysis.attention.network._STEPS", 30)
    images = torch.stack([image(np.eye(9)), image(np.full((9, 9), 1 / 9))])
    before = torch.get_rng_state()
    networks = [MapNetwork(images, torch.tensor([1, 4])) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(*(n.parameters() for n in networks), strict=True):
        assert torch.equal(a, b)
    assert [networks[0].classify(a) for a in (np.eye(9), np.full((9, 9), 1 / 9))] == ["diagonal", "heterogeneous"]


def test_the_rule_is_sure_of_what_thresholds_do_not_change() -> None:
    column = np.full((16, 16), 0.0)
    column[:, 3] = 1.0
    assert classify_surely(column) == "vertical"
    # A column that is just heavy enough: with a threshold a quarter higher there is none.
    weak = np.full((16, 16), 0.72 / 15)
    weak[:, 3] = 0.28
    assert features(weak)[0] == pytest.approx(0.28)
    assert (classify(weak), classify_surely(weak)) == ("vertical", None)
    sure = SureMaps()
    for attention in (column, weak, column):
        sure.add(attention)
    assert sure.counts == {**dict.fromkeys(MAKERS, 0), "vertical": 2}


def test_images_are_relative_to_uniform_attention() -> None:
    for length in (5, 32, 40, 100):
        torch.testing.assert_close(image(np.full((length, length), 1 / length)), torch.full((1, 32, 32), 2.0).log())
