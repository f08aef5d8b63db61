"""`maskvr variance` on the checkpoint of a run: independence of ranks, output files, errors."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.analysis.gradient_variance.options import add_variance_options
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration, run_command, train_all
from tests.support.corpora import make_corpus

STRATEGIES = ["mapnet:floor=0.2", "oracle_gradient", "oracle_head:floor=0.2", "oracle_mask", "whole_word", "frequency"]
STRATEGIES += ["fully_explored:placement=same_batch,segments_per_sequence=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", rows=120, length=16, padded_last_row=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sections: dict[str, Any] = {"masking": {"strategy": "mapnet", "mapnet": {"gate": "never"}}}
    values = configuration(folder, corpus, steps=6, evaluation={"every_steps": 0}, **sections)
    assert run_ranks(train_all, 1, [(values, None)]) == [[None]]
    return folder


def measure_all(jobs: list[list[str]]) -> list[dict[str, Any]]:
    """On a rank: the report of each job."""
    from maskvr_ds.analysis.gradient_variance import measure
    from maskvr_ds.runtime import distributed

    logging.disable(logging.WARNING)
    distributed.initialize()
    parser = argparse.ArgumentParser()
    add_variance_options(parser)
    return [measure.run(parser.parse_args(job)) for job in jobs]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, child in items for k, v in leaves(child, f"{path}/{name}").items()}
    return {path: value}


def test_reports_do_not_depend_on_ranks(run: Path, corpus: Path, tmp_path: Path) -> None:
    """On 1 rank, and on 2, among which 7 rows do not divide."""
    options = [
        "--checkpoint",
        str(run),
        "--corpus",
        str(corpus),
        "--sequences",
        "7",
        "--masks",
        "3",
        "--micro-size",
        "4",
    ]
    options += [
        "--micro-size",
        "4",
        "--oracle-rounds",
        "1",
        "--hamming-rounds",
        "2",
        "--sketch-size",
        "500",
        "--strategies",
        *STRATEGIES,
    ]
    reports = []
    for ranks in (1, 2):
        output = tmp_path / f"ranks{ranks}"
        found = run_ranks(measure_all, ranks, [[*options, "--output", str(output)]], timeout=900)
        assert all(leaves(each[0]["strategies"]).keys() == leaves(found[0][0]["strategies"]).keys() for each in found)
        reports.append(json.loads((output / "variance.json").read_text()))
        assert (output / "variance.png").stat().st_size > 10_000
    one = leaves({key: reports[0][key] for key in ("strategies", "hamming", "step", "masking")})
    assert len(one) > 500
    two = leaves({key: reports[1][key] for key in ("strategies", "hamming", "step", "masking")})
    for path, value in one.items():
        # Progress is a quotient of small sums of products, which seven rows determine to no digit.
        if not path.endswith("/seconds") and "/progress/" not in path:
            assert two[path] == pytest.approx(value, rel=1e-4), path
    uniform = reports[0]["strategies"]["uniform"]
    assert (uniform["passes"], uniform["segments"]) == (21, 1)
    assert uniform["layers"]["whole"]["total_ratio"] == [1, 1, 1]
    assert reports[0]["strategies"][STRATEGIES[-1]]["passes"] == 42
    own, best = (
        1 - reports[0]["strategies"][name]["layers"]["whole"]["total_ratio"][0]
        for name in ("mapnet:floor=0.2", "oracle_head:floor=0.2")
    )
    assert list(reports[0]["mapnet_of_oracle_head"]) == ["0.2"]
    assert reports[0]["mapnet_of_oracle_head"]["0.2"][0] == pytest.approx(own / best)
    whole, layers = uniform["layers"]["whole"], [v for k, v in uniform["layers"].items() if k != "whole"]
    assert list(uniform["layers"]) == ["embeddings", "layer 0", "layer 1", "head", "whole"]
    assert sum(layer["mask"][0] for layer in layers) == pytest.approx(whole["mask"][0])


def test_the_command(run: Path, corpus: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", run, "--corpus", corpus, "--masks", 2, "--sketch-size", 200]
    two = run_command(
        "variance",
        *common,
        "--sequences",
        4,
        "--output",
        tmp_path / "two",
        "--num-gpus",
        2,
        "--strategies",
        "span",
        timeout=900,
    )
    assert two.returncode == 0, two.stderr
    assert "total ÷ uniform" in two.stdout
    assert "4 rows × 2 draws, 95% confidence intervals over rows; 16 forward and backward passes" in two.stdout
    report = json.loads((tmp_path / "two" / "variance.json").read_text())
    assert list(report["strategies"]) == ["uniform", "span"]
    assert report["ranks"] == 2


FAULTS = [
    (["--sequences", "121"], "has 120 rows"),
    (["--sequences", "2"], "2 sequences; confidence intervals need at least 3"),
    (["--masks", "1"], "--masks 1: must be at least 2"),
    (["--confidence", "1"], "--confidence 1.0: must lie between 0 and 1"),
    (["--hamming-rounds", "1"], "--hamming-rounds 1: must be 0 (off) or at least 2"),
    (["--strategies", "unifrom"], "unifrom: strategy: Input should be 'uniform'"),
    (
        ["--strategies", "fully_explored:placement=same_batch,segments_per_sequence=9"],
        "of 16 tokens has only 7 segments",
    ),
    (["--masks", "9999"], "--masks 9999: must be at most 8216 for uniform"),
    (["--strategies", "mapnet:layers=1"], "layers belongs to training"),
]


def faults_of(jobs: list[list[str]]) -> list[str]:
    """On a rank: the error of each job."""
    from maskvr_ds.analysis.gradient_variance import measure
    from maskvr_ds.runtime import distributed

    logging.disable(logging.WARNING)
    distributed.initialize()
    parser = argparse.ArgumentParser()
    add_variance_options(parser)
    texts = []
    for job in jobs:
        try:
            measure.run(parser.parse_args(job))
            texts.append("")
        except (ValueError, distributed.RemoteError) as fault:
            texts.append(str(fault))
    return texts


def test_faults(run: Path, corpus: Path, tmp_path: Path) -> None:
    """On two ranks: both raise the same message, and stay in step for the next job."""
    plain = configuration(tmp_path / "plain", corpus, steps=6, evaluation={"every_steps": 0})
    assert run_ranks(train_all, 1, [(plain, None)]) == [[None]]
    other = make_corpus(tmp_path / "other", rows=10, length=16, words=9)
    longer = make_corpus(tmp_path / "longer", rows=30, length=80)
    output = ["--output", str(tmp_path / "out")]
    mine = ["--checkpoint", str(run), "--corpus", str(corpus), *output]
    jobs = [([*mine, *options], message) for options, message in FAULTS]
    jobs += [
        (["--checkpoint", str(run), "--corpus", str(other), *output], "differs from"),
        (
            ["--checkpoint", str(run), "--corpus", str(longer), *output, "--sequences", "5"],
            "rows of 80 tokens exceed max_position_embeddings 64 of bert",
        ),
        (["--checkpoint", str(tmp_path / "nothing"), "--corpus", str(corpus), *output], "no such folder"),
        (
            ["--checkpoint", str(tmp_path / "plain"), "--corpus", str(corpus), *output, "--strategies", "mapnet"],
            "has no mapnet.safetensors; train with masking.strategy=mapnet",
        ),
    ]
    for texts in run_ranks(faults_of, 2, [job for job, _ in jobs], timeout=900):
        for text, (_, message) in zip(texts, jobs, strict=True):
            assert message in text
    assert not (tmp_path / "out").exists()
