"""Builds on several MPI ranks: same bytes as with one process. Skipped without MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline import __main__ as cli
from data_pipeline.build import build
from data_pipeline.execution.mpi import join_team
from data_pipeline.files import CorpusError
from data_pipeline.tokenization.tokenizer import copy_tokenizer
from tests.support.documents import ROOT, command, make_documents, tree, write_text, write_tokenizer

_LAUNCHER = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_mpi = pytest.mark.skipif(_LAUNCHER is None or find_spec("mpi4py") is None, reason="no mpiexec or no mpi4py here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mpi")
    for i in range(4):
        write_text(folder / f"in/part{i}.txt", make_documents(60, seed=i))
    copy_tokenizer(write_tokenizer(folder / "vocab"), folder / "tok")
    sizes: dict[str, Any] = {"work_size": 0.01, "shard_size": 0.01, "held_out": 0.2, "progress": False}
    build([folder / "in"], folder / "tok", 16, folder / "uninterrupted", **sizes)
    return folder


def mpi_command(folder: Path, output: Path, ranks: int, workers: int) -> list[str]:
    sizes = ["--work-size", "0.01", "--shard-size", "0.01", "--held-out", "0.2", "--workers", workers]
    options = ["--tokenizer", folder / "tok", "--sequence-length", 16, "--output", output]
    return [str(_LAUNCHER), "-n", str(ranks), *command("build", "--input", folder / "in", *options, *sizes)]


@needs_mpi
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_same_bytes_for_any_number_of_ranks(folder: Path, tmp_path: Path, ranks: int, workers: int) -> None:
    run = [*mpi_command(folder, tmp_path / "out", ranks, workers), "--progress"]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    # Only rank 0 prints, with one bar for both stages: bytes, remaining time, tokens per second.
    assert len(found.stdout.splitlines()) == 1
    assert found.stderr.count("tokenise:   0%") == 1
    bar = r"pack: 100%\|█+\| [\d.]+k/[\d.]+k \[\d\d:\d\d<00:00, .*B/s, [\d,]+ tokens/s\]"
    assert re.search(bar, found.stderr), found.stderr
    assert tree(tmp_path / "out") == tree(folder / "uninterrupted")


@needs_mpi
def test_error_is_reported_once_and_ends_all_ranks(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "in", tmp_path / "in")
    (tmp_path / "in/part2.txt").write_bytes(b"good\n\nb\xe4d\n")
    run = mpi_command(folder, tmp_path / "out", 3, 1)
    run[run.index(str(folder / "in"))] = str(tmp_path / "in")
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode != 0
    assert [line for line in found.stderr.splitlines() if "not UTF-8" in line][1:] == []
    assert "part2.txt: not UTF-8 at byte 7" in found.stderr


RANKS = """
import os, signal, sys, time
from pathlib import Path

from data_pipeline.execution.mpi import join_team
from data_pipeline.execution.tasks import Task
from data_pipeline.execution.workers import Pool, serve
from data_pipeline.files import CorpusError


def own_id(report):
    time.sleep(0.2)
    return os.getpid()


def fail(seconds, report):
    time.sleep(seconds)
    raise CorpusError(f"{seconds} " + "x" * 200_000)


def run(team, folder, how):
    with Pool(1, team) as pool:
        if how == "idle":
            found = pool.run([Task(f"a{i}", f"a{i}", own_id, ()) for i in range(4)], folder, print)
            (remote,) = set(found) - {process.pid for process in pool._processes.values()}
            os.kill(remote, signal.SIGKILL)
            time.sleep(0.2)
            pool.run([Task(f"b{i}", f"b{i}", own_id, ()) for i in range(4)], folder, lambda *_: None)
        # Rank 1 has the first task: it fails after rank 0 has.
        pool.run([Task(f"c{i}", f"c{i}", fail, (1.0 - i,)) for i in range(2)], folder, lambda *_: None)


if __name__ == "__main__":
    team = join_team()
    if team.rank and sys.argv[2] == "bug":
        team.receive = lambda: 1 / 0
    if team.rank:
        serve(team, Pool(1))
    else:
        try:
            run(team, Path(sys.argv[1]), sys.argv[2])
        except CorpusError as error:
            print(str(error)[:80])
            time.sleep(1.5)  # a clean-up
        finally:
            team.stop()
"""


@needs_mpi
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("idle", r"rank 1 \(.*\): b0: the worker died, killed by SIGKILL"),
        ("long", "0.0 xxx"),
        ("bug", "ZeroDivisionError"),
    ],
)
def test_a_rank_that_fails_ends_the_job(tmp_path: Path, how: str, message: str) -> None:
    """A worker of rank 1 is killed between two tasks; rank 1 has a long error when rank 0 has failed; rank 1 has a
    bug."""
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "out").mkdir()
    run = [str(_LAUNCHER), "-n", "2", sys.executable, str(tmp_path / "ranks.py"), str(tmp_path / "out"), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert re.search(message, found.stdout + found.stderr), found
    assert (found.returncode != 0) == (how == "bug")


def test_mpirun_without_mpi4py_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_SIZE", "1")
    assert join_team() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(CorpusError, match="started by mpirun or srun with 4 ranks, but mpi4py is not available"):
        join_team()
    assert cli.main(["build", "--input", "x", "--tokenizer", "t", "--sequence-length", "16", "--output", "o"]) == 1
    assert "mpi4py is not available" in capsys.readouterr().err


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3"}


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of a launcher that may be running the tests."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_"))]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("outside")
def test_tasks_of_srun_without_mpi_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    words = ["build", "--input", "x", "--tokenizer", "t", "--sequence-length", "16", "--output", str(tmp_path / "o")]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.startswith("error: started by srun with 3 tasks without MPI")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert join_team() is None
    # A batch script with three tasks.
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert join_team() is None


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(
    ("world", "launcher"), [(3, {"PMIX_RANK": "1"}), (3, {"PMI_SIZE": "3"}), (1, {"PMIX_RANK": "1"})]
)
def test_tasks_of_srun_with_mpi(world: int, launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Comm:
        def Get_rank(self) -> int:  # noqa: N802
            return 1 % world

        def Get_size(self) -> int:  # noqa: N802
            return world

    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=Comm())))
    for name, value in {**STEP, **launcher}.items():
        monkeypatch.setenv(name, value)
    if world == 3:
        team = join_team()
        assert team is not None
        assert (team.rank, team.size) == (1, 3)
    else:
        with pytest.raises(CorpusError, match="started with 3 ranks, but the MPI world size is 1"):
            join_team()
