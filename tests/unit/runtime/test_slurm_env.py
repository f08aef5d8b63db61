"""Slurm's environment of a task, mapped to RANK, WORLD_SIZE and the other launcher variables."""

import re
import time
from pathlib import Path

import pytest

from maskvr_ds.runtime import slurm_env

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "n[1-3]",
}
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "12345"}
BATCH = {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_NTASKS": "20"}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' names resolve."""
    monkeypatch.setattr(slurm_env, "_resolves", lambda host: True)


@pytest.mark.usefixtures("names")
def test_a_task_is_a_rank() -> None:
    ranks = {"RANK": "9", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert slurm_env.ranks(STEP | MASTER) == ranks
    assert slurm_env.ranks(STEP | MASTER | {"SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "4"
    assert slurm_env.ranks(STEP | MASTER | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0", (
        "the task sees only this GPU"
    )
    for several in ("2,3", "GPU-1a,GPU-2b", "NoDevFiles"):
        assert slurm_env.ranks(STEP | MASTER | {"CUDA_VISIBLE_DEVICES": several})["LOCAL_RANK"] == "1"
    for one in ("GPU-8932f937-d72c", "MIG-GPU-8932f937-d72c/1/0"):
        assert slurm_env.ranks(STEP | MASTER | {"CUDA_VISIBLE_DEVICES": one})["LOCAL_RANK"] == "0"


def test_job_ids_of_array_tasks_are_distinct() -> None:
    assert slurm_env.job_id({}) == ""
    assert slurm_env.job_id({"SLURM_JOB_ID": "7"}) == "7"
    tasks = [{"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": number} for number in "01"]
    assert [slurm_env.job_id(task) for task in tasks] == ["7_0", "7_1"]


@pytest.mark.usefixtures("names")
def test_the_first_node_is_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_env, "_first_host", lambda nodes: f"first of {nodes}")
    mapped = slurm_env.ranks(STEP)
    assert mapped["MASTER_ADDR"] == "first of n[1-3]"
    ports = {
        slurm_env.ranks(STEP | changes)["MASTER_PORT"]
        for changes in ({}, {"SLURM_JOB_ID": "42"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"})
    }
    assert len(ports) == 4
    assert all(1024 < int(port) < 32768 for port in ports)


@pytest.mark.parametrize("given", [True, False])
def test_a_name_that_does_not_resolve_is_replaced_by_the_nodes_address(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MASTER_ADDR may also be set to such a name, by a job script."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        "#!/bin/sh\nPATH=/usr/bin:/bin\n"
        f"""echo "$*" >>{tmp_path}/asked; case "$*" in *hostnames*) echo absent.invalid; echo n2;;
        *) echo "NodeName=absent.invalid Arch=x86_64 NodeAddr=${{ADDRESS:-127.0.0.2}} NodeHostName=absent"; esac\n"""
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    step = STEP | ({"MASTER_ADDR": "absent.invalid"} if given else {})
    assert slurm_env.ranks(step)["MASTER_ADDR"] == "127.0.0.2"
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "--oneliner show node absent.invalid"
    for address in ("absent.invalid", "other.invalid"):
        monkeypatch.setenv("ADDRESS", address)
        with pytest.raises(ValueError, match=f"absent.invalid does not resolve here .its NodeAddr is {address}"):
            slurm_env.ranks(step)
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ValueError, match=r"absent.invalid.*set MASTER_ADDR" if given else "MASTER_ADDR is not set"):
        slurm_env.ranks(step)


def test_a_master_that_does_not_resolve_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has started the ranks."""
    pytest.importorskip("torch")
    from maskvr_ds.runtime import distributed

    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "12345"}
    for name, value in (environment | {"MASTER_ADDR": "absent.invalid"}).items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"MASTER_ADDR absent.invalid does not resolve here .*host of rank 0"):
        distributed.initialize()
    assert time.monotonic() - started < 30


def test_without_scontrol_the_error_names_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set.*set it to the first line"):
        slurm_env.ranks(STEP)


@pytest.mark.parametrize("environment", [{}, BATCH, MASTER, BATCH | {"RANK": "0"}])
def test_outside_a_step_nothing_is_mapped(environment: dict[str, str]) -> None:
    assert slurm_env.ranks(environment) == {}


def test_tasks_must_not_form_separate_worlds() -> None:
    for launcher in ({"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "3", "WORLD_SIZE": "8"}):
        with pytest.raises(ValueError, match=re.escape("srun has started 20 tasks")):
            slurm_env.ranks(STEP | launcher)
    with pytest.raises(ValueError, match="for 160 ranks"):
        slurm_env.ranks(STEP | {"RANK": "3", "WORLD_SIZE": "20", "LOCAL_SIZE": "8"})
    assert slurm_env.ranks(STEP | {"RANK": "3", "WORLD_SIZE": "160", "LOCAL_SIZE": "8"}) == {}
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST"):
        slurm_env.ranks({name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"})


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("8(x2),4", [8, 8, 4]), ("1,2(x3)", [1, 2, 2, 2])])
def test_tasks_of_each_node(text: str, counts: list[int]) -> None:
    assert slurm_env.task_counts(text) == counts


@pytest.mark.parametrize("text", ["", "8(x2", "x2", "8;4"])
def test_malformed_task_counts(text: str) -> None:
    with pytest.raises(ValueError, match="does not say how many tasks"):
        slurm_env.task_counts(text)
