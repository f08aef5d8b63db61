"""Run status from the run's folder and squeue."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.status import _ago, last_step, read_status, runs_of
from maskvr_ds.run_folder import fence, layout
from maskvr_ds.run_folder.status import clear, write


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a run started by a Slurm job on two nodes, whose process has ended. Without squeue."""
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "run"
    fence.take(folder, 8, {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-2]"})
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000020\n")
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.0, "tokens_per_second": 5.0},
        {"step": 22, "loss": 2.5, "tokens_per_second": 1000.5},
        {"event": "checkpoint", "step": 20, "seconds": 1.0},
    ]
    # A kill has truncated the last line.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 23, "lo')
    (folder / "slurm").mkdir()
    (folder / "slurm" / "attempt").write_text("41 2\n")
    gone(folder)
    return folder


def gone(run: Path) -> None:
    """Make the owner's process look ended."""
    owner = json.loads((run / layout.OWNER).read_text())
    (run / layout.OWNER).write_text(json.dumps({**owner, "started": 0}))


def queue(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "squeue").write_text(f"#!/bin/sh\nprintf %s '{answer}'\n")
    (folder / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def beat(run: Path, age: float, rank: int = 0) -> None:
    path = run / "heartbeats" / "job" / f"rank-{rank:05d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"place": "step"}))
    os.utime(path, (time.time() - age,) * 2)


def test_status_from_the_folder(run: Path) -> None:
    status = read_status(run)
    assert (status.state, status.job, status.restarts, status.ranks, status.nodes) == ("ended", "41", 2, 8, "n[1-2]")
    assert (status.step, status.loss, status.tokens_per_second) == (22, 2.5, 1000.5)
    assert status.checkpoint == "step-00000020"
    assert status.heartbeat_ages is None


def test_states(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(run, 300)
    beat(run, 200, rank=1)
    assert read_status(run).state == "ended", "the heartbeats are too old"
    ages = read_status(run).heartbeat_ages
    assert ages is not None
    assert ages == pytest.approx((200, 300), abs=30)
    beat(run, 3)
    assert read_status(run).state == "running"
    beat(run, 300)
    write(run, layout.STOPPED, 20, "token")
    assert read_status(run).state == "stopped"
    clear(run)
    write(run, layout.COMPLETED, 30, "token")
    assert (read_status(run).state, read_status(run).why) == ("completed", "completed.json: step 30")


def test_process_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    fence.take(tmp_path, 1, {})
    assert read_status(tmp_path).state == "running"


@pytest.mark.parametrize(
    ("answer", "state", "nodes"),
    [
        ("RUNNING|None|n[5-6]|1:02", "running", "n[5-6]"),
        ("PENDING|BeginTime||0:00", "queued", "n[1-2]"),
        ("SUSPENDED|None|n[1-2]|0:50", "suspended", "n[1-2]"),
        ("", "ended", "n[1-2]"),
    ],
)
def test_status_from_squeue(run: Path, monkeypatch: pytest.MonkeyPatch, answer: str, state: str, nodes: str) -> None:
    queue(run.parent, monkeypatch, answer)
    # A requeued job has stopped before.
    if answer.startswith("PENDING"):
        write(run, layout.STOPPED, 20, "token")
    status = read_status(run)
    assert (status.state, status.nodes) == (state, nodes)
    if state == "queued":
        assert "BeginTime" in status.why


def test_a_job_that_has_not_started_is_queued(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new run, and of one whose last job has ended."""
    queue(run.parent, monkeypatch, "")
    script = run.parent / "bin" / "squeue"
    script.write_text("#!/bin/sh\ncase $2 in --jobs=42) echo 'PENDING|Priority||0:00';; esac\n")
    new = run.parent / "new"
    (new / "slurm").mkdir(parents=True)
    for folder in (run, new):
        (folder / "slurm" / "submitted").write_text("42\n")
        status = read_status(folder)
        assert (status.state, status.job, status.restarts) == ("queued", "42", None)
        assert "PENDING (Priority)" in status.why


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run), str(run), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["step"] == second["step"] == 22
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    for words in (": ended (", "job 41, restarts 2, nodes n[1-2], 8 ranks", "step 22, loss 2.5000, 1,000 tokens/s"):
        assert words in text
    assert main(["status", str(run / "nothing"), str(run)]) == 1
    found = capsys.readouterr()
    assert "nothing: no such folder" in found.err
    assert ": ended (" in found.out, "the runs that there are"
    assert main(["status", str(run / "checkpoints")]) == 1
    assert "neither a run's folder" in capsys.readouterr().err


def test_runs_of_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 10):
        (tmp_path / f"seed-{seed}").mkdir()
    assert [path.name for path in runs_of(tmp_path)] == ["seed-0", "seed-10"]
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("not started") == 2


@pytest.mark.parametrize(
    ("config", "of"),
    [
        ("training: {steps: 40}", " of 40"),
        ("phases: [{training: {steps: 30}}, {training: {steps: 20}}]", " of 50"),
        ("phases: [{training: {steps: 30}}, {training: {epochs: 2}}]", ""),
        ("training: {steps: null}", ""),
        ("training: [", ""),
    ],
)
def test_steps_of_the_configuration(run: Path, config: str, of: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / layout.CONFIG).write_text(config, encoding="utf-8")
    assert main(["status", str(run)]) == 0
    assert f"step 22{of}, loss 2.5000" in capsys.readouterr().out


def test_ages_have_readable_units() -> None:
    assert [_ago(age) for age in (None, 5, 119, 1192, 7300, 400_000)] == [
        "",
        *("5 s ago", "119 s ago", "20 min ago", "2 h ago", "5 days ago"),
    ]


def test_reads_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "padding": "x" * 500}) + "\n" for n in range(1000)))
    assert last_step(path)["step"] == 999
    assert last_step(tmp_path / "none") == {}
