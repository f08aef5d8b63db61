"""Preflight: sums, links, slots and the table."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.__main__ import main
from cluster.hosts.checks import slots_error
from cluster.hosts.findings import Finding, as_far_as_answered
from cluster.hosts.preflight import link_errors, summary, table
from cluster.hosts.remote import Answer
from maskvr_ds.runtime import distributed, interconnect


@given(st.integers(2, 40))
def test_rounds_measure_every_pair_once_and_no_rank_twice_at_a_time(n: int) -> None:
    players = range(3, 3 + 2 * n, 2)
    pairs = []
    for pairs_of_round in interconnect.rounds(players):
        busy = list(itertools.chain(*pairs_of_round))
        assert len(busy) == len(set(busy))
        assert len(pairs_of_round) == n // 2, "as many as can be measured at a time"
        pairs += pairs_of_round
    assert sorted(tuple(sorted(pair)) for pair in pairs) == sorted(itertools.combinations(players, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_one_wrong_element_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    assert interconnect.wrong_sums() == []

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == dtype and len(tensor) == 1_003:
            tensor[500] += 1
        return tensor

    monkeypatch.setattr(distributed, "all_reduce_sum", reduce)
    name = str(dtype).removeprefix("torch.")
    assert interconnect.wrong_sums() == [f"all-reduce of 1003 {name}: 1 sums are wrong"]


def measured(speeds: dict[tuple[int, int], float], **changes: Any) -> dict[str, Any]:
    links = [{"ranks": list(pair), "bytes_per_second": speed} for pair, speed in speeds.items()]
    common = {"world_size": 3, "bytes": 2**20, "backend": "gloo", "faults": [], "nccl": [None] * 3}
    common |= {"hosts": ["a", "b", "c"], "all_reduce_seconds": 1e-3, "bus_bytes_per_second": 1e9}
    return {**common, "links": links, **changes}


def test_a_slow_link_is_named() -> None:
    even = measured({(0, 1): 10e9, (0, 2): 9e9, (1, 2): 11e9})
    assert link_errors(even, 0.5) == []
    assert "slowest of 3 links: a (rank 0) – c (rank 2), 9 GB/s in each direction" in summary(even)
    slow = measured({(0, 1): 10e9, (0, 2): 4.9e9, (1, 2): 11e9})
    (error,) = link_errors(slow, 0.5)
    assert error.startswith("link a (rank 0) – c (rank 2): 4.9 GB/s, the median is 10 GB/s; ")
    assert link_errors(slow, 0.4) == []


def test_wrong_sums_and_different_libraries_are_errors() -> None:
    links = measured({(0, 1): 1e9}, faults=["rank 1 on b: all-reduce of 1 int64: 1 sums are wrong"])
    (error,) = link_errors(links, 0.5)
    assert error.startswith("rank 1 on b: all-reduce of 1 int64: 1 sums are wrong; do not train")
    assert "wrong sums" in summary(links)
    (error,) = link_errors(measured({(0, 1): 1e9}, nccl=["2.27.3", "2.27.3", "2.26.2"]), 0.5)
    assert error == "ranks load different NCCL versions: 2.27.3, 2.27.3, 2.26.2; install the same version on all hosts"


def test_slots_without_visible_gpus() -> None:
    seen = {"gpus": None, "cpus": 4}
    error = slots_error("n1", 2, seen, on_cpus=False)
    assert error is not None
    assert error.startswith("n1: slots=2, but no GPU is visible (nvidia-smi is missing or fails there); ")
    assert "DS_ACCELERATOR=cpu" in error
    assert slots_error("n1", 4, seen, on_cpus=True) is None
    assert slots_error("n1", 5, seen, on_cpus=True) == "n1: slots=5, but it has 4 CPU cores; correct the hostfile"
    assert slots_error("n1", 1, {"gpus": {"names": ["H100"]}, "cpus": 4}, on_cpus=False) is None


def test_slots_with_a_hostfile_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    words = ["preflight", "--hostfile", str(tmp_path / "hosts"), "--slots", "4", "--config", "demo_cpu"]
    assert main(words) == 1
    assert f"--slots 4: {tmp_path}/hosts sets the slots of each host" in capsys.readouterr().err


def test_table_has_one_line_per_host() -> None:
    packages = {"torch": "2.13", "deepspeed": "0.19", "transformers": "5", "maskvr_ds": "0", "nccl": "2.27"}
    node = {"hostname": "n1", "packages": packages, "python": "3.11", "cpus": 96, "free_bytes": 7 * 2**40, "jobs": []}
    gpus = {"names": ["H100"] * 8, "driver": "570.1"}
    node |= {"gpus": gpus, "folder": None, "manifests": {"/c": "ab" * 32, "/d": None}, "port": 1}
    answers = {"a": Answer(node, clock=(0.04, 0.3)), "longer-name": Answer(error="not reachable by ssh: no route")}
    head, first, second = table({"a": 8, "longer-name": 4}, answers).splitlines()
    assert head.split("  ")[0] == "host"
    assert " ".join(first.split()) == "a n1 8 8 H100 570.1 96 3.11 2.13 0.19 2.27 7168 writable +0.0 abababab missing"
    assert second.split() == ["longer-name", "no", "answer", "4"]


def test_another_launcher_within_a_job_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--slurm", "--launcher", "mpich", "--config", "demo_cpu"]) == 1
    assert "--launcher mpich: --slurm measures with srun" in capsys.readouterr().err


def test_checks_that_no_host_answered_are_not_passed() -> None:
    free = Finding("output_dir", "/run: writable from all hosts")
    failed = Finding("hosts", "", ["a: not reachable"])
    assert as_far_as_answered(free, 0, 2) == Finding("output_dir", "not checked: no host has answered", skipped=True)
    assert as_far_as_answered(failed, 0, 2) is failed
    assert as_far_as_answered(free, 1, 2).summary == "/run: writable from the hosts that answer"
    assert as_far_as_answered(free, 2, 2) is free
