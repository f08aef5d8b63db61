"""Checkpoint folders: completeness, damage, retention, resume. Written by hand here; test_train.py makes real ones."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskvr_ds.run_folder.checkpoints import (
    CheckpointError,
    CheckpointState,
    complete_checkpoints,
    faults,
    find,
    intact,
    read_state,
    verify,
    write_manifest,
    write_origin,
)
from maskvr_ds.run_folder.retention import remove_old
from maskvr_ds.runtime import files

STATE = CheckpointState(
    step=20, samples=640, world_size=2, zero_stage=2, dtype="float32", partitions=[100, 8], identity={"seed": 0}
)


def write(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "bert").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"moments" * 100)
    (folder / "bert" / "config.json").write_text("{}")
    if complete:
        write_manifest(folder, vars(replace(STATE, step=step)))
    return folder


def found(run: Path, resume: str) -> Path | None:
    checkpoint = find(run, resume)
    assert checkpoint is None or checkpoint.state == read_state(checkpoint.folder)
    return None if checkpoint is None else checkpoint.folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and update its own SHA-256."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    rest = json.dumps(content).removeprefix("{")
    path.write_text(f'{{"sha256": "{hashlib.sha256(rest.encode()).hexdigest()}",{rest}')


def test_round_trip_and_verification(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    assert read_state(folder) == STATE
    verify(folder)
    listed = json.loads((folder / "checkpoint.json").read_text())["files"]
    assert set(listed) == {"optimizer.pt", "bert/config.json"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "optimizer.pt: missing; use an earlier checkpoint"),
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
    rewrite(folder, lambda content: content["files"].update({"../../../secret": {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match="lies outside the checkpoint's folder"):
        verify(folder)


def test_auto_selects_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert find(tmp_path / "run", "auto") is None, "no checkpoint yet: start from step 0"
    write(tmp_path / "run", 5)
    newest = write(tmp_path / "run", 10)
    write(tmp_path / "run", 15, complete=False)
    (tmp_path / "run" / "checkpoints" / ".saving" / "step-00000020").mkdir(parents=True)
    assert found(tmp_path / "run", "auto") == newest
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["step-00000005", "step-00000010"]


def test_auto_never_restarts_over_damaged_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "run", 15, complete=False)
    with pytest.raises(CheckpointError, match=r"none of step-00000015 is intact .*json is missing.*; remove"):
        find(tmp_path / "run", "auto")


def test_a_named_checkpoint_or_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "old", 10)
    assert found(tmp_path / "new", str(folder)) == folder
    assert found(tmp_path / "new", str(tmp_path / "old")) == folder
    (tmp_path / "empty").mkdir()
    later = write(tmp_path / "old", 20)
    with pytest.raises(CheckpointError, match="is not empty, and this is not its newest checkpoint"):
        find(tmp_path / "old", str(folder))
    assert found(tmp_path / "old", str(later)) == later
    with pytest.raises(CheckpointError, match="contains no complete checkpoint"):
        find(tmp_path / "new", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=rf"; name its run, {re.escape(str(tmp_path / 'old'))}$"):
        find(tmp_path / "new", str(later.parent))


def test_origin_is_used_until_the_first_own_checkpoint(tmp_path: Path) -> None:
    """A run started from another run's checkpoint and killed before its own first one starts from there again."""
    run, folder = tmp_path / "run", write(tmp_path / "old", 10)
    other = write(tmp_path / "old", 20)
    run.mkdir()
    write_origin(run, folder)
    (run / "config.yaml").touch()
    assert found(run, "auto") == found(run, str(folder)) == folder
    with pytest.raises(CheckpointError, match="is not empty, and this is not its newest checkpoint"):
        find(run, str(other))
    folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"from which it was started, is missing or has changed; restore it"):
        find(run, "auto")
    (tmp_path / "moved").rename(folder)
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 found; use an earlier checkpoint"):
        find(run, "auto")
    own = write(run, 30)
    assert found(run, "auto") == own
    write_origin(run, own)
    assert json.loads((run / "origin.json").read_text())["checkpoint"] == str(folder), "own checkpoints are no origin"


def test_renamed_copies_are_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 10)
    copy = folder.rename(folder.with_name("step-00000010.bak"))
    assert find(tmp_path / "run", "auto") is None
    folder = write(tmp_path / "run", 10)
    assert found(tmp_path / "run", "auto") == folder
    assert complete_checkpoints(tmp_path / "run") == [folder]
    remove_old(tmp_path / "run", write(tmp_path / "run", 5), keep_last=2, keep_every_steps=0)
    assert copy.exists()
    assert not folder.exists()


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    rewrite(folder, lambda content: content.update(format=99))
    with pytest.raises(CheckpointError, match="format 99, this version reads 3 and 4"):
        read_state(folder)


def test_any_damaged_byte_of_the_manifest_is_detected(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    path = folder / "checkpoint.json"
    intact = path.read_bytes()
    for position in range(len(intact)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        assert str(path) in faults(folder)[0], position
    for length in range(0, len(intact), 7):
        path.write_bytes(intact[:length])
        assert str(path) in faults(folder)[0], length
    path.write_bytes(intact)
    assert faults(folder) == []


def test_all_faults_and_unlisted_files_are_reported(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    (folder / "optimizer.pt").unlink()
    (folder / "bert" / "config.json").write_text("[]")
    # Matches the pattern by which DeepSpeed finds files to open.
    (folder / "mp_rank_01_model_states.pt").write_bytes(b"cos\nsystem")
    found = faults(folder)
    assert len(found) == 3
    for name in ("bert/config.json", "optimizer.pt", "mp_rank_01_model_states.pt"):
        assert any(text.startswith(f"{folder / name}: ") for text in found), name
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states.pt: not listed in|missing|SHA-256"):
        verify(folder)


def test_damaged_checkpoints_are_logged_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step, complete=step != 20)
    (tmp_path / "checkpoints" / "step-00000015" / "optimizer.pt").write_bytes(b"moments")
    with caplog.at_level("INFO", logger="maskvr_ds"):
        assert found(tmp_path, "auto") == tmp_path / "checkpoints" / "step-00000010"
    first, second = caplog.messages
    assert "step-00000020: not a complete checkpoint" in first
    assert "step-00000015/optimizer.pt: 700 bytes expected, 7 found" in second


def test_the_command_lists_verifies_and_inspects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from maskvr_ds.cli import main

    folder = write(tmp_path, 10)
    write(tmp_path, 20)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "step-00000010: intact\nstep-00000020: intact\n"
    assert main(["checkpoint", "inspect", str(folder)]) == 0
    assert "optimizer.pt" in capsys.readouterr().out
    (folder / "optimizer.pt").unlink()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "step-00000010: damaged\nstep-00000020: intact\n"
    assert "step-00000010/optimizer.pt: missing" in captured.err
    lines = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 1.0, "held_out_loss": 5.4321}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["–", "5.4321"]
    assert main(["checkpoint", "list", str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_hash_during_write_matches_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 7)
    for length in (0, 1, 7, 20):
        content, path = bytes(range(length)), tmp_path / f"{length}.pt"
        expected = (length, hashlib.sha256(content).hexdigest())
        assert files.write_hashed(path, memoryview(content)) == expected
        assert path.read_bytes() == content
        assert files.write_hashed(path) == expected, "hash of the existing file"


def test_hashes_reported_by_ranks_are_verified(tmp_path: Path) -> None:
    """A file that differs from the hash computed during the write is reported as damaged."""
    folder = write(tmp_path, 20, complete=False)
    reported = files.write_hashed(folder / "optimizer.pt")
    write_manifest(folder, vars(STATE), {"optimizer.pt": reported})
    assert faults(folder) == []
    (folder / "checkpoint.json").unlink()
    (folder / "optimizer.pt").write_bytes(b"momentX" * 100)
    write_manifest(folder, vars(STATE), {"optimizer.pt": reported})
    (found,) = faults(folder)
    assert "optimizer.pt: the SHA-256 differs" in found


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_read_back", lambda path: "another")
    with pytest.raises(OSError, match="other bytes are read back than were written"):
        files.write_hashed(tmp_path / "file.pt", memoryview(b"content"))


@pytest.mark.parametrize("name", ["weights.safetensors", "probe.safetensors", "mapnet.safetensors"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_damage(tmp_path: Path, name: str, value: float) -> None:
    """Versions without a check before saving have stored them, with hashes that agree."""
    tensors = {"ids": np.arange(3), "good": np.ones((3, 4), np.float32), "bad": np.ones((3, 4), np.float32)}
    good, folder = write(tmp_path, 10), write(tmp_path, 20, complete=False)
    save_file(tensors, folder / name)
    write_manifest(folder, vars(STATE))
    assert faults(folder) == []
    (folder / "checkpoint.json").unlink()
    tensors["bad"][2, 3] = value
    save_file(tensors, folder / name)
    write_manifest(folder, vars(STATE))
    assert faults(folder) == [f"{folder / name}: 1 tensor holds NaN or infinity (bad); use an earlier checkpoint"]
    assert found(tmp_path, "auto") == good


def test_a_checkpoint_that_the_run_has_rolled_back_from_is_skipped(tmp_path: Path) -> None:
    run, rollbacks = tmp_path, [{"to_step": 12}, {"to_step": 8}]
    for step, known in ((4, 0), (8, 0), (12, 0), (16, 2)):
        folder = write(run, step, complete=False)
        write_manifest(folder, vars(replace(STATE, step=step, guard={"rollbacks": rollbacks[:known]})))
    assert [c.state.step for c in intact(run)] == [16, 12, 8, 4]
    (run / "rollbacks.json").write_text(json.dumps(rollbacks))
    skipped: list[str] = []
    assert [c.state.step for c in intact(run, skipped)] == [16, 8, 4]
    assert "the run has rolled back from it to step 8" in skipped[0]
    for damaged in ("", "[", "{}", "[[]]", "7"):
        (run / "rollbacks.json").write_text(damaged)
        assert [c.state.step for c in intact(run)] == [16, 12, 8, 4], "not needed to find one"
