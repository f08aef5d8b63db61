"""Hostfiles: what DeepSpeed reads is read alike; what would make it go wrong is an error."""

from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.hostfile import HostfileError, read_hostfile

GOOD = "# two nodes\nnode-1 slots=8\n\nuser@10.0.0.2 slots=4  # the small one\n"


def test_reads_what_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(GOOD)
    assert read_hostfile(path) == {"node-1": 8, "user@10.0.0.2": 4}
    assert list(read_hostfile(path).items()) == list(fetch_hostfile(str(path)).items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("node-1\n", ":1: 'node-1' is not `host slots=N`"),
        ("node-1 slots=8\nnode-2 slots=eight\n", ":2: "),
        ("node-1 slots=8\nnode-1 slots=8\n", ":2: node-1 is listed twice"),
        ("node-1 slots=0\n", "has no slots"),
        ("-oProxyCommand=sh slots=1\n", "is not `host slots=N`"),
        ("a$(reboot) slots=1\n", "is not `host slots=N`"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(HostfileError, match=message.replace("$", r"\$").replace("(", r"\(")):
        read_hostfile(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    assert main(["hostfile", str(path)]) == 1
    assert "no such file" in capsys.readouterr().err
    path.write_text(GOOD)
    assert main(["hostfile", str(path)]) == 0
    assert "2 hosts, 12 ranks" in capsys.readouterr().out
