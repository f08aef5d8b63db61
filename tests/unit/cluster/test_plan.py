"""`launch` and `preflight` given the same answers of hosts: both reject errors, only `launch` kills processes."""

from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.hosts import launch, plan, remote
from cluster.hosts.checks import GIB
from tests.support.corpora import make_corpus
from tests.unit.cluster.test_launch import value


class Hosts:
    """Two simulated hosts with configurable answers; records the requests in `asked`."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        gpus = {"names": ["H100"], "driver": "1"}
        self.values: dict[str, dict[str, Any]] = {
            host: value(manifests={}, addresses=["10.0.0.1"], gpus=gpus) for host in "ab"
        }
        self.clocks = {"a": (0.0, 0.1), "b": (0.0, 0.1)}
        # Key of a run of which an earlier launch is still running.
        self.busy = ""
        # Processes that cannot be killed.
        self.alive: list[dict[str, Any]] = []

    def answer(self, hosts: Any, request: dict[str, Any], **more: Any) -> dict[str, remote.Answer]:
        self.asked.append(request)
        if request["action"] == "kill":
            return {host: remote.Answer({"found": [], "alive": self.alive}) for host in hosts}
        jobs = [{"pid": 6, "user": 0, "mark": f"{self.busy}-earlier"}] if self.busy else []
        common = {"hostname": "x", "free_bytes": 20 * GIB, "jobs": jobs}
        return {host: remote.Answer({**common, **self.values[host]}, clock=self.clocks[host]) for host in hosts}

    @property
    def ended(self) -> list[str]:
        return [request["mark"] for request in self.asked if request["action"] == "kill"]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    hosts = Hosts()
    for fields in hosts.values.values():
        del fields["jobs"]
    monkeypatch.setattr(remote, "ask", hosts.answer)
    monkeypatch.setattr(plan.checks, "launcher_error", lambda *_: None)
    monkeypatch.setattr(plan, "exported_variables", lambda *_: {})
    monkeypatch.setattr(launch, "watch", lambda *_: 0)
    return hosts


def run(command: str, folder: Path, *more: str, slots: str = "1") -> int:
    """slots: of host b."""
    (folder / "hosts").write_text(f"a slots=1\nb slots={slots}\n")
    if not (folder / "corpus").exists():
        make_corpus(folder / "corpus", rows=50, words=20)
        make_corpus(folder / "corpus" / "held_out", rows=20, words=20)
    words = [command, "--hostfile", str(folder / "hosts"), "--config", "demo_cpu", "--set", f"output_dir={folder}/run"]
    words += ["--set", f"data.path={folder}/corpus"]
    return main([*words, *more, *(["--no-interconnect"] if command == "preflight" else [])])


@pytest.mark.parametrize("command", ["launch", "preflight"])
def test_only_launch_kills_earlier_ranks(
    command: str, hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For preflight, they may be those of the running job."""
    assert run(command, tmp_path) == 0
    hosts.busy = plan.run_key(tmp_path / "run")
    assert run(command, tmp_path) == 1
    assert hosts.ended == []
    error = "a: ranks of an earlier launch of this run are still running (pid 6)"
    assert error in capsys.readouterr().err
    assert run(command, tmp_path, "--force") == 0
    assert f"warning: {error}" in capsys.readouterr().err
    assert hosts.ended == ([f"{hosts.busy}-"] if command == "launch" else [])


def test_unkillable_processes_prevent_a_launch(
    hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts.busy, hosts.alive = plan.run_key(tmp_path / "run"), [{"pid": 6, "state": "D"}]
    assert run("launch", tmp_path, "--force") == 1
    assert "b: processes 6 of this run cannot be killed; they are blocked in a device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["launch", "preflight"])
def test_full_disk_is_an_error(command: str, hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.values["b"]["free_bytes"] = GIB
    assert run(command, tmp_path) == 1
    assert "b: 1 GiB free on the disk of" in capsys.readouterr().err
    assert run(command, tmp_path, "--minimum-free", "0.5") == 0


def test_inconsistencies_are_errors_of_preflight_and_warnings_of_launch(
    hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts.clocks["b"] = (-7.0, 0.1)
    for host, name in (("a", "H100"), ("b", "A100")):
        hosts.values[host]["gpus"] = {"names": [name], "driver": "1"}
    lines = {}
    for command, status, kind in (("launch", 0, "warning"), ("preflight", 1, "error")):
        assert run(command, tmp_path) == status
        printed = capsys.readouterr().err.splitlines()
        assert all(line.startswith(f"{kind}: ") for line in printed)
        lines[command] = [line.removeprefix(f"{kind}: ") for line in printed]
    assert lines["launch"] == lines["preflight"]
    assert [line.split(" ")[0] for line in lines["launch"]] == ["b:", "hosts"]
    assert run("launch", tmp_path, "--clock", "8") == 0
    assert "clock" not in capsys.readouterr().err
