"""Deleting checkpoints: what is kept, and that a deletion which fails ends nothing."""

import logging
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from maskvr_ds.run_folder import checkpoints, retention
from maskvr_ds.run_folder.checkpoints import CheckpointError, complete_checkpoints, find
from maskvr_ds.run_folder.layout import LATEST
from maskvr_ds.run_folder.retention import best_of_phases, make_way, point_to, remove_old, remove_remains
from maskvr_ds.runtime import files
from tests.unit.checkpoint.test_checkpoint import STATE, write


def steps(run: Path) -> list[int]:
    return [checkpoints.step_of(folder) for folder in complete_checkpoints(run)]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def prune(run: Path, saved: int, keep_last: int = 2, keep_every_steps: int = 0) -> None:
    folder = run / "checkpoints" / f"step-{saved:08d}"
    remove_old(run, folder, keep_last=keep_last, keep_every_steps=keep_every_steps)


def test_retention_by_count_and_by_every_n_steps(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        write(tmp_path, step)
    prune(tmp_path, 40, keep_every_steps=15)
    assert steps(tmp_path) == [15, 30, 35, 40]
    prune(tmp_path, 40)
    assert steps(tmp_path) == [35, 40]


def test_later_checkpoints_are_deleted_once_an_earlier_one_was_saved(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step, complete=step != 20)
    prune(tmp_path, 10)
    assert [folder.name[-2:] for folder in checkpoints.checkpoints(tmp_path)] == ["05", "10"]


def test_later_checkpoints_of_every_n_steps_are_deleted_too(tmp_path: Path) -> None:
    """They belong to an abandoned history like the others."""
    for step in (5, 10, 15, 20, 25):
        write(tmp_path, step)
    prune(tmp_path, 15, keep_every_steps=10)
    assert steps(tmp_path) == [10, 15]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000015" / "checkpoint.json").write_text("[]")
    prune(tmp_path, 20)
    assert steps(tmp_path) == [10, 20], "two good ones"


def test_remains_of_kills_are_removed(tmp_path: Path) -> None:
    kept = write(tmp_path, 5)
    for name in (".saving", ".saving-1-abc/step-00000010", ".deleting-step-00000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    remove_remains(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]


def test_latest_names_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10):
        point_to(write(tmp_path, step), LATEST)
        assert (tmp_path / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"
    assert not list((tmp_path / "checkpoints").glob(".*"))
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "checkpoints" / "latest").mkdir()
    point_to(tmp_path / "checkpoints" / "step-00000010", LATEST)
    assert f"{tmp_path / 'checkpoints' / 'latest'} could not be written" in caplog.text


def test_a_link_is_removed_and_what_it_leads_to_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    archive.mkdir()
    for step in (5, 10, 15, 20):
        folder = write(run, step)
        if step != 20:
            folder.rename(archive / folder.name)
            folder.symlink_to(archive / folder.name)
    loop = run / "checkpoints" / "step-00000030"
    loop.symlink_to(loop)
    found = find(run, "auto")
    assert found is not None
    assert found.state.step == 20
    prune(run, 20)
    assert steps(run) == [15, 20]
    assert names(run) == ["step-00000015", "step-00000020"]
    assert [checkpoints.faults(folder) for folder in sorted(archive.iterdir())] == [[], [], []]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("fails", ["rename", "rmtree", "unlink"])
def test_a_deletion_that_fails_is_a_warning_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    """Write-protected, in use on NFS, a mount point."""
    for step in (5, 10, 15):
        write(tmp_path, step)
    kept = tmp_path / "checkpoints" / "step-00000005"
    if fails == "unlink":
        kept.rename(tmp_path / "archived")
        kept.symlink_to(tmp_path / "archived")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(shutil if fails == "rmtree" else Path, fails, refuse)
        prune(tmp_path, 15)
        remove_remains(tmp_path)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "step-00000005" in warning.getMessage()
    assert "Operation not permitted" in warning.getMessage()
    assert steps(tmp_path)[-2:] == [10, 15]
    prune(tmp_path, 15)
    remove_remains(tmp_path)
    assert names(tmp_path) == ["step-00000010", "step-00000015"], "once it is possible"


def test_a_warning_is_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
    for _ in range(3):
        files.discard(tmp_path / "folder")
    assert caplog.text.count("Device or resource busy") == 1


@pytest.mark.parametrize("what", ["checkpoint", "link", "loop", "dangling", "file", "copy"])
def test_what_has_a_new_checkpoints_name_makes_way(tmp_path: Path, what: str) -> None:
    other = write(tmp_path / "other", 10)
    folder = tmp_path / "checkpoints" / "step-00000010"
    folder.parent.mkdir()
    if what == "checkpoint":
        write(tmp_path, 10)
    elif what == "file":
        folder.write_text("notes")
    elif what == "copy":
        shutil.copytree(write(tmp_path, 5), folder)
    else:
        folder.symlink_to({"link": other, "loop": folder, "dangling": tmp_path / "nothing"}[what])
    make_way(folder)
    assert not os.path.lexists(folder)
    remove_remains(tmp_path)
    kept = [path for path in folder.parent.iterdir() if path.name.startswith("not-of-this-run-step-00000010")]
    assert len(kept) == (what in ("file", "copy"))
    assert not checkpoints.faults(other)
    assert find(tmp_path, "auto") is None or what == "copy"


def test_nothing_in_the_way_is_fine_and_what_cannot_move_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_way(tmp_path / "checkpoints" / "step-00000010")
    folder = write(tmp_path, 10)
    monkeypatch.setattr(retention, "set_aside", lambda *_: (_ for _ in ()).throw(OSError(16, "busy")))
    with pytest.raises(
        CheckpointError, match=r"step-00000010: in the way of the new checkpoint of that step .*; move it"
    ):
        make_way(folder)


def test_copies_of_another_step_are_neither_counted_nor_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    copy = tmp_path / "checkpoints" / "step-00000099"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000004", copy)
    prune(tmp_path, 12)
    assert steps(tmp_path) == [8, 12, 99]
    assert f"{copy} holds a checkpoint of step 4 under another step's name" in caplog.text
    assert replace(STATE, step=4) == checkpoints.read_state(copy)


def with_loss(run: Path, step: int, loss: float | None, phase: int = 1, **measured: float) -> Path:
    """A checkpoint with a held-out loss, or without."""
    folder = write(run, step)
    held_out = {} if loss is None else {"held_out_loss": loss, **measured}
    state = replace(checkpoints.read_state(folder), phases=[{}] * phase, held_out=held_out)
    (folder / "checkpoint.json").unlink()
    checkpoints.write_manifest(folder, state.stored())
    assert checkpoints.read_state(folder) == state
    return folder


def test_the_best_checkpoint_of_each_phase_is_kept(tmp_path: Path) -> None:
    losses = {5: 4.0, 10: 3.0, 15: 3.5, 20: 3.0, 25: None, 30: 5.0, 35: 4.5, 40: 4.6, 45: 4.7}
    kept = []
    for step, loss in losses.items():
        saved = with_loss(tmp_path, step, loss, phase=1 if step < 30 else 2)
        best = best_of_phases(tmp_path, saved)
        remove_old(tmp_path, saved, keep_last=2, keep_every_steps=0, keep=best)
        kept.append((checkpoints.step_of(best[-1]), steps(tmp_path)))
    assert kept == [
        (5, [5]),
        (10, [5, 10]),
        (10, [10, 15]),
        (10, [10, 15, 20]),  # of equal ones the earlier
        (10, [10, 20, 25]),
        (30, [10, 25, 30]),
        (35, [10, 30, 35]),
        (35, [10, 35, 40]),
        (35, [10, 35, 40, 45]),
    ]


def test_losses_on_other_rows_do_not_compare(tmp_path: Path) -> None:
    """A resume may change data.held_out_path and evaluation.rows."""
    found = []
    for step, loss, measured in (
        (5, 2.0, {"held_out_rows": 32, "held_out_unigram_entropy": 3.0}),
        (10, 2.5, {"held_out_rows": 64, "held_out_unigram_entropy": 3.0}),
        (15, 2.4, {"held_out_rows": 64, "held_out_unigram_entropy": 3.0}),
        (20, 3.5, {"held_out_rows": 64, "held_out_unigram_entropy": 4.0}),
        (25, 3.6, {"held_out_rows": 64, "held_out_unigram_entropy": 4.0}),
        (30, 3.7, {"held_out_rows": 128, "held_out_unigram_entropy": 4.0}),
    ):
        (best,) = best_of_phases(tmp_path, with_loss(tmp_path, step, loss, **measured))
        found.append(checkpoints.step_of(best))
    assert found == [5, 10, 15, 20, 20, 30]


def test_the_best_checkpoint_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    """It does not say on what its loss was measured."""
    with_loss(tmp_path, 5, 2.0)
    newest = with_loss(tmp_path, 10, 2.5, held_out_rows=64, held_out_unigram_entropy=3.0)
    assert [checkpoints.step_of(path) for path in best_of_phases(tmp_path, newest)] == [5]


def test_abandoned_and_renamed_checkpoints_are_not_the_best(tmp_path: Path) -> None:
    for step, loss in ((5, 4.0), (10, 3.0), (15, 1.0), (20, math.inf)):
        with_loss(tmp_path, step, loss if math.isfinite(loss) else None)
    shutil.copytree(tmp_path / "checkpoints/step-00000015", tmp_path / "checkpoints/step-00000001")
    saved = tmp_path / "checkpoints/step-00000010"
    assert [p.name for p in best_of_phases(tmp_path, saved)] == ["step-00000010"]
    remove_old(tmp_path, saved, keep_last=2, keep_every_steps=0, keep=best_of_phases(tmp_path, saved))
    assert not (tmp_path / "checkpoints/step-00000015").exists(), "of a history that was abandoned"


def test_a_checkpoint_without_the_figure_is_stored_as_before(tmp_path: Path) -> None:
    assert "held_out" not in checkpoints.read_manifest(with_loss(tmp_path, 5, None))
