"""Run status files: markers of an earlier job are not mistaken for those of the current one."""

import os
from pathlib import Path

import pytest

from maskvr_ds.reliability import launch
from maskvr_ds.run_folder import status
from maskvr_ds.run_folder.layout import COMPLETED, STOP_REQUEST, STOPPED


def test_markers_of_an_earlier_job_are_ignored(tmp_path: Path) -> None:
    status.write(tmp_path, COMPLETED, 40, "earlier")
    assert status.completed(tmp_path, 40)
    assert not status.completed(tmp_path, 40, "mine")
    status.write(tmp_path, STOPPED, 20, "mine")
    assert status.step_of(tmp_path, STOPPED, "mine") == 20
    assert status.step_of(tmp_path, STOPPED, "earlier") is None
    status.write(tmp_path, COMPLETED, 40, "mine")
    assert status.completed(tmp_path, 40, "mine")
    assert not status.completed(tmp_path, 41, "mine")
    # As versions wrote it that named no owner.
    (tmp_path / COMPLETED).write_text('{"step": 40}')
    assert status.step_of(tmp_path, COMPLETED) == 40
    assert status.step_of(tmp_path, COMPLETED, "mine") is None


@pytest.mark.parametrize("end", [COMPLETED, STOPPED])
def test_ranks_that_refuse_the_run_keep_its_status(tmp_path: Path, end: str) -> None:
    """A module that rejects its options exits with status 2 before it opens the run."""
    run = tmp_path / "run"
    run.mkdir()
    status.write(run, end, 40, "earlier")
    assert launch.launch_here("data_pipeline", ["--no-such-option"], 2, run, 40) == 1
    assert status.step_of(run, end) == 40


def test_a_stop_request_to_an_earlier_job_is_deleted(tmp_path: Path) -> None:
    status.forget_request(tmp_path, 0, "mine")
    request = tmp_path / STOP_REQUEST
    request.touch()
    status.forget_request(tmp_path, 30, "mine")
    assert request.exists(), "made after the start"
    os.utime(request, (request.stat().st_mtime - 60,) * 2)
    status.forget_request(tmp_path, 90, "mine")
    assert request.exists(), "not older than the start"
    status.forget_request(tmp_path, 30, "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_request_is_to_one_job_or_to_whoever_has_the_run(tmp_path: Path) -> None:
    request = tmp_path / STOP_REQUEST
    assert not status.stop_requested(tmp_path, "mine")
    status.request_stop(tmp_path, "SIGTERM", "mine")
    assert status.stop_requested(tmp_path, "mine")
    assert not status.stop_requested(tmp_path, "another")
    status.withdraw_request(tmp_path, "another")
    status.write(tmp_path, STOPPED, 3, "another")
    assert request.exists(), "neither withdrawn nor answered by another job"
    assert "requested" not in (tmp_path / STOPPED).read_text()
    status.forget_request(tmp_path, 0, "mine")
    assert request.exists()
    status.write(tmp_path, STOPPED, 3, "mine")
    assert not request.exists()
    assert '"requested": true' in (tmp_path / STOPPED).read_text()
    status.request_stop(tmp_path, "SIGTERM", "mine")
    status.withdraw_request(tmp_path, "mine")
    assert not request.exists()
    status.request_stop(tmp_path, "SIGTERM", "an earlier job")
    status.forget_request(tmp_path, 1000, "mine")
    assert not request.exists(), "of a job that has ended: this one owns the run"
    for content in (b"", b"please stop\n", b"\xff\xfe\n"):
        request.write_bytes(content)
        assert status.stop_requested(tmp_path, "mine"), "anybody may make one"
        status.withdraw_request(tmp_path, "mine")
        assert request.exists()
    request.unlink()
    request.mkdir()
    assert status.stop_requested(tmp_path, "mine")
