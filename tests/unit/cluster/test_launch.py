"""`launch` without hosts: values passed through shells, heartbeats of ranks, commands of launchers."""

import argparse
import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.__main__ import main
from cluster.hosts import node, plan, rank, remote, supervisor
from cluster.hosts.checks import LaunchError, host_errors, job_errors
from cluster.hosts.plan import Draft, check_exportable, exported_variables
from cluster.hosts.supervisor import Plan, Ranks, runner_command
from maskvr_ds.config import load_config

HOSTILE = [
    "a b",
    '"',
    "'",
    "$(touch pwned)",
    "`touch pwned`",
    "a\nb",
    "; touch pwned",
    "\\",
    "%h",
    "*",
    "ä",
    "--x",
    "~",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))


def make_plan(folder: Path, hosts: dict[str, int] | None = None, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "hosts": hosts or {"h1": 2, "h2": 1},
        "hostfile": folder / "hosts",
        "launcher": "pdsh",
        "launcher_args": "",
        "folder": folder,
        "run": folder,
        "mark": "key-job",
        "master_addr": "10.0.0.1",
        "master_port": 12345,
        "environment": {},
        "timeout": 10.0,
        "grace": 5.0,
        "start_timeout": 60.0,
    }
    return Plan(**{**values, **changes})


def deepspeed_command(plan: Plan, launcher: str, variables: dict[str, str]) -> list[str]:
    """The command that DeepSpeed's own code builds from the runner's command line."""
    from deepspeed.launcher import multinode_runner, runner

    plan.hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in plan.hosts.items()))
    arguments = runner.parse_args(runner_command(plan)[3:])
    pool = runner.fetch_hostfile(arguments.hostfile)
    active = runner.parse_inclusion_exclusion(pool, "", "")
    world = runner.encode_world_info(active)
    kinds = {"openmpi": multinode_runner.OpenMPIRunner, "mpich": multinode_runner.MPICHRunner}
    if launcher == "pdsh":
        made: Any = multinode_runner.PDSHRunner(arguments, world)
    else:
        made = kinds.get(launcher, multinode_runner.SlurmRunner)(arguments, world, pool)
    for name, value in variables.items():
        made.add_export(name, value)
    command = made.get_cmd(dict(os.environ), active)
    return command[0] if launcher == "pdsh" else command


@given(path=texts, value=texts)
@example(path="a b'$(touch pwned)\n\"", value="`touch pwned`")
def test_paths_and_values_pass_the_shells_of_pdsh_unchanged(
    tmp_path_factory: pytest.TempPathFactory, path: str, value: str
) -> None:
    """Runs the command line that ssh would pass to a remote shell in a local one."""
    try:
        check_exportable({"NCCL_DEBUG": value})
        variables = {"NCCL_DEBUG": value}
    except LaunchError:
        variables = {}
    folder = tmp_path_factory.mktemp("x")
    hostile = Path("/shared") / path
    plan = make_plan(hostile, hostfile=folder / "hosts")
    command = deepspeed_command(plan, "pdsh", variables)
    words = command[command.index("-w") + 2 :]
    at = words.index(sys.executable)
    shown = [*words[:at], sys.executable, "-c", "'import json,os,sys; print(json.dumps([dict(os.environ),sys.argv]))'"]
    line = " ".join([*shown, *words[at + 1 :]])
    answer = subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=True)
    environment, argv = json.loads(answer.stdout)
    assert base64.urlsafe_b64decode(argv[-1]) == os.fsencode(hostile)
    assert argv[-2] == "cluster.hosts.rank"
    if variables:
        assert environment["NCCL_DEBUG"] == value
    assert not list(Path(folder).glob("pwned"))
    assert not Path("/pwned").exists()


@given(name=texts, value=texts)
def test_requests_pass_ssh_unchanged(name: str, value: str) -> None:
    request = {"action": "report", name: value}
    line = remote.command("h1", request, "ssh")[-1]
    words = subprocess.run(
        ["sh", "-c", f"for word in {line}; do echo $word; done"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert json.loads(base64.urlsafe_b64decode(words[-1])) == request


@given(texts)
def test_values_special_to_shells_are_rejected(value: str) -> None:
    plain = all(character.isascii() and (character.isalnum() or character in "_@+=:,./~-") for character in value)
    if plain:
        check_exportable({"NCCL_DEBUG": value})
    else:
        with pytest.raises(LaunchError, match="NCCL_DEBUG"):
            check_exportable({"NCCL_DEBUG": value})


def test_commas_are_rejected_for_srun() -> None:
    check_exportable({"NCCL_SOCKET_IFNAME": "eth0,eth1"}, "mpich")
    with pytest.raises(LaunchError, match="comma"):
        check_exportable({"NCCL_SOCKET_IFNAME": "eth0,eth1"}, "slurm")


def test_only_listed_variables_are_exported() -> None:
    here = {"NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "x", "WANDB_API_KEY": "x", "HF_TOKEN": "x", "HOME": "/root"}
    here |= {"PATH": "/usr/bin", "OMP_NUM_THREADS": "4", "SSH_AUTH_SOCK": "/x", "CUDA_VISIBLE_DEVICES": "0"}
    assert set(exported_variables(here, [])) - {"PYTHONPATH"} == {"NCCL_DEBUG", "PATH", "OMP_NUM_THREADS"}
    more = exported_variables(here, ["HOME", "FI_PROVIDER=efa"])
    assert (more["HOME"], more["FI_PROVIDER"]) == ("/root", "efa")
    for export in ("NOT_SET_HERE", "a b=c", "=x", "$(x)=y"):
        with pytest.raises(LaunchError, match="--export"):
            exported_variables(here, [export])


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "slurm"])
def test_commands_of_other_launchers(tmp_path: Path, launcher: str) -> None:
    """Built by DeepSpeed from our options: one rank per slot, on these hosts, each running cluster.hosts.rank."""
    plan = make_plan(tmp_path, {"h1": 2, "h2": 2}, launcher=launcher)
    command = deepspeed_command(plan, launcher, {"NCCL_DEBUG": "INFO"})
    assert command[command.index("-n") + 1] == "4"
    assert os.fsencode(tmp_path) == base64.urlsafe_b64decode(command[-1])
    assert command[0] == ("srun" if launcher == "slurm" else "mpirun")
    # DeepSpeed drops --module for srun, and passes it to a helper script of its own for mpich.
    assert command[-2] == ("cluster.hosts.rank" if launcher == "openmpi" else str(Path(rank.__file__).resolve()))
    assert ("-m" in command) == (launcher == "openmpi")
    if launcher == "slurm":
        assert {"--nodes=2", "--nodelist=h1,h2", "--ntasks-per-node=2"} <= set(command)
        assert "--export=ALL,NCCL_DEBUG=INFO" in command
    if launcher == "openmpi":
        assert command[command.index("-hostfile") + 1] == str(plan.hostfile)
        assert command[command.index("NCCL_DEBUG=INFO") - 1] == "-x"
    if launcher == "mpich":
        assert command[command.index("-hosts") + 1] == "h1,h2"
        assert command[command.index("-ppn") + 1] == "2"


def test_silent_and_stopped_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, {"h1": 2, "h2": 1}, timeout=40.0)
    assert [plan.host_of(number) for number in range(3)] == ["h1", "h1", "h2"]
    assert plan.ranks_of("h1") == [0, 1]
    now = [100.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    ranks = Ranks(plan)

    def beat(number: int, beat: int, **more: Any) -> None:
        record = {"beat": beat, "state": "R", **more}
        (tmp_path / f"rank-{number:05d}.json").write_text(json.dumps(record).ljust(256))

    for number in range(3):
        beat(number, 1)
    ranks.poll()
    now[0] += 11
    beat(0, 2)
    beat(1, 2, status=0)
    (tmp_path / "rank-00002.json").write_text('{"beat": 2, "sta')
    ranks.poll()
    assert ranks.silent(10) == [2]
    assert ranks.ended == {1: 0}
    beat(2, 3, state="T")
    now[0] += 1
    ranks.poll()
    assert (ranks.silent(10), ranks.stopped(10)) == ([], [])
    now[0] += 11
    beat(0, 3)
    beat(2, 4, state="T")
    ranks.poll()
    assert (ranks.silent(10), ranks.stopped(10)) == ([], [2])
    # This process was suspended, not the ranks.
    now[0] += 21
    ranks.poll()
    assert (ranks.silent(10), ranks.stopped(10)) == ([], [])
    now[0] += 11
    ranks.poll()
    assert (ranks.silent(10), ranks.stopped(10)) == ([0, 2], [2])
    beat(2, 5, state="R")
    now[0] += 1
    ranks.poll()
    assert (ranks.silent(10), ranks.stopped(10)) == ([0], [])


def test_only_marked_processes_are_killed() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours, other = (
        subprocess.Popen(sleep, env={**os.environ, node.MARK: f"{key}-{os.getpid()}"}) for key in ("ours", "others")
    )
    try:
        while len(node.marked("ours-")) + len(node.marked("others-")) < 2:
            assert ours.poll() is None
        jobs = {job["mark"]: job for job in node.deepspeed_jobs()}
        assert jobs[f"ours-{os.getpid()}"] == {"pid": ours.pid, "user": os.getuid(), "mark": f"ours-{os.getpid()}"}
        found = node.kill(f"ours-{os.getpid()}")
        # A zombie without an environment until it is waited for.
        assert [process["pid"] for process in found["found"]] == [ours.pid]
        assert found["alive"] == []
        assert ours.wait(30) == -9
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def value(**changes: Any) -> dict[str, Any]:
    packages = {"torch": "2", "deepspeed": "1", "transformers": "5", "maskvr_ds": "0", "nccl": None}
    common = {"python": "3", "packages": packages, "gpus": None, "cpus": 8, "jobs": [], "manifests": {"/c": "a" * 64}}
    return {**common, "port": 5, "folder": None, **changes}


def test_host_errors_name_host_and_remedy() -> None:
    hosts = dict.fromkeys(("a", "b", "c", "d"), 8)
    eight = {"names": ["H100"] * 8, "driver": "1"}
    good = {host: remote.Answer(value(gpus=eight)) for host in hosts}

    def errors(**changed: Any) -> list[str]:
        found = host_errors(hosts, {**good, **changed}, folder=Path("/r"), port=0, on_cpus=False)
        return [line for lines in found.values() for line in lines]

    assert errors() == []
    few = {"names": ["H100"] * 7, "driver": "1"}
    assert errors(b=remote.Answer(value(gpus=few))) == ["b: slots=8, but it has 7 GPUs; correct the hostfile"]
    assert errors(b=remote.Answer(error="is away")) == ["b: is away"]
    packages = {**value()["packages"], "torch": "1"}
    (line,) = errors(c=remote.Answer(value(gpus=eight, packages=packages)))
    assert line == "c: torch is 1, on a it is 2; install the same version on all hosts"
    (line,) = errors(d=remote.Answer(value(gpus=eight, manifests={"/c": "b" * 64})))
    assert line.startswith("d: /c/manifest.json is sha256 bbbbbbbbbbbb, on a it is sha256 aaaaaaaaaaaa; ")
    (line,) = errors(d=remote.Answer(value(gpus=eight, manifests={"/c": None})))
    assert line.startswith("d: /c: no corpus there")
    assert len(errors(a=remote.Answer(value(gpus=eight, port=None)))) == 1
    jobs = [{"pid": 5, "user": 7, "mark": None}, {"pid": 6, "user": 0, "mark": "key-x"}]
    assert job_errors({"a": remote.Answer(value(jobs=jobs))}, "key") == [
        "a: another DeepSpeed job is running (pid 5, user 7)",
        "a: ranks of an earlier launch of this run are still running (pid 6)",
    ]


def test_discard_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.checks, "launcher_error", lambda *_: None)
    monkeypatch.setattr(plan, "exported_variables", lambda *_: {})
    parser = argparse.ArgumentParser()
    plan.add_launch_options(parser, force="")
    arguments = parser.parse_args([])
    run = tmp_path / "a b" / "$(x)"
    config = load_config("demo_cpu", [f"output_dir={json.dumps(str(run))}"])
    first = Draft(arguments, {"h1": 1}, config)
    second = Draft(arguments, {"h1": 1}, config)
    first.discard()
    assert second.folder.is_dir()
    second.discard()
    # The folders that the first one created were not empty then.
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", ["launch", "preflight"])
def test_missing_hostfile(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--hostfile", str(tmp_path / "none"), "--config", "demo_cpu"]) == 1
    assert "no such file" in capsys.readouterr().err


def test_start_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that run but do not train are aborted after the start timeout; training ranks write heartbeats."""
    run, folder = tmp_path / "run", tmp_path / "run" / "logs" / "job"
    folder.mkdir(parents=True)
    old = run / "heartbeats" / "earlier"
    old.mkdir(parents=True)
    for number in range(2):
        (old / f"rank-{number:05d}").touch()
        (folder / f"rank-{number:05d}.json").write_text(json.dumps({"beat": 1, "state": "S"}))
    plan = make_plan(folder, {"h1": 1, "h2": 1}, run=run, timeout=1000.0, start_timeout=0.0)
    monkeypatch.setattr(supervisor, "runner_command", lambda plan: ["sleep", "600"])
    monkeypatch.setattr(remote, "ask", lambda *args, **more: {})
    job = supervisor.Job(plan)
    try:
        assert job.poll() == "not started within 0 s: rank 0 on h1, rank 1 on h2"
        new = run / "heartbeats" / "now"
        new.mkdir()
        record = json.dumps({"marks": 1, "step": 0, "place": "data"})
        (new / "rank-00000").write_text(record)
        (new / "rank-00001").touch()
        assert job.poll() == "not started within 0 s: rank 0 on h1 (last step 0, data), rank 1 on h2"
        (new / "rank-00001").write_text(record)
        assert job.poll() is None
    finally:
        job.kill()
    assert job.process.returncode == -9, "no signal that DeepSpeed's runner could hear"
    assert (folder / rank.ABORT).exists()


def test_hosts_are_pinged_if_training_does_not_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    asked: list[Any] = []

    def ask(hosts: Any, request: Any, **more: Any) -> dict[str, remote.Answer]:
        asked.append(request)
        return {"h1": remote.Answer(), "h2": remote.Answer(error="is away")}

    monkeypatch.setattr(remote, "ask", ask)
    progress = supervisor.Progress(make_plan(tmp_path, {"h1": 1, "h2": 1}, timeout=10.0))
    folder = tmp_path / "heartbeats" / "job"
    folder.mkdir(parents=True)

    def after(seconds: int, marks: int) -> list[str]:
        """Hosts found unreachable, with a poll every two seconds."""
        (folder / "rank-00000").write_text(json.dumps({"marks": marks, "step": 1, "place": "pause"}))
        lost: list[str] = []
        for _ in range(seconds // 2):
            now[0] += 2
            lost += progress.unreachable_hosts()
            if progress._ping is not None:
                progress._ping.result()
        return lost

    assert after(10, 1) == []
    assert after(10, 2) == []
    assert asked == [], "training progresses"
    assert after(14, 2) == ["h2"]
    assert asked == [{"action": "ping"}]
    assert after(10, 3) == []
    now[0] += 100  # this process was suspended
    assert after(10, 3) == []
    assert len(asked) == 1
    progress.close()
