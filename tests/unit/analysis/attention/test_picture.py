"""The picture of heads is as wide as what it shows."""

from pathlib import Path

import numpy as np
from matplotlib import image

from maskvr_ds.analysis.attention.measure import HeadFigures
from maskvr_ds.analysis.attention.patterns import CLASSES
from maskvr_ds.analysis.attention.picture import draw


def figures(*classes: str) -> HeadFigures:
    of_heads = [[[name] for name in classes]]
    ones = np.ones((1, len(classes)))
    examples = {name: (0, head, np.eye(4)) for head, name in enumerate(classes)}
    return HeadFigures(of_heads, ones, ones, {}, examples)


def test_no_empty_columns_for_classes_that_are_not_there(tmp_path: Path) -> None:
    few, all_classes = tmp_path / "few.png", tmp_path / "all.png"
    draw({"a": figures("heterogeneous"), "random weights": figures("heterogeneous")}, None, few)
    draw({"a": figures(*CLASSES)}, None, all_classes)
    width = image.imread(few).shape[1]
    assert image.imread(all_classes).shape[1] * 3 == width * len(CLASSES)
    # The example is in the first column, below the heads of the model that it is from.
    bottom = image.imread(few)[380:700, :, :3]
    dark = (bottom.min(axis=2) < 0.4).any(axis=0).nonzero()[0]
    assert dark.min() < width / 3
