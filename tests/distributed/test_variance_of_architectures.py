"""`maskvr variance` on other architectures than BERT: the mask part is that of gradients formed by autograd."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskvr_ds.analysis.gradient_variance.options import add_variance_options
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration, run_command, train_all
from tests.support.architectures import section
from tests.support.corpora import PAD_IS_1, make_corpus

ARCHITECTURES = ("modernbert", "roberta")
ROWS, MASKS, DRAWS = 16, 4, 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", rows=120, words=20, special=PAD_IS_1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name in ARCHITECTURES:
        values = configuration(folder / name, corpus, steps=6, evaluation={"every_steps": 0})
        jobs.append(({**values, "model": section(name)}, None))
    assert run_ranks(train_all, 1, jobs) == [[None] * len(jobs)]
    return folder


def by_autograd(options: list[str]) -> float:
    """On a rank: variance over masks of the gradient per prediction, mean over the rows that the command samples."""
    from maskvr_ds.analysis.gradient_variance.measure import Measurement
    from maskvr_ds.checkpoint.export import load_model
    from maskvr_ds.config import MaskingConfig
    from maskvr_ds.models.encoder import MaskedLanguageModel
    from maskvr_ds.models.losses import weighted_loss
    from maskvr_ds.runtime import distributed

    distributed.initialize()
    parser = argparse.ArgumentParser()
    add_variance_options(parser)
    measurement = Measurement(parser.parse_args(options))
    model = MaskedLanguageModel(load_model(measurement.folder)).eval()
    masker = measurement.masker(MaskingConfig.model_validate(measurement.common), 77)
    found, predictions = [], 0
    for number in range(ROWS):
        masked = masker(measurement.sample.repeated(number, np.arange(DRAWS)))
        predictions += int((masked.weights != 0).sum())
        gradients = []
        for one in masked.split(1):
            model.zero_grad()
            weighted_loss(model, one).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
        found.append(torch.stack(gradients).var(0).sum().item())
    return float(np.mean(found)) / (predictions / (ROWS * DRAWS)) ** 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mask_part_is_that_of_autograd(runs: Path, corpus: Path, tmp_path: Path, architecture: str) -> None:
    options: list[Any] = ["--checkpoint", runs / architecture, "--corpus", corpus, "--sequences", ROWS]
    options += ["--masks", MASKS, "--sketch-size", 2000, "--output", tmp_path / "out"]
    result = run_command("variance", *options, "--strategies", "span", timeout=900)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "variance.json").read_text(encoding="utf-8"))
    layers = report["strategies"]["uniform"]["layers"]
    assert list(layers) == ["embeddings", "layer 0", "layer 1", "layer 2", "head", "whole"]
    estimate, low, high = layers["whole"]["mask"]
    (expected,) = run_ranks(by_autograd, 1, [str(option) for option in options])
    assert low < expected < high
    assert expected == pytest.approx(estimate, rel=0.3)


def test_tables_of_relative_positions_are_an_error(corpus: Path, tmp_path: Path) -> None:
    """By the command, and by auto before the first step."""
    values = configuration(tmp_path / "run", corpus, steps=6, evaluation={"every_steps": 0})
    plain = {**values, "model": section("deberta-v2")}
    auto = {**plain, "output_dir": str(tmp_path / "auto"), "masking": {"strategy": "auto"}}
    ((trained, refused),) = run_ranks(train_all, 1, [(plain, None), (auto, None)])
    assert trained is None
    assert "masking.strategy auto: gradients of deberta-v2 cannot be sketched" in refused
    assert not (tmp_path / "auto" / "metrics.jsonl").exists()
    options = ["--checkpoint", tmp_path / "run", "--corpus", corpus, "--sequences", 4, "--masks", 2]
    result = run_command("variance", *options, "--output", tmp_path / "out", timeout=300)
    assert result.returncode == 1
    assert "gradients of deberta-v2 cannot be sketched" in result.stderr
    assert "Traceback" not in result.stderr
