"""Every fault: the command's status, what it says, no traceback, and no existing file changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.faults import page
from tests.unit.faults.case import Fault
from tests.unit.faults.world import copy_world, make_world, meet, train

ALL = [fault for faults in page.SECTIONS.values() for fault in faults]
# Made by a build that is refused while it runs; the same command completes it later.
_BUILD = ("out/",)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "world"
    make_world(folder)
    train(folder)
    return folder


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.what)
def test_fault(fault: Fault, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    copy_world(world, folder)
    outcome, before, after = meet(fault, folder)
    printed = outcome.err if outcome.err.strip() else outcome.out
    assert outcome.status == fault.status, printed
    assert re.search(fault.pattern(), outcome.err + outcome.out), printed
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.err.count("\n") <= 12 or fault.status == 2, "one clear error, not a page"
    changed = {name for name in before if after.get(name) != before[name]}
    assert not {name for name in changed if not name.startswith(fault.may_change or ("\0",))}
    added = set(after) - set(before)
    assert not {name for name in added if not name.startswith((*fault.may_change, *_BUILD))}


def test_the_world_is_right(world: Path, tmp_path: Path) -> None:
    """The commands of the faults succeed without the faults."""
    folder = tmp_path / "here"
    copy_world(world, folder)
    for command in (
        "data_pipeline build --input texts --tokenizer tok --sequence-length 16 --output out",
        "data_pipeline verify corpus",
        "maskvr config --config run.yaml",
        "maskvr checkpoint verify run",
        "maskvr export --checkpoint run --output exported",
        "cluster slurm --config run.yaml --set output_dir=new --gpus-per-node 0 --tasks-per-node 1 --nodes 1",
    ):
        outcome, *_ = meet(Fault("nothing", command, ""), folder)
        assert outcome.status == 0, outcome.err


def test_the_page_is_made_of_these_faults() -> None:
    assert len({fault.what for fault in ALL}) == len(ALL) >= 80
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python -m tests.unit.faults.page"
