"""Runs written by an earlier version resume: tests/data/acf4fb5, with flat settings of strategies and format 3.

Steps 7 to 10 must be those that the version itself trained: with the run's stored config.yaml, which is migrated, and
with a configuration in the present shape. Strategy auto continues with the masks that the old version had chosen, and
measures something else now: its steps are those of the old version up to the measurement after step 9.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskvr_ds.config import RunConfig, dump_config, load_config
from maskvr_ds.hashing import DIGEST_VERSION
from maskvr_ds.run_folder.checkpoints import read_manifest
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONFIG, MASK_COSTS, METRICS
from maskvr_ds.telemetry.metrics_file import read_events, read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.training import ROOT, train_all

OLD = ROOT / "tests" / "data" / "acf4fb5"
STOPPED_AT = 6
# Steps that are equal to those of the old version.
EQUAL_UNTIL = {"run_auto": 9}
# MAPNet computes its windows as a convolution now, and the whole local batch at once: sums have another order.
ROUNDED = {"run_zero2"}
CLOCK = {"tokens_per_second", "step_seconds", "model_tflops_per_rank", "mfu"}
# Digests have had another version since.
NOT_COMPARED = CLOCK | {"data_digest", "mask_digest"}
# The instruction set that torch had when the runs were written; others may round differently.
SAME_ROUNDING = torch.backends.cpu.get_cpu_capability() == "AVX512"

TINY: dict[str, Any] = {
    "seed": 3,
    "model": {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
    },
    "batch": {"global_size": 24, "micro_size": 6},
    "optimizer": {"lr": 0.03},
    "schedule": {"warmup_steps": 3},
    "evaluation": {"every_steps": 2, "rows": 16},
    "checkpoint": {"every_steps": 6},
    "monitor": {"tensorboard": False, "histogram_every": 0},
}
MAPNET = {"hidden": 32, "reach": 1, "floor": 0.5, "lr": 0.01, "check_every": 5, "estimator": "hajek"}
AUTO = {"every_steps": 3, "rows": 6, "draws": 2, "sketch_size": 256, "confidence": 0.5, "proposal": False}
SPAN = {"strategy": "span", "span": {"geometric_p": 0.4, "max_length": 3}}
# Run -> (expected lines, ranks, its configuration in the present shape).
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "run_zero0": ("span", 1, {"deepspeed": "zero0_fp32", "masking": SPAN}),
    "run_zero2": ("mapnet", 2, {"deepspeed": "zero2_fp32", "masking": {"strategy": "mapnet", "mapnet": MAPNET}}),
    "run_auto": (
        "auto",
        1,
        {"deepspeed": "zero1_fp32", "seed": 11, "masking": {"strategy": "auto", "rate": 0.2, "auto": AUTO}},
    ),
    "run_phases": (
        "phases",
        1,
        {
            "deepspeed": "zero1_fp32",
            "masking": {"strategy": "frequency", "frequency": {"power": 0.7, "floor": 0.5}},
            "phases": [
                {"name": "first", "training": {"steps": 4}},
                {
                    "name": "second",
                    "start": {"moments": "keep", "step_counter": "keep", "schedule": "restart"},
                    "masking": SPAN,
                    "training": {"steps": 6},
                },
            ],
        },
    ),
}
WAYS = ("stored", "present")


def stored(run: Path, corpus: Path) -> RunConfig:
    """The run's own config.yaml, for a copy of run and corpus, to be trained to step 10."""
    given = [f"output_dir={run}"]
    if run.name == "run_phases":
        given += [f"phases.{name}.data.path={corpus}" for name in ("first", "second")]
    else:
        given += [f"data.path={corpus}", "training.steps=10"]
    return load_config(run / CONFIG, given)


def present(run: Path, corpus: Path) -> RunConfig:
    values: dict[str, Any] = {**TINY, **RUNS[run.name][2], "output_dir": str(run)}
    data = {"path": str(corpus)}
    if "phases" in values:
        values["phases"] = [{**phase, "data": data} for phase in values["phases"]]
    else:
        values |= {"data": data, "training": {"steps": 10}}
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WAY/RUN: copies of the runs, resumed in each way."""
    folder = tmp_path_factory.mktemp("old")
    jobs: dict[int, list[tuple[dict[str, Any], str]]] = {1: [], 2: []}
    for way in WAYS:
        shutil.copytree(OLD, folder / way)
        for name, (_, ranks, _) in RUNS.items():
            config = {"stored": stored, "present": present}[way](folder / way / name, folder / way / "corpus")
            values = yaml.safe_load(dump_config(config))
            del values["schema"]
            jobs[ranks].append((values, "auto"))
    for ranks, runs in jobs.items():
        assert run_ranks(train_all, ranks, runs) == [[None] * len(runs)] * ranks
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_resumes_exactly(resumed: Path, name: str, way: str) -> None:
    run = resumed / way / name
    lines = read_lines(run / METRICS)
    assert lines[:STOPPED_AT] == read_lines(OLD / name / METRICS), "history is kept"
    expected = read_lines(OLD / f"expected_{RUNS[name][0]}.jsonl")
    assert [line["step"] for line in lines[STOPPED_AT:]] == [line["step"] for line in expected]
    equal = EQUAL_UNTIL.get(name, 10) - STOPPED_AT
    for was, now in list(zip(expected, lines[STOPPED_AT:], strict=True))[:equal]:
        figures = {key: now.get(key) for key in was if key not in NOT_COMPARED}
        assert now["digest_version"] == DIGEST_VERSION
        if name in ROUNDED:
            # The smallest ratio is of a bias of keys, whose gradient consists of rounding errors.
            del figures["trust_ratio_min"]
            assert figures == pytest.approx({key: was[key] for key in figures}, rel=1e-5)
        elif SAME_ROUNDING:
            assert figures == {key: value for key, value in was.items() if key not in NOT_COMPARED}
        else:
            assert figures["samples"] == was["samples"]
            assert figures["loss"] == pytest.approx(was["loss"], rel=1e-3)


def test_an_old_run_of_auto_measures_its_costs_once(resumed: Path) -> None:
    run = resumed / "stored" / "run_auto"
    costs = json.loads((run / MASK_COSTS).read_text(encoding="utf-8"))["phases"]["0"]
    assert [rate for rate, _ in costs["uniform"]] == [0.2]
    assert read_manifest(run / CHECKPOINTS / "step-00000010")["auto"]["costs"] == costs
    (event,) = (e for e in read_events(run / METRICS) if e["event"] == "auto" and e["step"] == 9)
    assert event["rate"] == 0.2
    assert {tuple(c["plan"]) for c in event["candidates"]} >= {("fully_explored", j, 0.2) for j in (2, 3, 4)}


@pytest.mark.parametrize("name", RUNS)
def test_both_ways_are_one_configuration(resumed: Path, name: str) -> None:
    """The files of the two resumed runs differ only in the folder name."""
    texts = ((resumed / way / name / CONFIG).read_text().replace(str(resumed / way), "") for way in WAYS)
    one, two = (yaml.safe_load(text) for text in texts)
    assert one["schema"] == 2
    for values in (one, two):
        values.get("training", {}).pop("schedule_steps", None)  # 10 in both, given or by default
    assert one == two


def test_an_old_corpus_is_verified(tmp_path: Path) -> None:
    shutil.copytree(OLD / "corpus", tmp_path / "corpus")
    words = [sys.executable, "-m", "data_pipeline", "verify", str(tmp_path / "corpus")]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
