"""Fencing: at most one job owns a run; takeover, refusal of a second job, and checks of a fenced-out owner."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from maskvr_ds.run_folder import fence
from maskvr_ds.run_folder.checkpoints import is_started
from maskvr_ds.run_folder.fence import Fence, FencedError, Owner, read, take
from maskvr_ds.run_folder.layout import JOBS, OWNER

# Takes the run, reports it and waits.
HOLDER = """
import sys, pathlib
from maskvr_ds.run_folder import fence
fence.take(pathlib.Path(sys.argv[1]), 2)
print("taken", flush=True)
input()
"""


def slurm(job: int, restarts: int = 0) -> dict[str, str]:
    return {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "n[1-2]"}


def hold(run: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """A live process that has taken the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def elsewhere(run: Path, **changes: object) -> Owner:
    """An owner on another host."""
    owner = replace(take(run, 2), **{"host": "other", "job": "", **changes})
    (run / OWNER).write_text(json.dumps(asdict(owner)))
    return owner


def beat(run: Path, rank: int, number: int, place: str = "step") -> Path:
    path = run / "heartbeats" / "job" / f"rank-{rank:05d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"beat": number, "place": place}))
    return path


def test_another_task_of_an_array_is_another_job(tmp_path: Path) -> None:
    first, other = ({**slurm(7), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": number} for number in "01")
    process = hold(tmp_path, first)
    try:
        assert str(read(tmp_path)).startswith("Slurm job 7_0 (restart 0)")
        with pytest.raises(FencedError, match="in use by Slurm job 7_0"):
            take(tmp_path, 2, {**other, "SLURM_RESTART_COUNT": "1"})
        assert take(tmp_path, 2, {**first, "SLURM_RESTART_COUNT": "1"}).job == "7_0"
    finally:
        process.kill()
        process.wait()


def test_epochs_increase_and_the_latest_owner_holds_the_run(tmp_path: Path) -> None:
    former = Fence(tmp_path)
    former.hold(former.take(4))
    former.check()
    assert former.take(4) == read(tmp_path), "taking it again keeps the epoch"
    later = Fence(tmp_path)
    later.hold(later.take(2))
    later.check()
    assert (read(tmp_path).epoch, read(tmp_path).ranks) == (2, 2)  # type: ignore[union-attr]
    assert former.label != later.label
    with pytest.raises(FencedError, match=rf"process {os.getpid()} on .*stops writing to it"):
        former.check()
    with pytest.raises(FencedError, match="stops writing to it"):
        former.take(4)
    (tmp_path / OWNER).unlink()
    with pytest.raises(FencedError, match="is missing"):
        later.check()
    (tmp_path / JOBS).mkdir()
    assert not is_started(tmp_path), "a run that was only taken may be started without --resume"
    assert [path.name for path in tmp_path.iterdir()] == [JOBS], "no other file remains"


def test_a_second_job_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    process = hold(tmp_path, slurm(7))
    for environment in ({}, slurm(8), slurm(7)):
        with pytest.raises(FencedError, match=rf"in use by Slurm job 7 .*process {process.pid} on .*end that job"):
            take(tmp_path, 2, environment)
    # Slurm requeued the job itself, so remaining processes of its previous start are stale.
    assert take(tmp_path, 1, slurm(7, 1)).epoch == 2
    process.communicate("\n")


def test_no_wait_for_a_dead_owner(tmp_path: Path) -> None:
    process = hold(tmp_path, {})
    beat(tmp_path, 0, 1)
    process.kill()
    process.wait()
    start = time.monotonic()
    assert take(tmp_path, 2, {}).epoch == 2
    assert time.monotonic() - start < 2


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    process = hold(tmp_path, {})
    owner = read(tmp_path)
    assert owner is not None
    (tmp_path / OWNER).write_text(json.dumps(asdict(replace(owner, started=owner.started - 1))))
    assert take(tmp_path, 2, {}).epoch == 2
    process.communicate("\n")


def test_owner_on_another_host_is_judged_by_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path)
    assert take(tmp_path, 2, {}), "no heartbeat was ever written"
    owner = elsewhere(tmp_path)
    old = beat(tmp_path, 0, 5)
    os.utime(old, (time.time() - 60,) * 2)
    assert not fence.at_work(tmp_path, owner), "no wait: the last beat is too old"
    beat(tmp_path, 0, 6, place="ended")
    assert not fence.at_work(tmp_path, owner)
    beat(tmp_path, 0, 7)
    # Simulated clock: each reading advances it; the other owner beats, or not, during the sleeps.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert not fence.at_work(tmp_path, owner)
    monkeypatch.setattr(time, "sleep", lambda seconds: beat(tmp_path, 0, 8))
    assert fence.at_work(tmp_path, owner)
    beat(tmp_path, 0, 9)
    with pytest.raises(FencedError, match="on other, since"):
        take(tmp_path, 2, {})


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text('{"epoch": 1')
    with pytest.raises(FencedError, match=r"owner.json: damaged"):
        take(tmp_path, 2)


def test_of_two_jobs_that_start_together_one_is_refused(tmp_path: Path) -> None:
    """Both have looked, and seen nobody, before either takes the run."""
    for before in (False, True):
        first, second = Fence(tmp_path), Fence(tmp_path)
        first.look()
        second.look()
        owner = first.take(1)
        with pytest.raises(FencedError, match=r"owner.json names process .* since this job has started; nothing was"):
            second.take(2)
        assert read(tmp_path) == owner
        assert (owner.epoch, [path.name for path in tmp_path.iterdir()]) == (1 + before, [OWNER])


def test_takers_at_the_same_time(tmp_path: Path) -> None:
    """The record is read and replaced under the folder's lock: every epoch has one owner."""
    code = (
        "import sys, pathlib\nfrom maskvr_ds.run_folder import fence\nrun = pathlib.Path(sys.argv[1])\ntaken = []\n"
        "fence.at_work = lambda *_: False\ninput()\n"
        "for _ in range(30):\n    try:\n        taken.append(fence.take(run, 1).epoch)\n"
        "    except fence.FencedError:\n        continue\nprint(*taken)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    jobs = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    time.sleep(1)
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("\n")
        job.stdin.flush()
    epochs = [int(epoch) for job in jobs for epoch in job.communicate()[0].split()]
    last = read(tmp_path / "run")
    assert last is not None
    assert sorted(epochs) == list(range(1, last.epoch + 1))


def test_a_folder_that_somebody_fills_meanwhile_is_not_a_runs(tmp_path: Path) -> None:
    run = Fence(tmp_path / "run")
    run.look()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "build.json").write_text("{}")
    with pytest.raises(FencedError, match="not a run's folder"):
        run.take(1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["build.json"]


def test_a_launcher_chooses_the_token(tmp_path: Path) -> None:
    job = Fence(tmp_path, "123.abc")
    job.hold(job.take(2))
    assert (job.token, job.label) == ("123.abc", "1-123.abc")
