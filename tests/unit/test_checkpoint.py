"""Which checkpoints count, and how damage is told. The folders here are made by hand; test_train.py makes real ones."""

import json
from pathlib import Path

import pytest

from maskvr_ds import checkpoint
from maskvr_ds.checkpoint import CheckpointError, CheckpointState, complete_checkpoints, find, read_state, verify

STATE = CheckpointState(
    step=20, samples=640, world_size=2, zero_stage=2, dtype="float32", partitions=[100, 8], identity={"seed": 0}
)


def write(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "bert").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"moments" * 100)
    (folder / "bert" / "config.json").write_text("{}")
    if complete:
        checkpoint._write_manifest(folder, STATE)
    return folder


def test_what_was_written_is_read_and_verified(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    assert read_state(folder) == STATE
    verify(folder)
    listed = json.loads((folder / "checkpoint.json").read_text())["files"]
    assert set(listed) == {"optimizer.pt", "bert/config.json"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "optimizer.pt: missing; take an earlier checkpoint"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "700 bytes expected, 699 found"),
        (lambda f: f.write_bytes(b"M" + f.read_bytes()[1:]), "optimizer.pt: the SHA-256 differs"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    folder = write(tmp_path, 20)
    damage(folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        verify(folder)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    content = json.loads((folder / "checkpoint.json").read_text())
    content["files"]["../../../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        verify(folder)


def test_auto_takes_the_newest_complete_one(tmp_path: Path) -> None:
    assert find(tmp_path / "run", "auto") is None, "nothing yet: begin"
    write(tmp_path / "run", 5)
    newest = write(tmp_path / "run", 10)
    write(tmp_path / "run", 15, complete=False)
    (tmp_path / "run" / "checkpoints" / ".saving" / "step-00000020").mkdir(parents=True)
    assert find(tmp_path / "run", "auto") == newest
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["step-00000005", "step-00000010"]


def test_auto_never_begins_anew_over_broken_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "run", 15, complete=False)
    with pytest.raises(CheckpointError, match="none of step-00000015 is complete; remove"):
        find(tmp_path / "run", "auto")


def test_a_named_checkpoint_or_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "old", 10)
    assert find(tmp_path / "new", str(folder)) == folder
    assert find(tmp_path / "new", str(tmp_path / "old")) == folder
    (tmp_path / "empty").mkdir()
    later = write(tmp_path / "old", 20)
    with pytest.raises(CheckpointError, match="is not empty, and this is not its newest checkpoint"):
        find(tmp_path / "old", str(folder))
    assert find(tmp_path / "old", str(later)) == later
    with pytest.raises(CheckpointError, match="no complete checkpoint there"):
        find(tmp_path / "new", str(tmp_path / "empty"))


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    content = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 2"):
        read_state(folder)
