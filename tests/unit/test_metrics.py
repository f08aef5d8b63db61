"""metrics.jsonl: a line a step, also over kills and resumes."""

import json
import struct
from pathlib import Path

import pytest
import torch

from maskvr_ds.config import MonitorConfig
from maskvr_ds.metrics import METRICS, DeferredTensor, MetricsLog, StepRecord, plot_loss, read_lines


def log(folder: Path, resume_step: int = 0) -> MetricsLog:
    return MetricsLog(
        folder,
        rank=0,
        resume_step=resume_step,
        resume_tokens=resume_step * 80,
        total_steps=10,
        monitor=MonitorConfig(tensorboard=False, csv=False),
        token_flops=1e6,
    )


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        samples=step * 8,
        tokens=step * 80,
        lr=0.1,
        counters=DeferredTensor(torch.tensor([-1, 5, 4, 0])),
        loss_sum=DeferredTensor(torch.tensor([10.0 * step], dtype=torch.float64)),
        grad_norm=0.5,
        extra={},
    )


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed's MonitorMaster asks for the rank.
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)


def test_figures_of_a_line(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics.step(record(1))
    metrics.add(held_out_loss=3.0)
    metrics.close()
    (line,) = read_lines(tmp_path / METRICS)
    assert line["loss"] == 2.5
    assert line["data_digest"] == "f" * 16
    assert line["mask_digest"] == f"{5:016x}"
    assert line["held_out_loss"] == 3.0
    assert line["tokens_per_second"] == pytest.approx(80 / line["step_seconds"])
    assert line["model_tflops_per_rank"] == pytest.approx(line["tokens_per_second"] * 1e-6)


def test_a_step_is_written_when_the_next_one_comes(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics.step(record(1))
    assert read_lines(tmp_path / METRICS) == []
    metrics.step(record(2))
    assert [x["step"] for x in read_lines(tmp_path / METRICS)] == [1], "on disk at once"
    metrics.close()
    assert [x["step"] for x in read_lines(tmp_path / METRICS)] == [1, 2]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    for step in range(1, 6):
        metrics.step(record(step))
    metrics.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps({"step": 6})[:-3])  # a kill in the middle of a line
    metrics = log(tmp_path, resume_step=3)
    metrics.step(record(4))
    metrics.close()
    lines = read_lines(tmp_path / METRICS)
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    assert lines[-1]["tokens_per_second"] == pytest.approx(80 / lines[-1]["step_seconds"])


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "tokens": 5}\n')
    log(tmp_path).close()
    assert read_lines(tmp_path / METRICS) == []


def test_plot_is_a_png_of_some_size(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": 5 - s / 10, **({"held_out_loss": 5.0} if s % 5 == 0 else {})} for s in range(1, 20)]
    (tmp_path / METRICS).write_text("".join(json.dumps(x) + "\n" for x in lines))
    plot_loss(tmp_path / METRICS, tmp_path / "loss.png", {"unigram entropy": 4.0})
    data = (tmp_path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 400
    assert height > 300
