"""`maskvr benchmark optimizer-step-time` on a real ZeRO engine: its report, and the memory bound of Lamb."""

import json
from pathlib import Path

import pytest

from maskvr_ds.planning.calibration import read_measurement
from tests.distributed.training import run_command


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
    result = run_command(*words, "--micro-size", 2, "--steps", 3, "--output", output)
    assert result.returncode == 0, result.stderr
    found = read_measurement(output)
    assert (found.device, found.ranks, found.zero.stage, found.memory) == ("cpu", 1, 1, None)
    assert (found.work.length, found.work.micro, found.work.predictions) == (32, 2, 5)
    assert 64 / found.step_seconds == pytest.approx(json.loads(output.read_text())["tokens_per_second_median"])


def test_a_peer_that_needs_a_gpu_is_refused_without_one() -> None:
    result = run_command(
        "benchmark", "optimizer-step-time", "--preset", "bert-tiny", "--against", "adamw_foreach", "fused_lamb"
    )
    assert result.returncode == 1
    assert "--against fused_lamb" in result.stderr
    assert "no GPU" in result.stderr
