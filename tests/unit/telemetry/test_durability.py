"""What power failures, full disks and jobs that have lost the run leave in the records of a run."""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maskvr_ds.config import MonitorConfig
from maskvr_ds.run_folder.layout import METRICS, TRUST_RATIOS
from maskvr_ds.telemetry.metrics_file import append_event, read_events, read_lines
from tests.unit.telemetry.test_metrics import log, record

RATIOS = [0.5, 2.0, 1.0]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)


def test_both_files_are_as_durable_as_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = log(tmp_path)
    for step in (1, 2):
        metrics.step(record(step, RATIOS))
    synced: list[int] = []
    monkeypatch.setattr("maskvr_ds.telemetry.metrics.os.fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    metrics.flush_to_disk()
    assert synced == [(tmp_path / name).stat().st_ino for name in (METRICS, TRUST_RATIOS)]
    metrics.close()


def test_a_job_that_has_lost_the_run_writes_to_neither_file(tmp_path: Path) -> None:
    """Also if its first line of trust ratios comes after the other job has taken the run."""
    lost = log(tmp_path)
    lost.step(record(1, RATIOS))
    owner = log(tmp_path)
    for step in (2, 3):
        lost.step(record(step, RATIOS))
    lost.close()
    owner.step(record(1, RATIOS))
    owner.step(record(2, [9.0, 9.0, 9.0]))
    owner.close()
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 2]
    assert [line["trust_ratios"]["embeddings"] for line in read_lines(tmp_path / TRUST_RATIOS)] == [9.0]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    metrics = log(tmp_path)
    metrics._file.close()
    metrics._file = Path("/dev/full").open("a", buffering=1, encoding="utf-8")  # noqa: SIM115
    metrics.step(record(1))
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        metrics.step(record(2))


def test_an_event_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    append_event(path, {"event": "diverged", "step": 2})
    assert (read_lines(path), read_events(path)) == ([{"step": 1}], [{"event": "diverged", "step": 2}])
    append_event(tmp_path / "new", {"event": "diverged", "step": 2})
    assert (tmp_path / "new").read_text() == json.dumps({"event": "diverged", "step": 2}) + "\n"


@pytest.mark.parametrize("bad", [b"\xff\xfe\x00", b"\x00" * 200_000, "²,1".encode(), b"3,", b"3,x", b'"'])
def test_damaged_rows_of_csv_are_dropped(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "csv" / "train_loss.csv"
    path.parent.mkdir()
    path.write_bytes(b"step,loss\r\n1,2.5\r\n" + bad + b"\r\n2,2.25\r\n9,1.0\r\n")
    log(tmp_path, resume_step=3, monitor=MonitorConfig(tensorboard=False, csv=True, histogram_every=0)).close()
    assert path.read_text().splitlines() == ["step,loss", "1,2.5", "2,2.25"]


def test_an_empty_id_of_weights_and_biases_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk has left it: every resume would start another run there."""
    ids: list[str | None] = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **_: ids.append(os.environ.get("WANDB_RUN_ID"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monitor: Any = MonitorConfig.model_validate({"tensorboard": False, "wandb": {"project": "p"}})
    (tmp_path / "wandb_run_id").touch()
    for _ in range(2):
        log(tmp_path, monitor=monitor).close()
    assert ids[0]
    assert ids[0] == ids[1] == (tmp_path / "wandb_run_id").read_text().strip()
