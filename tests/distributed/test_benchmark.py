"""`maskvr benchmark optimizer-step-time` on a real ZeRO engine: its report, and the memory bound of Lamb."""

import json
import re
from pathlib import Path

import pytest
import yaml

from maskvr_ds.benchmarks.step_parts import PARTS
from maskvr_ds.planning.calibration import read_measurements
from maskvr_ds.run_folder.layout import MASK_COSTS
from tests.distributed.training import configuration, run_command
from tests.support.corpora import make_corpus


def test_lamb_takes_one_partition_of_extra_memory(tmp_path: Path) -> None:
    output = tmp_path / "cost.json"
    words = ("benchmark", "optimizer-step-time", "--preset", "bert-tiny", "--rounds", 2, "--threads", 1)
    result = run_command(*words, "--deepspeed", "zero2_fp32", "--output", output)
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    # Scalars and norms add a little: below 0.1% of four million elements.
    assert figures["lamb_extra_partitions"] < 1.001
    assert figures["adamw_foreach_extra_partitions"] > 0.5, "the measurement sees AdamW's temporaries"
    for name in ("lamb_milliseconds", "lamb_over_adamw_foreach", "lamb_over_adamw_foreach_cpu_time"):
        assert 0 < figures[f"{name}_min"] <= figures[f"{name}_median"] <= figures[f"{name}_max"]


def test_a_measured_training_can_calibrate_a_plan(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    words = ("benchmark", "train", "--preset", "bert-tiny", "--deepspeed", "zero1_fp32", "--sequence-length", 32)
    more = ("--accumulation", 3, "--peak-tflops", 0.5)
    result = run_command(*words, "--micro-size", 2, 4, "--steps", 5, *more, "--output", output)
    assert result.returncode == 0, result.stderr
    both = read_measurements(output)
    for found, micro, figures in zip(both, (2, 4), json.loads(output.read_text()), strict=True):
        assert (found.device, found.ranks, found.zero.stage, found.memory) == ("cpu", 1, 1, None)
        assert (found.work.length, found.work.micro, found.work.predictions) == (32, micro, 5)
        assert found.work.accumulation == 3
        assert 96 * micro / found.step_seconds == pytest.approx(figures["tokens_per_second_median"])
        assert figures["mfu"] == pytest.approx(figures["model_tflops_per_rank"] / 0.5)


def test_parts_of_a_step(tmp_path: Path) -> None:
    """All parts take time, with MAPNet's; their sum is the step as metrics.jsonl times it; what is counted is there."""
    output = tmp_path / "train.json"
    words = ("benchmark", "train", "--preset", "bert-tiny", "--deepspeed", "zero1_bf16", "--sequence-length", 32)
    more = ("--micro-size", 2, "--accumulation", 2, "--steps", 6, "--set", "masking.strategy=mapnet")
    result = run_command(*words, *more, "--output", output)
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    parts = figures["parts"]
    assert set(parts) == {*PARTS, "sum"}
    for name, row in parts.items():
        assert 0 < row["min"] <= row["median"] <= row["max"], name
    seconds = 2 * 2 * 32 / figures["tokens_per_second_median"]
    assert parts["sum"]["min"] / 2e3 < seconds < 2 * parts["sum"]["max"] / 1e3
    assert parts["backward"]["median"] > parts["masks"]["median"]
    assert figures["host_waits_per_step"] <= 1
    assert figures["kernels_per_step"] == sum(figures["kernels_by_part"].values())
    assert figures["kernels_by_part"]["mapnet"] > 100
    assert figures["peak_tflops"] is None
    assert figures["mfu"] is None
    # The digests and counts; gradients of one rank need no reduction.
    assert figures["collectives_per_step"]["all_reduce"]["calls"] >= 1
    assert figures["gigabytes_sent_per_rank_and_step"] == 0, "one rank"
    assert "unknown" in result.stdout
    assert re.search(r"^  backward +[\d.,]+ +[\d.,]+", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training-speed", "--steps", 4], "--steps 4: at least 5"),
        (["training-speed", "--set", "batch.micro_size=3"], "batch is set by the benchmark"),
        (["training-speed", "--set", "optimizer.lr=-1"], "optimizer.lr"),
        (["strategy-cost", "--accumulation", 2], "--accumulation is an option of training-speed"),
        (["loading-speed", "--set", "seed=1"], "--set is an option of training-speed"),
        (["optimizer-step-time", "--set", "seed=1"], "takes settings of the section optimizer only"),
        (["optimizer-step-time", "--set", "optimizer.fused=3"], "optimizer: fused"),
        (["optimizer-step-time", "--set", "optimizer.name=adamw"], "compares LAMB with others"),
        (["strategy-cost", "--micro-size", 2, 4], "--micro-size: 2 values"),
        (["strategy-cost", "--config", "r", "--micro-size", 2], "--micro-size is set by the run that --config names"),
        (["training-speed", "--config", "r"], "--config is an option of strategy-cost"),
    ],
)
def test_options_are_checked(words: list[object], message: str) -> None:
    result = run_command("benchmark", *words)
    assert result.returncode == 1
    assert message in result.stderr


def test_costs_of_a_run_are_what_the_run_reads(tmp_path: Path) -> None:
    """`benchmark strategy-cost --config`, and a training with its file, which measures nothing."""
    values = configuration(tmp_path / "run", make_corpus(tmp_path / "corpus", rows=40), steps=2)
    values |= {"deepspeed": "zero1_fp32", "evaluation": {"every_steps": 0}, "schedule": {"warmup_steps": 1}}
    config, costs = tmp_path / "run.yaml", tmp_path / "costs.json"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    auto = ("--set", "masking.strategy=auto", "--set", "masking.auto.rows=6", "--set", "masking.final_rate=0.1")
    auto = (*auto, "--set", "masking.auto.every_steps=10")
    words = ("benchmark", "masks", "--config", config, "--rounds", 1, "--output", costs)
    refused = run_command(*words)
    assert refused.returncode == 1
    assert "masking.strategy is uniform, which has no candidates" in refused.stderr
    result = run_command(*words, *auto)
    assert result.returncode == 0, result.stderr
    found = json.loads(costs.read_text(encoding="utf-8"))
    assert [rate for rate, _ in found["uniform"]] == [0.15, 0.1]
    assert (found["machine"]["ranks"], found["machine"]["micro_size"]) == (1, 2)
    imported = ("--set", f"masking.auto.costs={costs}")
    result = run_command("train", "--config", config, "--num-gpus", 1, *auto, *imported)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / MASK_COSTS).read_text(encoding="utf-8")) == {"phases": {"0": found}}
    assert "measuring the seconds" not in result.stdout + result.stderr
    assert "masks     auto: 5 of 30 tokens of a full row, 3 at the end; now" in result.stdout
    # A run of two steps has no room for measurements, of which one takes longer than half a step.
    assert found["per_pass"] > 0
    assert "at most 5% of the seconds of the steps (masking.auto.max_share)" in result.stdout
    assert "2 steps have room for no measurements, one every " in result.stdout + result.stderr


def test_a_peer_that_needs_a_gpu_is_refused_without_one() -> None:
    result = run_command(
        "benchmark", "optimizer-step-time", "--preset", "bert-tiny", "--against", "adamw_foreach", "fused_lamb"
    )
    assert result.returncode == 1
    assert "--against fused_lamb" in result.stderr
    assert "no GPU" in result.stderr
