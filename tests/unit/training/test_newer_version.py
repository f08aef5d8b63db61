"""A resume after a downgrade: checkpoints of a newer version are not taken for damaged ones, and are not deleted."""

from pathlib import Path

import pytest

from maskvr_ds.run_folder.checkpoints import CheckpointError, find, read_state
from maskvr_ds.training.resume import _check_versions
from tests.unit.checkpoint.test_checkpoint import rewrite, write


def test_a_later_checkpoint_of_a_newer_version_is_an_error(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    _check_versions(tmp_path, find(tmp_path, "auto"))
    rewrite(tmp_path / "checkpoints" / "step-00000030", lambda content: content.update(format=5))
    found = find(tmp_path, "auto")
    assert found is not None
    assert found.state == read_state(tmp_path / "checkpoints" / "step-00000020")
    with pytest.raises(CheckpointError, match=r"step-00000030: format 5, .*update maskvr_ds, or .*step-00000020"):
        _check_versions(tmp_path, found)
    # Damage is none.
    path = tmp_path / "checkpoints" / "step-00000030" / "checkpoint.json"
    path.write_text(path.read_text() + " ")
    _check_versions(tmp_path, found)
    _check_versions(tmp_path, None)
