"""The rule on 200 maps of a real model that were labelled by eye (docs/results/attention)."""

from collections import Counter

import numpy as np
import pytest

from maskvr_ds.analysis.attention.patterns import CLASSES
from tests.support.documents import ROOT
from tests.support.experiments import load_experiment


def test_agreement_with_labels_by_eye() -> None:
    """Thresholds were chosen on the even numbers: the odd ones are the test."""
    maps = load_experiment("real_maps")
    table, agreement = maps.confusion(1, 2)
    assert table.sum() == 100
    assert agreement >= 0.8
    # What the rule calls vertical + diagonal, or heterogeneous, mostly is.
    for name, least in (("vertical", 0.8), ("vertical + diagonal", 0.7)):
        column = table[:, CLASSES.index(name)]
        assert column[CLASSES.index(name)] >= least * column.sum(), name


def test_labels_are_complete_and_maps_are_maps() -> None:
    maps, labels, entries = load_experiment("real_maps").read()
    assert [entry["map"] for entry in entries] == list(range(200))
    assert set(labels) <= set(CLASSES)
    assert len({(e["sentence"], e["layer"], e["head"]) for e in entries}) == 200
    assert min(Counter(entry["layer"] for entry in entries).values()) >= 20
    for attention in maps:
        assert attention.shape[0] == attention.shape[1]
        np.testing.assert_allclose(attention.sum(1), 1)
    assert (ROOT / "docs/results/attention/real_maps.npz").stat().st_size < 1_000_000


def test_the_table_of_the_documentation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["real_maps.py", "table"])
    load_experiment("real_maps").main()
    printed = capsys.readouterr().out
    page = (ROOT / "docs/results/heads.md").read_text(encoding="utf-8")
    assert all(line in page for line in printed.strip().splitlines()), printed
