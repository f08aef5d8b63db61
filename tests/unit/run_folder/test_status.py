"""Run status files: markers of an earlier job are not mistaken for those of the current one."""

import os
from pathlib import Path

import pytest

from maskvr_ds.reliability import launch
from maskvr_ds.run_folder import status
from maskvr_ds.run_folder.layout import COMPLETED, STOP_REQUEST, STOPPED


def test_markers_of_an_earlier_job_are_ignored(tmp_path: Path) -> None:
    status.write(tmp_path, COMPLETED, 40)
    # Clearly older: file systems may store times in seconds.
    os.utime(tmp_path / COMPLETED, (1e9, 1e9))
    before = status.written(tmp_path)
    assert status.completed(tmp_path, 40)
    assert not status.completed(tmp_path, 40, before)
    status.write(tmp_path, STOPPED, 20)
    assert status.step_of(tmp_path, STOPPED, before) == 20
    status.write(tmp_path, COMPLETED, 40)
    assert status.completed(tmp_path, 40, before)
    assert not status.completed(tmp_path, 41, before)


@pytest.mark.parametrize("end", [COMPLETED, STOPPED])
def test_ranks_that_refuse_the_run_keep_its_status(tmp_path: Path, end: str) -> None:
    """A module that rejects its options exits with status 2 before it opens the run."""
    run = tmp_path / "run"
    run.mkdir()
    status.write(run, end, 40)
    assert launch.launch_here("data_pipeline", ["--no-such-option"], 2, run, 40) == 1
    assert status.step_of(run, end) == 40


def test_a_stop_request_to_an_earlier_job_is_deleted(tmp_path: Path) -> None:
    status.forget_request(tmp_path, 0)
    request = tmp_path / STOP_REQUEST
    request.touch()
    status.forget_request(tmp_path, 30)
    assert request.exists(), "made after the start"
    os.utime(request, (request.stat().st_mtime - 60,) * 2)
    status.forget_request(tmp_path, 90)
    assert request.exists(), "not older than the start"
    status.forget_request(tmp_path, 30)
    assert list(tmp_path.iterdir()) == []
