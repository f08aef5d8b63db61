"""Nodes on which the ranks of a Slurm job fail: named, and excluded after the second time."""

import signal
from pathlib import Path

import pytest

from tests.unit.cluster.test_script import OURS, behave


def fail_on(node: str, step: int, why: str = "Killed") -> str:
    """Ranks that fail at a checkpoint; srun names the nodes, the first one first."""
    lines = (
        f"1: srun: error: n8: task 9: Killed\nsrun: error: {node}: task 1: {why}\nsrun: error: n9: tasks 2-3: Killed"
    )
    return f"{OURS} echo step-{step} >checkpoints/latest; printf '%s\\n' '{lines}' >&2; exit 1"


def updates(tmp_path: Path) -> list[str]:
    path = tmp_path / "updated"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("before", ["", "n5,n[7-8]"])
def test_a_node_that_fails_twice_is_excluded(tmp_path: Path, before: str) -> None:
    """Also at different checkpoints, and with failures elsewhere in between."""
    for restarts, (node, step) in enumerate((("n2", 1), ("n3", 2), ("n2", 3))):
        status, output, requeued = behave(tmp_path, fail_on(node, step), restarts % 2, EXCLUDED=before or "(null)")
        assert (status, requeued) == (0, "7"), output
        assert f"the ranks failed on {node}, checkpoint: step-{step}" in output
        assert updates(tmp_path) == (
            [f"JobId=7 ExcNodeList={before + ',' if before else ''}n2"] if restarts == 2 else []
        )
    assert (
        f"n2 is excluded from now on: the ranks failed there twice; undo: scontrol update JobId=7 ExcNodeList={before}"
        in (output)
    )


def test_two_failures_at_a_checkpoint_on_one_node_are_followed_by_a_start_without_it(tmp_path: Path) -> None:
    for restarts, node, again in ((0, "n2", True), (1, "n2", True), (1, "n3", False)):
        status, output, requeued = behave(tmp_path, fail_on(node, 1, "Exited with exit code 1"), restarts)
        assert (bool(requeued), status == 0) == (again, again), output
    assert updates(tmp_path) == ["JobId=7 ExcNodeList=n2"]
    assert "failed twice at checkpoint: step-1" in output


def test_the_end_of_a_requeued_start_does_not_interrupt_the_exclusion(tmp_path: Path) -> None:
    """Slurm terminates all processes of a start, also one that has just been forked: SIGTERM is ignored by then."""
    for step in (1, 2):
        behave(tmp_path, fail_on("n2", step))
    _, mask = (tmp_path / "ignored").read_text().split()
    assert int(mask, 16) >> (signal.SIGTERM - 1) & 1
    assert updates(tmp_path) == ["JobId=7 ExcNodeList=n2"]


def test_a_node_that_cannot_be_excluded_is_named(tmp_path: Path) -> None:
    behave(tmp_path, fail_on("n2", 1))
    status, output, requeued = behave(tmp_path, fail_on("n2", 2), REFUSE="1")
    assert (status, requeued) == (0, "7"), "the run is more important"
    assert (
        "n2 could not be excluded, although the ranks failed there twice; while the job is queued: scontrol" in output
    )


def test_failures_of_nodes(tmp_path: Path) -> None:
    """Ranks that stop on request are none; ranks name a node on which they hang; another job counts anew."""
    status, output, _ = behave(tmp_path, fail_on("n2", 1, "Exited with exit code 75"))
    assert (status, "failed on n9" in output) == (0, True), output
    hang = "mkdir -p heartbeats/job; printf n4 >heartbeats/job/abort; " + fail_on("n2", 2, "Exited with exit code 1")
    assert "failed on n4, checkpoint" in behave(tmp_path, hang)[1]
    old = "touch -d '1 hour ago' heartbeats/job/abort; " + fail_on("n2", 3)
    assert "failed on n2, checkpoint" in behave(tmp_path, old)[1]
    other = fail_on("n2", 4).replace('"7"', '"9"')
    assert "failed on n2, checkpoint" in behave(tmp_path, other, SLURM_JOB_ID="9")[1]
    assert updates(tmp_path) == []
    assert "the ranks failed, checkpoint" in behave(tmp_path, OURS + "echo step-9 >checkpoints/latest; exit 1")[1]
