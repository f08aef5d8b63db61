"""The rule on maps of known classes, lengths and noise: at least 95% right; features of pure maps."""

import numpy as np
import pytest

from maskvr_ds.analysis.attention.constructed import MAKERS, noisy
from maskvr_ds.analysis.attention.patterns import CLASSES, classify, distance, entropy, features


@pytest.mark.parametrize("length", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 0.3])
def test_constructed_maps(length: int, noise: float) -> None:
    assert set(MAKERS) == set(CLASSES)
    random = np.random.default_rng(length)
    maps = 60 if length < 200 else 20
    right = {
        name: np.mean([classify(noisy(name, random, length, noise)) == name for _ in range(maps)]) for name in MAKERS
    }
    assert min(right.values()) >= 0.95, right


def test_uniform_attention_has_no_pattern() -> None:
    for length in (8, 50):
        assert features(np.full((length, length), 1 / length)) == pytest.approx((0, 0, 0), abs=1e-9)
        assert classify(np.full((length, length), 1 / length)) == "heterogeneous"


def test_blocks_are_found_wherever_they_end() -> None:
    for end in range(6, 26):
        attention = np.zeros((32, 32))
        attention[:end, :end], attention[end:, end:] = 1 / end, 1 / (32 - end)
        assert features(attention)[2] == pytest.approx(1)


def test_entropy_and_distance() -> None:
    uniform = np.full((10, 10), 0.1)
    assert entropy(uniform) == pytest.approx(np.log(10))
    assert entropy(np.eye(10)) == 0
    assert distance(np.eye(10)) == 0
    assert distance(np.roll(np.eye(10), 1, axis=1)) == pytest.approx((9 + 9) / 10)
    assert distance(uniform) == pytest.approx((100 - 1) / 30)


def test_maps_that_are_none() -> None:
    with pytest.raises(ValueError, match="expected a square one"):
        features(np.zeros((4, 5)))
