"""Preflight on two real ssh hosts: a good cluster, and each kind of fault."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import ssh_hosts
from tests.cluster.ssh_hosts import SshHosts
from tests.distributed.training import configuration, environment
from tests.support.corpora import make_corpus


class Scene:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = SshHosts(folder / "hosts", 2)
        self.corpus = make_corpus(folder / "corpus", rows=50, words=20)
        values = configuration(
            folder / "run", self.corpus, steps=10, batch={"global_size": 16}, evaluation={"every_steps": 0}
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        (folder / "hosts.txt").write_text("h1 slots=2\nh2 slots=1\n")

    def preflight(self, *options: Any, hostfile: str = "hosts.txt") -> tuple[int, str, str]:
        words = [sys.executable, "-m", "cluster", "preflight", "--hostfile", self.folder / hostfile]
        words += ["--config", self.folder / "run.yaml", "--minimum-free", "0.01", *options]
        answer = self.hosts.run(words, timeout=300, env=environment())
        assert "Traceback" not in answer.stderr
        assert not (self.folder / "run").exists(), "preflight leaves nothing"
        return answer.returncode, answer.stdout, answer.stderr


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    ssh_hosts.require()
    scene = Scene(tmp_path_factory.mktemp("preflight"))
    yield scene
    scene.hosts.close()


def test_a_good_cluster(scene: Scene) -> None:
    """h1 has two ranks, h2 has one: links are measured between hosts, so there is one."""
    # 16 sequences do not divide among 3 ranks.
    status, out, err = scene.preflight("--json", "--set", "batch.global_size=12", "--bytes", 2**20)
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["faults"] == []
    states = {row["check"]: row["state"] for row in said["checks"]}
    assert states.keys() >= {"configuration", "files", "corpora", "checkpoints", "memory", "interconnect"}
    assert {check for check, state in states.items() if state != "ok"} == {"compiler", "Triton"}
    assert {host: row["hostname"] for host, row in said["hosts"].items()} == {"h1": "h1", "h2": "h2"}
    for row in said["hosts"].values():
        assert row["gpus"] is None or row["gpus"]["names"]
        assert row["packages"]["torch"]
        assert row["packages"]["deepspeed"]
        assert row["free_bytes"] > 0
        # Both hosts share one clock: the measurement has only its own uncertainty.
        assert abs(row["clock"]["offset_seconds"]) <= row["clock"]["uncertainty_seconds"] + 0.1
    first, second = (list(row["manifests"].values()) for row in said["hosts"].values())
    assert first == second != [None]
    links = said["interconnect"]
    assert (links["world_size"], links["hosts"]) == (3, ["h1", "h1", "h2"])
    assert [link["ranks"] for link in links["links"]] == [[0, 2]]
    assert links["links"][0]["bytes_per_second"] > 0
    assert links["bus_bytes_per_second"] == pytest.approx(2 * 2 / 3 * 2**20 / links["all_reduce_seconds"])


def test_faults_are_listed_and_no_rank_is_started(scene: Scene) -> None:
    other = make_corpus(scene.folder / "other", rows=50, words=20, seed=1)
    scene.hosts.on(2, "mount", "--bind", other, scene.corpus)
    try:
        status, out, err = scene.preflight("--minimum-free", 10**9)
    finally:
        scene.hosts.on(2, "umount", scene.corpus)
    assert status == 1
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert sum("GiB free on the disk of" in line for line in lines) == 2
    assert sum("manifest.json is sha256" in line and "h2: " in line for line in lines) == 1
    assert sum("batch.global_size 16 is not a multiple of" in line for line in lines) == 1
    assert len(lines) == 4
    table = out.splitlines()
    assert table[0].split()[:3] == ["host", "name", "ranks"]
    assert [row.split()[0] for row in table[1:3]] == ["h1", "h2"]
    states = {row[9:].split("  ")[0].strip(): row.split()[0] for row in table[4:]}
    assert {name for name, state in states.items() if state == "failed"} == {"configuration", "corpora", "disk"}
    assert states["interconnect"] == "skipped"


def test_a_folder_that_is_not_shared_a_taken_port_and_an_absent_host(scene: Scene) -> None:
    (scene.folder / "absent.txt").write_text("h1 slots=2\nh2 slots=1\nabsent slots=1\n")
    logs = scene.folder / "logs"
    logs.mkdir()
    scene.hosts.on(2, "mount", "-t", "tmpfs", "tmpfs", logs)
    # Port 22 is taken by sshd.
    options = ["--log-dir", logs, "--master-port", 22, "--set", "batch.global_size=8"]
    try:
        status, out, err = scene.preflight(*options, hostfile="absent.txt")
    finally:
        scene.hosts.on(2, "umount", logs)
    assert status == 1
    assert "error: absent: not reachable by ssh: " in err
    assert "error: h1: port 22 is in use there" in err
    assert "error: h2: " in err
    assert "not on a file system that all nodes share" in err
    assert len(err.splitlines()) == 3
    assert [line.split()[1] for line in out.splitlines() if line.startswith("absent")] == ["no"]
    assert list(logs.iterdir()) == []


def test_hostfile_check_slots(scene: Scene) -> None:
    def check(*words: Any) -> tuple[int, str]:
        answer = scene.hosts.run([sys.executable, "-m", "cluster", "hostfile", *words, "--check-slots", "--cpus"])
        return answer.returncode, answer.stderr

    assert check("--hosts", "h[1-2]", "--slots", 1) == (0, "")
    status, err = check("--hosts", "h1:1", "h2:1024", "absent:1")
    assert status == 1
    assert "h2: slots=1024, but it has" in err
    assert "absent: not reachable by ssh" in err
    assert "h1:" not in err
