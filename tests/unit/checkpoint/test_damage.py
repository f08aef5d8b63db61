"""Damage of every kind in a checkpoint or in what leads to it is named in one line and passed by."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvr_ds.run_folder.checkpoints import (
    CheckpointError,
    complete_checkpoints,
    faults,
    find,
    intact,
    verify,
    write_origin,
)
from tests.unit.checkpoint.test_checkpoint import found, rewrite, write


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _folder_loop(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(path.parent.name)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "list": ("checkpoint.json", lambda p: p.write_text("[]"), "damaged (not a JSON object)"),
    "null": ("checkpoint.json", lambda p: p.write_text("null"), "damaged (not a JSON object)"),
    "number": ("checkpoint.json", lambda p: p.write_text("1" * 5000), "damaged (not valid JSON)"),
    "deep": ("checkpoint.json", lambda p: p.write_text("[" * 200_000), "damaged (not valid JSON)"),
    "not UTF-8": ("checkpoint.json", lambda p: p.write_bytes(b"\xff\xfe{}"), "damaged (not valid JSON)"),
    "empty": ("checkpoint.json", lambda p: p.write_bytes(b""), "damaged (not valid JSON)"),
    "loop": ("checkpoint.json", _loop, "cannot be read (Too many levels of symbolic links)"),
    "folder": ("checkpoint.json", _folder, "cannot be read (Is a directory)"),
    "loop of a file": ("optimizer.pt", _loop, "optimizer.pt: cannot be read"),
    "folder for a file": ("optimizer.pt", _folder, "optimizer.pt: missing"),
    "loop of a folder": (
        "bert/config.json",
        lambda p: (p.unlink(), p.parent.rmdir(), p.parent.symlink_to("bert")),
        "bert",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_of_every_kind_is_named_and_passed_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from maskvr_ds.cli import main

    good, folder = write(tmp_path, 10), write(tmp_path, 20)
    file, damage, said = DAMAGES[name]
    damage(folder / file)
    assert found(tmp_path, "auto") == good
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    # Where a log is configured, it names what is skipped.
    verdicts = [line for line in captured.out.splitlines() if line.startswith("step-")]
    assert verdicts == ["step-00000010: intact", "step-00000020: damaged"]
    assert said in captured.err
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    with pytest.raises(CheckpointError):
        verify(folder)


@pytest.mark.parametrize("name", ["checkpoint.json", "optimizer.pt"])
def test_a_disk_that_fails_to_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    good, folder = write(tmp_path, 10), write(tmp_path, 20)
    opened = io.open

    def broken(path: Any, *args: Any, **options: Any) -> Any:
        if str(path) == str(folder / name):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(io, "open", broken)
    (fault,) = faults(folder)
    assert "cannot be read" in fault
    assert "Input/output error" in fault
    assert found(tmp_path, "auto") == good


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["files", "step", "format", "guard", "sha256", "identity", "more"]), value=JSON)
def test_no_content_of_a_manifest_is_a_traceback(tmp_path: Path, key: str, value: Any) -> None:
    """Also of one whose own SHA-256 agrees."""
    folder = tmp_path / "checkpoints" / "step-00000020"
    if not folder.exists():
        write(tmp_path, 20)
    before = (folder / "checkpoint.json").read_bytes()
    try:
        rewrite(folder, lambda content: content.update({key: value}))
        found = faults(folder)
        assert all(isinstance(text, str) for text in found)
        list(intact(tmp_path))
    finally:
        (folder / "checkpoint.json").write_bytes(before)


def test_a_copy_under_another_steps_name_is_not_that_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from maskvr_ds.cli import main

    folder = write(tmp_path, 4)
    copy = folder.with_name("step-99")
    shutil.copytree(folder, copy)
    write(tmp_path, 100)
    assert [f.name for f in complete_checkpoints(tmp_path)] == ["step-00000004", "step-99", "step-00000100"]
    assert faults(copy) == [f"{copy}: holds step 4, another than its name says; remove or rename it"]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000100")
    assert found(tmp_path, "auto") == folder
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "holds step 4" in capsys.readouterr().err
    renamed = copy.rename(copy.with_name("step-4"))
    assert faults(renamed) == [], "the same step, spelled otherwise"


def test_own_checkpoints_are_no_origin_also_behind_links(tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = write(run, 10)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    write_origin(run, own)
    assert not (run / "origin.json").exists()
    own.rename(tmp_path / own.name)
    own.symlink_to(tmp_path / own.name)
    write_origin(run, own)
    assert not (run / "origin.json").exists()
    write_origin(run, write(tmp_path / "other", 10))
    assert (run / "origin.json").is_file()


@pytest.mark.parametrize("content", ["[]", "{}", "{", "[" * 100_000, '{"checkpoint": 1, "sha256": 2}'])
def test_a_damaged_origin_is_an_error_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "origin.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"origin.json: damaged"):
        find(tmp_path, "auto")
