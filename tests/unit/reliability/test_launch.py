"""Ranks of one machine: their environment, signals, and what happens to the others if one of them fails."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from maskvr_ds import cli
from maskvr_ds.config import load_config
from maskvr_ds.reliability import launch
from maskvr_ds.reliability.signals import DEBOUNCE_SECONDS_OF_SIGINT
from maskvr_ds.run_folder.layout import STOP_REQUEST
from maskvr_ds.run_folder.status import EXIT_STOPPED

RANK = """
import json, os, pathlib, signal, sys, time
place = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
pathlib.Path(sys.argv[1], place["RANK"]).write_text(json.dumps(place))
end = sys.argv[2 + int(place["RANK"])]
if end == "waits":
    time.sleep(600)
if end == "saves":
    run = pathlib.Path(sys.argv[1], "..", "run")
    token = sys.argv[-1]
    if place["RANK"] == "0":
        from maskvr_ds.run_folder import fence
        fence.take(run, 2, token=token)
    while not (run / "stop_requested").exists():
        time.sleep(0.05)
    # Long enough for a repeated signal.
    time.sleep(1)
    (run / "stopped.json").write_text(json.dumps({"step": 3, "owner": token}))
    sys.exit(75)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_rank.py").write_text(RANK)
    (tmp_path / "said").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "_GRACE", 0.2)
    return "a_rank"


def test_rank_environments(module: str, tmp_path: Path) -> None:
    assert launch.run_here(module, [str(tmp_path / "said"), "0", "0", "0"], 3) == 0
    places = [json.loads((tmp_path / "said" / str(rank)).read_text()) for rank in range(3)]
    assert [(p["RANK"], p["LOCAL_RANK"], p["WORLD_SIZE"]) for p in places] == [(str(r), str(r), "3") for r in range(3)]
    assert len({(p["MASTER_ADDR"], p["MASTER_PORT"]) for p in places}) == 1


@pytest.mark.parametrize(("ends", "said"), [(("waits", "1"), ""), (("waits", "killed"), "rank 1 was killed by")])
def test_one_failing_rank_ends_the_others(
    module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], ends: tuple[str, str], said: str
) -> None:
    started = time.monotonic()
    assert launch.run_here(module, [str(tmp_path / "said"), *ends], 2) == 1
    assert time.monotonic() - started < 60
    assert said in capfd.readouterr().err


def test_all_ranks_killed_at_once_are_named(
    module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks at them, as by the kernel when memory runs out."""
    monkeypatch.setattr(launch, "_POLL", 3.0)
    assert launch.launch_here(module, [str(tmp_path / "said"), "killed", "killed"], 2, tmp_path / "run", 10) == 1
    said = capfd.readouterr().err
    for rank in (0, 1):
        assert f"error: rank {rank} was killed by SIGKILL (by hand, or by the kernel when memory ran out)" in said


def test_single_host_is_not_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own parser reads the arguments as intended."""
    from deepspeed.launcher import runner

    started: list[list[str]] = []
    monkeypatch.setattr(launch, "launch", lambda words, run, steps: started.append(words) or 0)
    hosts = tmp_path / "hosts"
    hosts.write_text("elsewhere slots=2\n")
    assert cli.main(["train", "--config", "demo_cpu", "--hostfile", str(hosts), "--set", "seed=3"]) == 0
    parsed = runner.parse_args(started[0])
    assert (parsed.force_multi, parsed.hostfile, parsed.module) == (True, str(hosts), True)
    assert (parsed.user_script, parsed.user_args) == ("maskvr_ds.train", ["--config", "demo_cpu", "--set", "seed=3"])


def test_single_quotes_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("elsewhere slots=2\n")
    value = "output_dir=run'; touch pwned '"
    assert cli.main(["train", "--config", "demo_cpu", "--hostfile", str(hosts), "--set", value]) == 1
    assert "DeepSpeed's launcher cannot pass values that contain a single quote" in capsys.readouterr().err


def test_hostfile_is_checked_before_deepspeed_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# mine\nh1 slots=2  # the first\n\nh2\n")
    assert cli.main(["train", "--config", "demo_cpu", "--hostfile", str(hosts)]) == 1
    assert "hosts:4: 'h2' is not `host slots=N`" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-3", "two", "1e3", "2000", "9" * 5000])
def test_ranks_are_counted_from_one(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--config", "demo_cpu", "--num-gpus", count])
    assert f"{count[:60]!r}" in (error := capsys.readouterr().err)
    assert "expected an integer from 1 to 1,024" in error


def test_ranks_that_cannot_start_are_not_started(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert cli.main(["train", "--config", "demo_cpu", "--num-gpus", "1000"]) == 1
    assert "--num-gpus 1000: this process may use 2 CPU cores and no GPU; at most 8 ranks per core, 16" in (
        capsys.readouterr().err
    )
    assert cli.main(["train", "--config", "demo_cpu", "--num-gpus", "7"]) == 1
    assert "is not a multiple of batch.micro_size 32 × 7 ranks" in capsys.readouterr().err
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("pathlib.Path.glob", lambda *_: ["nvidia0", "nvidia1"])
    assert cli.main(["train", "--config", "demo_cpu", "--num-gpus", "3"]) == 1
    assert "--num-gpus 3: this machine has 2 GPUs, and a rank needs one of its own" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [False, True])
def test_resume_is_suggested_if_there_is_a_checkpoint(saved: bool, tmp_path: Path, module: str, capfd: Any) -> None:
    if saved:
        (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
        (tmp_path / "run/checkpoints/step-00000001/checkpoint.json").touch()
    (tmp_path / "said").mkdir(exist_ok=True)
    assert launch.launch_here(module, [str(tmp_path / "said"), "1", "1"], 2, tmp_path / "run", 10) == 1
    assert ("resume with --resume auto" in capfd.readouterr().err) == saved


def test_printed_configuration_loads_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--no-files", "--config", "demo_cpu", "--set", "seed=7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config("demo_cpu", ["seed=7"])
    printed.write_bytes(b"\xff\xfe")
    assert cli.main(["config", "--config", str(printed)]) == 1
    assert "printed.yaml: not UTF-8 text" in capsys.readouterr().err


def test_job_with_gpus_does_not_train_on_cpus(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"SLURM_GPUS_ON_NODE": "2"}
    words = [sys.executable, "-m", "maskvr_ds.train", "--config", "demo_cpu", "--set", f"output_dir={tmp_path / 'run'}"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "Slurm gave the job 2 GPUs of this node, and torch" in ended.stderr
    assert "Traceback" not in ended.stderr


LAUNCHER = """
import pathlib, sys
from maskvr_ds.reliability import launch
sys.exit(launch.launch_here("a_rank", sys.argv[2:], 2, pathlib.Path(sys.argv[1]), 10))
"""


def start(folder: Path, *ends: str, terminal: int = subprocess.DEVNULL) -> tuple["subprocess.Popen[bytes]", list[int]]:
    """Start a launcher of two ranks and wait until they run; returns its process and their ids."""
    (folder / "run").mkdir()
    words = [sys.executable, "-c", LAUNCHER, str(folder / "run"), str(folder / "said"), *ends]
    process = subprocess.Popen(words, stdout=terminal, stderr=terminal)
    while len(list((folder / "said").iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return process, [child.pid for child in psutil.Process(process.pid).children()]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("signals", [["TERM", "TERM"], ["HUP"], ["TERM", "HUP"], ["USR1", "USR1"], ["INT"]])
def test_repeated_signal_is_one_request(tmp_path: Path, signals: Sequence[str]) -> None:
    process, _ = start(tmp_path, "saves", "saves")
    for name in signals:
        process.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.1)
    assert process.wait(60) == EXIT_STOPPED
    assert not (tmp_path / "run" / STOP_REQUEST).exists()


@pytest.mark.usefixtures("module")
def test_second_signal_kills_the_ranks(tmp_path: Path) -> None:
    process, ranks = start(tmp_path, "waits", "waits")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not any(map(psutil.pid_exists, ranks))


@pytest.mark.usefixtures("module")
def test_second_interrupt_kills_the_ranks(tmp_path: Path) -> None:
    process, ranks = start(tmp_path, "waits", "waits")
    process.send_signal(signal.SIGINT)
    time.sleep(DEBOUNCE_SECONDS_OF_SIGINT + 0.1)
    assert process.poll() is None, "the first one only asks"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert not any(map(psutil.pid_exists, ranks))


@pytest.mark.usefixtures("module")
def test_closed_terminal_does_not_keep_ranks_from_saving(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process, _ = start(tmp_path, "saves", "saves", terminal=theirs)
    os.close(theirs)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == EXIT_STOPPED


@pytest.mark.usefixtures("module")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    process, ranks = start(tmp_path, "waits", "waits")
    assert len(ranks) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
