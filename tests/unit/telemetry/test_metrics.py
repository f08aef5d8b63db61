"""metrics.jsonl has one line per step, also after kills and resumes; monitors."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvr_ds.config import MonitorConfig
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.telemetry.metrics import MetricsLog, StepRecord
from maskvr_ds.telemetry.metrics_file import keep_until, read_events, read_lines

QUIET = MonitorConfig(tensorboard=False, csv=False, histogram_every=2)
NAMES = ["embeddings", "layer.weight", "layer.bias"]


def log(
    folder: Path,
    resume_step: int = 0,
    monitor: MonitorConfig = QUIET,
    peak_tflops: float | None = None,
    real_share: float = 1.0,
) -> MetricsLog:
    return MetricsLog(
        folder,
        rank=0,
        resume_step=resume_step,
        resume_tokens=resume_step * 80,
        total_steps=10,
        monitor=monitor,
        token_flops=1e6,
        peak_tflops=peak_tflops,
        real_share=real_share,
        tensor_names=NAMES,
    )


def record(step: int, ratios: list[float] | None = None, rms: list[float] | None = None) -> StepRecord:
    return StepRecord(
        step=step,
        samples=step * 8,
        tokens=step * 80,
        lr=0.1,
        counters=DeferredTensor(torch.tensor([-1, 5, 4, 0])),
        loss_sum=DeferredTensor(torch.tensor([10.0 * step], dtype=torch.float64)),
        grad_norm=0.5,
        extra={},
        trust_ratios=None if ratios is None else DeferredTensor(torch.tensor(ratios)),
        update_rms=None if rms is None else DeferredTensor(torch.tensor(rms)),
    )


def test_held_out_figures_before_the_first_step(tmp_path: Path) -> None:
    metrics = log(tmp_path, monitor=MonitorConfig(tensorboard=False, csv=True, histogram_every=0))
    metrics.held_out(0, {"held_out_loss": 6.0, "held_out_loss_random": math.nan})
    metrics.step(record(1))
    metrics.close()
    (event,) = read_events(tmp_path / METRICS)
    assert event == {"event": "held_out", "step": 0, "held_out_loss": 6.0, "held_out_loss_random": None}
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1]
    (curve,) = (tmp_path / "csv").rglob("held_out_loss.csv")
    assert curve.read_text().splitlines()[1:] == ["0,6.0"]
    log(tmp_path).close()
    assert read_events(tmp_path / METRICS) == [], "a run that starts again measures again"


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bad=st.binary(max_size=40), place=st.integers(0, 4))
def test_a_bad_line_is_skipped_and_the_file_kept(tmp_path: Path, bad: bytes, place: int) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": n, "loss": 1.0}).encode() for n in (1, 2, 3)]
    good.append(b'{"event": "checkpoint", "step": 3}')
    content = b"".join(line + b"\n" for line in [*good[:place], bad, *good[place:]])
    path.write_bytes(content)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert len(read_events(path)) == 1
    keep_until(2, path)
    assert path.read_bytes() == b"".join(line + b"\n" for line in good[:2])
    (kept,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert kept.read_bytes() == content
    kept.unlink()


@pytest.mark.parametrize("bad", ["[]", "7", "null", "{}", '{"step": "1"}', '{"step": true}', "[" * 100_000, "1" * 5000])
def test_what_is_json_but_no_line_is_skipped_too(tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n{{"step": 3')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert "1 damaged lines are skipped, the first is line 2" in caplog.text
