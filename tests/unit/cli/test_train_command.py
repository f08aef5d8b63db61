"""`maskvr train`: options that exclude each other."""

from pathlib import Path

import pytest

from maskvr_ds.cli.main import main


def test_ranks_of_this_machine_or_of_a_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("a slots=2\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["train", "--config", "demo_cpu", "--hostfile", str(tmp_path / "hosts"), "--num-gpus", "7"])
    assert "not allowed with argument" in capsys.readouterr().err
