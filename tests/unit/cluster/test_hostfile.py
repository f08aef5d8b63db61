"""Hostfiles: parsed as DeepSpeed does; errors that DeepSpeed would not report are rejected."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.__main__ import main
from cluster.hosts.hostfile import expand, hostfile_text, hosts_from_words, slurm_hosts
from maskvr_ds.runtime.hostfile import HostfileError, is_host, read_hostfile

GOOD = "# two nodes\nnode-1 slots=8\n\nuser@10.0.0.2 slots=4  # the small one\n"


def test_parses_hostfiles_like_deepspeed(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(GOOD)
    assert read_hostfile(path) == {"node-1": 8, "user@10.0.0.2": 4}
    assert list(read_hostfile(path).items()) == list(fetch_hostfile(str(path)).items())


@pytest.mark.parametrize("character", ["\v", "\f", "\x1c", "\x85", "\u2028"])
def test_only_line_feeds_end_lines_as_in_deepspeed(tmp_path: Path, character: str) -> None:
    """Python's str.splitlines knows more ends of lines; text after them in a comment is no host."""
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(f"a slots=4  # old:{character}b slots=3\nc slots=1\n", encoding="utf-8")
    assert read_hostfile(path) == fetch_hostfile(str(path)) == {"a": 4, "c": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("node-1\n", ":1: 'node-1' is not `host slots=N`"),
        ("node-1 slots=8\nnode-2 slots=eight\n", ":2: "),
        ("node-1 slots=8\nnode-1 slots=8\n", ":2: node-1 is listed twice"),
        ("node-1 slots=8\nme@node-1 slots=8\n", ":2: me@node-1 is the same machine as node-1; give it one line"),
        ("node-1 slots=0\n", "has no slots"),
        ("node-1 slots=1025\n", "node-1 has 1,025 slots; at most 1,024"),
        ("node-1 slots=" + "9" * 5000 + "\n", "is not `host slots=N`"),
        ("node-1 slots=٣\n", "is not `host slots=N`"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(HostfileError, match=message.replace("$", r"\$").replace("(", r"\(")):
        read_hostfile(path)


# Names that ssh, pdsh or a shell would read as something else.
NOT_HOSTS = [
    "-oProxyCommand=touch${IFS}pwned",
    "-l",
    "--",
    "user@-oProxyCommand=sh",
    "-user@host",
    "a@b@-c",
    "a$(reboot)",
    "a;b",
    "a,b",
    "a|b",
    "a`b`",
    "^hosts",
    "a/b",
    "a[1-2]",
    "é",
    ":-o",
    "",
]


@pytest.mark.parametrize("name", NOT_HOSTS)
@pytest.mark.parametrize("command", ["train", "launch", "preflight", "hostfile"])
def test_what_is_not_a_host_reaches_no_program(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands that take a hostfile refuse the line before any program is started."""
    from maskvr_ds.cli.main import main as maskvr

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    path = tmp_path / "hosts"
    path.write_text(f"good slots=1\n{name} slots=1\n", encoding="utf-8")
    run = ["--hostfile", str(path), "--config", "demo_cpu", "--set", f"output_dir={tmp_path / 'run'}"]
    status = {
        "train": lambda: maskvr(["train", *run]),
        "launch": lambda: main(["launch", *run]),
        "preflight": lambda: main(["preflight", *run]),
        "hostfile": lambda: main(["hostfile", str(path)]),
    }[command]()
    assert status == 1
    assert f"{path}:2: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not is_host(name)


@pytest.mark.parametrize("name", ["node-1", "a_b.c", "10.0.0.4", "user@10.0.0.4", "u-1@h-2.x", "fe80::1", "u@::1"])
def test_hosts(name: str, tmp_path: Path) -> None:
    assert is_host(name)
    (tmp_path / "hosts").write_text(f"{name} slots=3")
    assert read_hostfile(tmp_path / "hosts") == {name: 3}


@given(st.from_regex(r"\S{1,12}", fullmatch=True))
def test_a_host_is_no_option_and_no_shell_syntax(name: str) -> None:
    if is_host(name):
        assert not any(part.startswith("-") for part in name.split("@"))
        assert not set(name) & set(" \t\n'\"\\\\$`;&|<>()[]{}*?!#,/^=")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    assert main(["hostfile", str(path)]) == 1
    assert "no such file" in capsys.readouterr().err
    path.write_text(GOOD)
    assert main(["hostfile", str(path)]) == 0
    assert "2 hosts, 12 ranks" in capsys.readouterr().out
    assert main(["hostfile", str(path), "--slots", "4"]) == 1
    captured = capsys.readouterr()
    assert f"--slots 4: {path} sets the slots of each host" in captured.err
    assert captured.out == ""
    path.write_bytes(b"node-1 slots=8\n\xff\xfe")
    assert main(["hostfile", str(path)]) == 1
    assert f"{path}: not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hosts"),
    [
        (["a", "b"], {"a": 8, "b": 8}),
        (["a:2,b:4"], {"a": 2, "b": 4}),
        (["node[08-11]:4", "c"], {"node08": 4, "node09": 4, "node10": 4, "node11": 4, "c": 8}),
        (["r[1-2]n[1,3]"], {"r1n1": 8, "r1n3": 8, "r2n1": 8, "r2n3": 8}),
        (
            ["ip-10-0-[3-4]-7.eu-west-1.compute.internal:1"],
            {f"ip-10-0-{i}-7.eu-west-1.compute.internal": 1 for i in (3, 4)},
        ),
        (["ubuntu@10.0.0.4,ubuntu@10.0.0.5"], {"ubuntu@10.0.0.4": 8, "ubuntu@10.0.0.5": 8}),
    ],
)
def test_names_and_ranges(words: list[str], hosts: dict[str, int]) -> None:
    made = hosts_from_words(words, 8)
    assert list(made.items()) == list(hosts.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:b"], "'b' slots"),
        (["fe80::1:8"], "HOST or HOST:SLOTS; write an IPv6 address into a hostfile"),
        (["a:0"], "'0' slots"),
        (["a[3-1]"], "descending range"),
        (["a[1-99999999]"], "more than"),
        (["a[x]"], "neither a number"),
        (["a[1-9999]b[1-9999]"], "'a.1-9999.b.1-9999.': stands for more than 10,000 hosts"),
        (["[1-10]" * 40], "stands for more than 10,000 hosts"),
        (["a[1-9999]", "b[1-9999]"], "19,998 hosts; at most 10,000 expected"),
        (["a[" + "1," * 10_000 + "1]"], "stands for more than 10,000 hosts"),
        (["a[1-" + "9" * 5000 + "]"], "characters. is neither a number"),
        (["a:2000"], "'2000' slots; expected a number of ranks from 1 to 1,024"),
        (["a:" + "9" * 5000], "characters. slots; expected"),
        (["user@-oProxyCommand=x"], "is not a host name"),
        (["a[1"], "is not a host name"),
        (["-oProxyCommand=x"], "is not a host name"),
        (["a b"], "is not a host name"),
        (["a$(reboot)"], "is not a host name"),
        (["a", "b,a"], "a is listed twice"),
    ],
)
def test_invalid_names(words: list[str], message: str) -> None:
    with pytest.raises(HostfileError, match=message):
        hosts_from_words(words, 8)


def test_slots_are_required() -> None:
    with pytest.raises(HostfileError, match="number of ranks is missing"):
        hosts_from_words(["a"], None)


@given(st.text())
def test_a_created_hostfile_can_be_read(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Any text as a host name: rejected, or read back unchanged."""
    try:
        hosts = dict.fromkeys(expand(name), 2)
    except HostfileError:
        return
    path = tmp_path_factory.mktemp("made") / "hosts"
    path.write_text(hostfile_text(hosts), encoding="utf-8")
    assert read_hostfile(path) == hosts


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stub that prints the nodes in its last argument, one per line."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho \"$3\" | tr , '\\n'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("variables", "slots", "counts"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8"}, None, [8, 8, 8]),
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, None, [2, 2, 1]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "1(x3)"}, None, [4, 4, 4]),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 2, [2, 2, 2]),
    ],
)
@pytest.mark.usefixtures("scontrol")
def test_from_slurm(variables: dict[str, str], slots: int | None, counts: list[int]) -> None:
    hosts = slurm_hosts({"SLURM_JOB_NODELIST": "n1,n2,n3", **variables}, slots)
    assert hosts == dict(zip(("n1", "n2", "n3"), counts, strict=True))


@pytest.mark.usefixtures("scontrol")
def test_missing_slurm_variables() -> None:
    with pytest.raises(HostfileError, match="SLURM_JOB_NODELIST"):
        slurm_hosts({}, None)
    with pytest.raises(HostfileError, match="pass --slots"):
        slurm_hosts({"SLURM_JOB_NODELIST": "n1"}, None)
    with pytest.raises(HostfileError, match="2 nodes, but tasks of 1"):
        slurm_hosts({"SLURM_JOB_NODELIST": "n1,n2", "SLURM_TASKS_PER_NODE": "1"}, None)


def test_command_creates_a_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    assert main(["hostfile", "--hosts", "n[1-2]", "--slots", "4", "--output", str(path)]) == 0
    assert "2 hosts, 8 ranks" in capsys.readouterr().out
    assert path.read_text() == "n1 slots=4\nn2 slots=4\n"
    assert main(["hostfile", "--hosts", "n1:4"]) == 0
    assert capsys.readouterr().out == "n1 slots=4\n"


def test_an_option_without_effect_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hostfile", "--hosts", "n1:4", "--cpus"]) == 1
    assert "add --check-slots" in capsys.readouterr().err


def test_a_machine_under_two_users_is_refused() -> None:
    with pytest.raises(HostfileError, match="me@n2 is the same machine as n2; list it once"):
        hosts_from_words(["n[1-2]:4", "me@n2:4"], None)
