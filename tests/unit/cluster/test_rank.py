"""Parent of a rank: reads the rank from any launcher's variables, records its end, kills it on request."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.hosts import rank


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ],
)
def test_ranks_by_launcher(names: tuple[str, str, str]) -> None:
    environment = dict(zip(names, ("3", "4", "1"), strict=True))
    assert rank.read_ranks({**environment, "HOME": "/"}) == (3, 4, 1)
    del environment[names[0]]
    with pytest.raises(ValueError, match="no launcher has set the rank"):
        rank.read_ranks(environment)


def run_rank(folder: Path, code: str, world: int = 1, **variables: str) -> "subprocess.Popen[str]":
    """Run cluster.hosts.rank with a training module that contains `code`."""
    (folder / "module.py").write_text(code)
    plan = {"module": "module", "arguments": ["a b", "$(x)"], "cwd": str(folder), "world_size": world, "beat": 0.1}
    (folder / rank.PLAN).write_text(json.dumps({**plan, "master_addr": "here", "master_port": 5}))
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1", **variables}
    payload = base64.urlsafe_b64encode(os.fsencode(folder)).decode()
    words = [sys.executable, str(Path(rank.__file__)), "--local_rank=0", payload]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rank-00000.json").read_text())


def test_return_code_and_output_are_recorded(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']); sys.exit(3)"
    assert run_rank(tmp_path, code).wait(60) == 3
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["state"]) == (3, "ended")
    assert (tmp_path / "rank-00000.log").read_text() == "['a b', '$(x)'] here 5\n"


def test_rank_is_killed_on_abort_and_with_its_parent(tmp_path: Path) -> None:
    forever = "import time; time.sleep(600)"
    process = run_rank(tmp_path, forever)
    while not (tmp_path / "rank-00000.json").exists() or not (tmp_path / "rank-00000.json").read_text():
        assert process.poll() is None
    (tmp_path / rank.ABORT).touch()
    assert process.wait(60) == 128 + 9
    assert record_of(tmp_path)["status"] == -9
    (tmp_path / rank.ABORT).unlink()
    (tmp_path / "rank-00000.json").unlink()
    process = run_rank(tmp_path, forever)
    while not (tmp_path / "rank-00000.json").exists() or not (tmp_path / "rank-00000.json").read_text():
        assert process.poll() is None
    child = psutil.Process(record_of(tmp_path)["pid"])
    process.kill()
    process.wait()
    assert child.is_running() is False or child.wait(30) is None


def test_world_of_another_size_does_not_train(tmp_path: Path) -> None:
    """As with an MPI without mpi4py, which starts two worlds of one rank."""
    process = run_rank(tmp_path, "open('trained', 'w')", world=2)
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert "started a world of 1 ranks, the hostfile has 2" in process.stderr.read()
    assert not (tmp_path / "trained").exists()
