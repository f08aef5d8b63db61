"""`maskvr evaluate --jobs`: the same scores from several processes, also if the command or one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.cli import main
from maskvr_ds.downstream import files, jobs
from maskvr_ds.runtime.processes import start_time
from tests.support.tasks import save_model, write_sst2, write_tsv

OPTIONS = ["--learning-rates", "2e-3", "5e-3", "--seeds", "3", "--epochs", "4", "--batch-size", "16"]
OPTIONS += ["--max-length", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sst2(tmp_path_factory.mktemp("tasks"), train=160)
    write_sst2(folder / "other", train=160, seed=1)
    (folder / "other" / "SST-2").rename(folder / "CoLA")
    for name in ("train", "dev"):
        path = folder / "CoLA" / f"{name}.tsv"
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        write_tsv(path, rows)
    return folder


def words(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    base = ["evaluate", str(model), "--tasks", "sst2", "cola", "--data", str(data), "--output", str(output)]
    return [*base, *OPTIONS, *more]


def scores(output: Path) -> dict[str, Any]:
    """results.json without what differs between any two evaluations."""
    tasks = json.loads((output / "results.json").read_text(encoding="utf-8"))["tasks"]
    for task in tasks.values():
        for row in task["rows"].values():
            del row["seconds"]
    return tasks


@pytest.fixture(scope="module")
def undisturbed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "o"
    assert main(words(model, data, output)) == 0
    return output


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "maskvr_ds.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
    )  # fmt: skip


def workers(process: subprocess.Popen) -> list[int]:
    """Processes that a command has spawned for runs."""
    found = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split():
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(pid))
    return found


def wait_for_runs(output: Path, process: subprocess.Popen, count: int) -> None:
    while len(list((output / "runs").rglob("tiny-*.json"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_killed_and_resumed_by_two_processes(model: Path, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL of the command ends its workers; what they had stored is not repeated, and the scores are equal."""
    process = start(words(model, data, tmp_path / "o", "--jobs", "2"))
    wait_for_runs(tmp_path / "o", process, 2)
    own = workers(process)
    assert len(own) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(start_time(pid) is not None for pid in own):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    kept = {p: p.read_bytes() for p in (tmp_path / "o" / "runs").rglob("tiny-*.json")}
    assert 2 <= len(kept) < 10
    process = start(words(model, data, tmp_path / "o", "--jobs", "2"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert {p: p.read_bytes() for p in kept} == kept
    # Each run has one line, whichever process computed it.
    lines = [line for line in out.splitlines() if ": tiny-" in line]
    assert len(lines) == 10
    assert sum("(stored)" in line for line in lines) == len(kept)
    assert scores(tmp_path / "o") == scores(undisturbed)


def test_a_killed_worker(model: Path, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Its run is named, all others are computed, the status is not zero; the same command completes the rest."""
    process = start(words(model, data, tmp_path / "o", "--jobs", "2"))
    wait_for_runs(tmp_path / "o", process, 1)
    os.kill(workers(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out
    # Python may warn after it that the killed process has left a semaphore behind.
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: 1 run failed; all others are stored: "), err
    task = error.split(": ")[2]
    assert f"{task}: tiny-" in error
    assert "its process was killed" in error
    # The other task is complete, and of this one the rows that need no model.
    (other,) = {"sst2", "cola"} - {task}
    found = scores(tmp_path / "o")
    assert found[other] == scores(undisturbed)[other]
    assert list(found[task]["rows"]) == ["majority", "bag of words"]
    assert "its process was killed" in found[task]["failed"][str(model)]
    assert main(words(model, data, tmp_path / "o", "--jobs", "2")) == 0
    assert scores(tmp_path / "o") == scores(undisturbed)


def test_a_run_that_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error in a worker is a line that names task and run."""
    monkeypatch.setattr(files, "check_unicode", lambda *_: None)
    data = write_sst2(tmp_path / "d", train=160)
    dev = data / "SST-2" / "dev.tsv"
    lines = dev.read_text(encoding="utf-8").splitlines()[1:]
    dev.unlink()
    rows = [json.dumps({"sentence": line.split("\t")[0], "label": line[-1]}) for line in lines]
    # What no tokenizer can read: files are read, and would be refused, in this process.
    rows.append(json.dumps({"sentence": "w1 \ud800", "label": "1"}))
    (data / "SST-2" / "dev.jsonl").write_text("\n".join(rows), encoding="utf-8")
    command = ["evaluate", str(model), "--tasks", "sst2", "--data", str(data), "--output", str(tmp_path / "o")]
    assert main([*command, *OPTIONS, "--jobs", "2", "--seeds", "2"]) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: 2 runs failed; all others are stored: sst2: tiny-final-")
    assert "seed0: " in last
    assert "seed1: " in last
    assert out.count("selection") == 2
    assert out.count("seed0 failed: ") == 1
    assert len(list((tmp_path / "o" / "runs").rglob("tiny-selection*.json"))) == 2


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b"]), ("0,7,-1", 2, ["0", "7"])],
)
def test_one_gpu_per_process(
    visible: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert jobs.visible_devices() == expected
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert jobs.visible_devices() == []


def test_terminated(model: Path, data: Path, tmp_path: Path) -> None:
    """SIGTERM, as at a time limit: status 143, no worker, and no temporary file of the command or of its workers."""
    (tmp_path / "tmp").mkdir()
    process = start(
        words(model, data, tmp_path / "o", "--jobs", "2", "--early-stopping", "3"), TMPDIR=str(tmp_path / "tmp")
    )
    wait_for_runs(tmp_path / "o", process, 1)
    own = workers(process)
    assert list((tmp_path / "tmp").iterdir())
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert not any(start_time(pid) is not None for pid in own)
    assert not list((tmp_path / "tmp").glob("maskvr-*"))
