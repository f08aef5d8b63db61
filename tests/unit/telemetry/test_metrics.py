"""metrics.jsonl has one line per step, also after kills and resumes; monitors."""

import json
import math
import os
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvr_ds.config import ConfigError, MonitorConfig
from maskvr_ds.run_folder.layout import METRICS, TRUST_RATIOS
from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.telemetry.metrics import MetricsLog, StepRecord, trust_ratio_figures
from maskvr_ds.telemetry.metrics_file import keep_until, read_events, read_lines
from maskvr_ds.telemetry.monitors import check_monitors

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
        token_flops=1e6,
        trust_ratios=None if ratios is None else DeferredTensor(torch.tensor(ratios)),
        update_rms=None if rms is None else DeferredTensor(torch.tensor(rms)),
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


def test_mfu_counts_real_tokens(tmp_path: Path) -> None:
    metrics = log(tmp_path, peak_tflops=4e-3, real_share=0.75)
    metrics.step(record(1))
    metrics.close()
    (line,) = read_lines(tmp_path / METRICS)
    assert line["mfu"] == pytest.approx(0.75 * 1e6 * line["tokens_per_second"] / 4e9)


def test_no_mfu_without_a_known_rate(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics.step(record(1))
    metrics.close()
    assert "mfu" not in read_lines(tmp_path / METRICS)[0]


def test_a_step_is_written_with_the_next_one(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics.step(record(1))
    assert read_lines(tmp_path / METRICS) == []
    metrics.step(record(2))
    assert [x["step"] for x in read_lines(tmp_path / METRICS)] == [1], "on disk at once"
    metrics.close()
    assert [x["step"] for x in read_lines(tmp_path / METRICS)] == [1, 2]


def test_resume_drops_lines_after_the_checkpoint(tmp_path: Path) -> None:
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


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "tokens": 5}\n')
    log(tmp_path).close()
    assert read_lines(tmp_path / METRICS) == []


def test_trust_ratio_figures_are_those_of_numpy() -> None:
    ratios = np.exp(np.random.default_rng(0).normal(size=8)).tolist()
    figures = trust_ratio_figures(ratios)
    assert list(figures) == ["trust_ratio_min", "trust_ratio_median", "trust_ratio_max"]
    assert list(figures.values()) == pytest.approx(np.quantile(ratios, [0, 0.5, 1]))
    assert trust_ratio_figures([*ratios, *[1.0] * 20]) == figures, "tensors that are not adapted do not count"
    assert set(trust_ratio_figures([1.0, 1.0]).values()) == {1.0}
    assert all(math.isnan(x) for x in trust_ratio_figures([0.5, math.nan, 1.0]).values())


def test_trust_ratios_of_a_line(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics.step(record(1))
    metrics.step(record(2, [0.25, 2.0, 1.0]))
    metrics.step(record(3, [0.25, math.nan, 1.0]))
    metrics.close()
    without, line, diverged = read_lines(tmp_path / METRICS)
    keys = ["trust_ratio_min", "trust_ratio_median", "trust_ratio_max"]
    assert not set(keys) & set(without)
    assert [line[k] for k in keys] == [0.25, 1.125, 2.0]
    assert [diverged[k] for k in keys] == [None] * 3


def test_update_rms_of_a_line(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics.step(record(1, rms=[0.5, 3.0, 1.0]))
    metrics.step(record(2, rms=[0.5, math.nan, 1.0]))
    metrics.close()
    line, diverged = read_lines(tmp_path / METRICS)
    assert (line["update_rms_median"], line["update_rms_max"]) == (1.0, 3.0)
    assert (diverged["update_rms_median"], diverged["update_rms_max"]) == (None, None)


def test_curves_have_steps_as_x_axis_and_names_by_what_they_measure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = log(tmp_path, monitor=MonitorConfig(csv=True))
    metrics.held_out(0, {"held_out_loss": 7.0})
    metrics.step(record(1, [0.5, 2.0, 1.0], [0.5, 2.0, 1.0]))
    metrics.add(held_out_loss=3.0, held_out_accuracy_mask=0.5)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/loss", "train/lr", "train/tokens", "train/samples", "lamb/trust_ratio_min"}
    assert tags >= {"held_out/loss", "held_out/accuracy_mask", "stable_adamw/update_rms_max"}
    assert {tag.split("/")[0] for tag in tags} == {"train", "held_out", "lamb", "stable_adamw"}
    assert not {tag for tag in tags if "held_out_" in tag or tag.endswith("/step")}
    assert [(e.step, e.value) for e in events.Scalars("held_out/loss")] == [(0, 7.0), (1, 3.0)]
    assert (tmp_path / "csv" / "held_out_loss.csv").read_text().splitlines() == ["step,loss", "0,7.0", "1,3.0"]
    log(tmp_path, monitor=MonitorConfig(csv=True)).close()
    assert not list((tmp_path / "csv").glob("*.csv")), "a run that starts again measures again, also before step 1"


def test_wandb_that_is_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = MonitorConfig.model_validate({"tensorboard": False, "wandb": {"project": "p"}})
    (tmp_path / "wandb").mkdir()  # the folder of its logs, where `python -m` looks for modules
    monkeypatch.setattr(
        "sys.path", [str(tmp_path), *(path for path in sys.path if not (Path(path) / "wandb").exists())]
    )
    message = r'monitor.wandb is set \(project p\), but the package wandb is not installed; run pip install "maskvr_ds'
    with pytest.raises(ConfigError, match=message):
        check_monitors(monitor)
    with pytest.raises(ConfigError, match=message):
        log(tmp_path, monitor=monitor)
    check_monitors(QUIET)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_has_loss_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("maskvr_ds.telemetry.metrics._LINE_EVERY", 0.0)
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr("maskvr_ds.telemetry.metrics.time.perf_counter", lambda: float(next(seconds)))
    caplog.set_level("INFO")
    metrics = log(tmp_path, peak_tflops=None if terminal else 8e-6)
    for step in range(1, 10):
        metrics.step(record(step))
    metrics.flush()
    metrics._bar.refresh()  # it refreshes ten times per second
    shown = capsys.readouterr().err if terminal else caplog.text
    share = "" if terminal else r" \(MFU \d+%\)"
    assert re.search(rf"loss 22\.5000  lr 1\.00e-01  \d tokens/s{share}  \d+ (s|min) left", shown), shown
    assert ("90% |" in shown) == terminal
    metrics.close()


def test_trust_ratios_by_name_each_nth_step_also_over_a_resume(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    for step in range(1, 7):
        metrics.step(record(step, [step, math.inf, 1.0]))
    metrics.close()
    lines = read_lines(tmp_path / TRUST_RATIOS)
    assert [x["step"] for x in lines] == [2, 4, 6]
    assert lines[0] == {"step": 2, "samples": 16, "trust_ratios": dict(zip(NAMES, [2.0, None, 1.0], strict=True))}
    log(tmp_path, resume_step=4).close()
    assert read_lines(tmp_path / TRUST_RATIOS) == lines[:2]
    log(tmp_path).close()
    assert read_lines(tmp_path / TRUST_RATIOS) == []


def test_histogram_every_0_is_never(tmp_path: Path) -> None:
    metrics = log(tmp_path, monitor=MonitorConfig(tensorboard=False, histogram_every=0))
    metrics.step(record(2, [0.5, 0.5, 0.5]))
    metrics.close()
    assert not (tmp_path / TRUST_RATIOS).exists()


def test_histograms_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    metrics = log(tmp_path, monitor=MonitorConfig(csv=True, histogram_every=2))
    for step, ratios in enumerate([[9.0] * 3, [0.01, 10.0, 1.0], [9.0] * 3, [0.1, math.nan, 0.0], [9.0] * 3], 1):
        metrics.step(record(step, ratios))
    metrics.step(record(6, [math.nan] * 3))
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={HISTOGRAMS: 0}).Reload()
    shown = events.Histograms("lamb/trust_ratio_log10")
    assert [(h.step, h.histogram_value.num) for h in shown] == [(2, 3), (4, 1)], "finite, positive ratios"
    assert shown[0].histogram_value.min == pytest.approx(-2)
    assert shown[0].histogram_value.max == pytest.approx(1)
    assert shown[0].histogram_value.sum == pytest.approx(-1)
    medians = {e.step: e.value for e in events.Scalars("lamb/trust_ratio_median")}
    assert medians[2] == pytest.approx(5.005)
    assert (tmp_path / "csv" / "lamb_trust_ratio_median.csv").is_file()


def test_histograms_in_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # wandb is not installed with the tests: a fake of the two calls.
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda values: list(values)))
    logged: list[Any] = []
    metrics = log(tmp_path)
    metrics._monitor.wandb_monitor = SimpleNamespace(
        log=lambda data, step: logged.append((data, step)), write_events=lambda events: None
    )
    metrics.step(record(2, [0.01, 10.0, 1.0]))
    metrics.close()
    assert logged == [({"lamb/trust_ratio_log10": pytest.approx([-2, 1, 0])}, 2)]


def test_monitors_drop_values_after_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer.event_file_writer import AtomicCounter

    # Files of one second and process are read in the order of this number as text: not from 9 to 10.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(100))
    monitor = MonitorConfig(csv=True)
    path = tmp_path / "csv" / "train_loss.csv"
    # (step resumed from, steps run): killed, killed before the first checkpoint, rolled back.
    for resume, steps in ((0, (1, 2, 3)), (0, (1, 2, 3, 4, 5)), (3, (4, 5, 6)), (4, (5,))):
        metrics = log(tmp_path, resume_step=resume, monitor=monitor)
        for step in steps:
            metrics.step(record(step))
        metrics.close()
        with path.open("a") as file:
            file.write("4")  # truncated by a kill
    log(tmp_path, resume_step=5, monitor=monitor).close()
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0] == ["step", "loss"]
    assert [int(row[0]) for row in rows[1:]] == [1, 2, 3, 4, 5]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in shown] == [1, 2, 3, 4, 5]


def test_weights_and_biases_resumes_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # wandb is not installed with the tests: a fake that records what wandb.init reads.
    runs: list[tuple[str | None, str | None]] = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **_: runs.append((os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_RESUME")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    monitor = MonitorConfig.model_validate({"tensorboard": False, "wandb": {"project": "p"}})
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        log(tmp_path / folder, monitor=monitor).close()
    assert runs[0] == runs[1] == ((tmp_path / "a" / "wandb_run_id").read_text().strip(), "allow")
    assert runs[2][0] not in (None, runs[0][0]), "another run is another one"
    assert "WANDB_RUN_ID" not in os.environ
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    log(tmp_path / "a", monitor=monitor).close()
    assert runs[3] == ("mine", None)


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
