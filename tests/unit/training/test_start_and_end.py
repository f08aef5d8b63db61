"""What follows the last step of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskvr_ds import train
from maskvr_ds.training import report


def test_a_plot_that_fails_does_not_fail_a_complete_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "plot_loss", full)
    monkeypatch.setattr(train, "end_lines", lambda *_: ["done"])
    caplog.set_level("INFO", "maskvr_ds.train")
    config: Any = SimpleNamespace(output_dir=tmp_path)
    train._report(config, SimpleNamespace(), 7, tmp_path)  # type: ignore[arg-type]
    assert "loss.png could not be plotted ([Errno 28] No space left on device)" in caplog.text
    assert caplog.records[-1].getMessage() == "done"


def test_figures_that_cannot_be_read_do_not_fail_a_complete_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(path: Path) -> None:
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(train, "plot_loss", lambda *_: None)
    monkeypatch.setattr(report, "read_lines", stale)
    config: Any = SimpleNamespace(output_dir=tmp_path)
    train._report(config, SimpleNamespace(), 7, tmp_path)  # type: ignore[arg-type]
    assert "step 7 is complete; its figures cannot be read now: [Errno 116] Stale file handle" in caplog.text


def test_the_end_names_the_step_that_was_reached(tmp_path: Path) -> None:
    """Of a run that was resumed after the last step of its configuration."""
    data = SimpleNamespace(held_out_path=None, corpora=[SimpleNamespace(path=tmp_path)])
    phase: Any = SimpleNamespace(
        last_step=5, config=SimpleNamespace(data=data, checkpoint=SimpleNamespace(keep_best=False))
    )
    run: Any = SimpleNamespace(output_dir=tmp_path)
    checkpoint = tmp_path / "step-00000010"
    assert report.end_lines(run, phase, 10, checkpoint)[0] == f"done      step 10, {checkpoint}"
