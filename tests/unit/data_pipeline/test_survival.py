"""SIGKILL of one or all processes at random moments, with worker processes and MPI ranks: same bytes after resuming.

A few kills by default, 20 for each kind of build with --whole-survival. test_build.py and test_description.py go
through all states that a kill can leave.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import ROOT, command, make_documents, tree, write_text, write_tokenizer

_LAUNCHER = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_mpi = pytest.mark.skipif(_LAUNCHER is None or find_spec("mpi4py") is None, reason="no mpiexec or no mpi4py here")
LAUNCHERS: dict[str, list[str]] = {"workers": [], "mpi": [str(_LAUNCHER), "-n", "2"]}
WORKERS = {"workers": 2, "mpi": 1}
SIZES: dict[str, Any] = {"work_size": 0.006, "shard_size": 0.006, "held_out": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    for i in range(4):
        write_text(folder / f"in/part{i}.txt", make_documents(100, seed=i))
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    build([folder / "in"], folder / "tok", 16, folder / "uninterrupted", progress=False, **SIZES)
    return folder


def start(folder: Path, output: Path, launcher: str, **environment: str) -> subprocess.Popen[str]:
    options: list[object] = ["--tokenizer", folder / "tok", "--sequence-length", 16, "--output", output]
    for name, value in SIZES.items():
        options += [f"--{name.replace('_', '-')}", value]
    words = command("build", "--input", folder / "in", *options, "--workers", WORKERS[launcher])
    return subprocess.Popen(
        [*LAUNCHERS[launcher], *words],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def descendants(process: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == process:
                found += [int(path.name), *descendants(int(path.name))]
    return found


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def end(process: subprocess.Popen[str], below: list[int]) -> None:
    """Wait until all processes of a killed job have exited."""
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        # A launcher may wait forever for one of its helpers that was killed; only the ranks matter.
        kill(process.pid)
        process.wait()
    for left in below:
        for _ in range(100):
            if not Path(f"/proc/{left}").exists():
                break
            time.sleep(0.1)
        else:
            kill(left)


def tasks_done(output: Path) -> int:
    try:
        return sum(path.suffix == ".json" for path in (output / ".build/results").iterdir())
    except FileNotFoundError:  # not started, or finished and just removed
        return 0


@pytest.mark.parametrize("launcher", ["workers", pytest.param("mpi", marks=needs_mpi)])
def test_killed_at_random_moments(folder: Path, tmp_path: Path, launcher: str, request: pytest.FixtureRequest) -> None:
    """Kills alternate between the entire job and one process of it. Some are at the start, others after a few more
    finished tasks, so that they interrupt work on machines of any speed."""
    rng = random.Random(launcher)
    wanted, kills, builds = 20 if request.config.getoption("--whole-survival") else 3, 0, 0
    uninterrupted = tree(folder / "uninterrupted")
    output = tmp_path / "out0"
    while True:
        process = start(folder, output, launcher)
        more = tasks_done(output) + rng.randint(0, 5) if kills < wanted else 1 << 30
        while process.poll() is None and tasks_done(output) < more:
            time.sleep(0.005)
        if kills < wanted:
            time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            below = descendants(process.pid)
            everybody = [process.pid, *below]
            for victim in everybody if kills % 2 == 0 else [rng.choice(below or everybody)]:
                kill(victim)
            kills += 1
            end(process, below)
            for path in output.rglob("shard-*.arrow"):
                assert path.read_bytes() == uninterrupted[str(path.relative_to(output))]
            continue
        assert process.returncode == 0, process.communicate()[0]
        assert tree(output) == uninterrupted
        if kills >= wanted:
            break
        builds += 1
        output = tmp_path / f"out{builds}"
    print(f"{launcher}: {kills} kills, {builds + 1} builds")


# Loaded by every Python process of the job: the first to rename a matching file is killed before the rename.
DIES_RENAMING = """
import os, pathlib
rename = pathlib.Path.rename
def deadly(path, target):
    if os.environ["DIES_AT"] in str(target):
        try:
            os.close(os.open(os.environ["DIES_ONCE"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), 9)
    return rename(path, target)
pathlib.Path.rename = deadly
"""


@needs_mpi
@pytest.mark.parametrize("dies_at", ["tokens-00003.train.ends", "shard-00001.arrow"])
def test_rank_killed_before_rename(folder: Path, tmp_path: Path, dies_at: str) -> None:
    """The error names its task, no incomplete file has its final name, and the next start repeats the task."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(DIES_RENAMING)
    environment = {"PYTHONPATH": f"{tmp_path}/site", "DIES_AT": dies_at, "DIES_ONCE": str(tmp_path / "died")}
    process = start(folder, tmp_path / "out", "mpi", **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert (tmp_path / "died").exists()
    assert "rank " in output
    assert "the worker died, killed by SIGKILL" in output
    assert not list((tmp_path / "out").rglob(dies_at))
    process = start(folder, tmp_path / "out", "mpi", **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert tree(tmp_path / "out") == tree(folder / "uninterrupted")
