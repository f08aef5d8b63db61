"""A run resumes past damage in its folder, with the same figures as a resume of the intact folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, faults
from maskvr_ds.run_folder.layout import METRICS, ROLLBACKS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, free_ports
from tests.support.corpora import make_corpus

SAVED, STEPS, EVERY, BAD = 8, 12, 4, 6
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")


def manifest(run: Path) -> Path:
    return run / "checkpoints" / f"step-{SAVED:08d}" / "checkpoint.json"


def deep(run: Path) -> None:
    manifest(run).write_text("[" * 200_000)


def loop(run: Path) -> None:
    path = manifest(run).with_name("weights.safetensors")
    path.unlink()
    path.symlink_to(path.name)


def folder_loop(run: Path) -> None:
    shutil.rmtree(manifest(run).parent)
    manifest(run).parent.symlink_to(manifest(run).parent.name)


def copy_of_an_earlier_one(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000099")


def bad_line(run: Path) -> None:
    lines = (run / METRICS).read_bytes().split(b"\n")
    lines[3:3] = [b"\xff\x00", b"[]", b"{}", b"[" * 100_000]
    (run / METRICS).write_bytes(b"\n".join(lines))


def bad_rollbacks(run: Path) -> None:
    path = run / ROLLBACKS
    path.write_text(path.read_text()[:-9])


def archived(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000004"
    archive = run.with_name("archive")
    archive.mkdir()
    folder.rename(archive / folder.name)
    folder.symlink_to(archive / folder.name)


def linked(run: Path) -> None:
    (run / "checkpoints").rename(run.with_name("elsewhere"))
    (run / "checkpoints").symlink_to(run.with_name("elsewhere"))


def in_the_way(run: Path) -> None:
    """What a save of step 12 and its housekeeping meet."""
    (run / "checkpoints" / f"step-{STEPS:08d}").write_text("notes")
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").mkdir()
    (run / "checkpoints" / ".universal").symlink_to(run)


# Name -> (damage, what is said).
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "list": (lambda run: manifest(run).write_text("[]"), "step-00000008/checkpoint.json: damaged (not a JSON object)"),
    "deep": (deep, "step-00000008/checkpoint.json: damaged (not valid JSON)"),
    "loop": (loop, "step-00000008/weights.safetensors: cannot be read"),
    "folder loop": (folder_loop, "step-00000008/checkpoint.json: cannot be read"),
    "copy": (copy_of_an_earlier_one, "step-00000099: holds step 4, another than its name says"),
    "bad line": (bad_line, "metrics.jsonl: 4 damaged lines, the first is line 4"),
    "bad rollbacks": (bad_rollbacks, "rollbacks.json: damaged, kept as"),
    "archived": (archived, ""),
    "linked": (linked, ""),
    "in the way": (in_the_way, "step-00000012 is no checkpoint of that step; renamed"),
}


class Resumed:
    def __init__(self, folder: Path) -> None:
        self.folder, corpus = folder, make_corpus(folder / "corpus", rows=200, words=20)

        def act(name: str, resume: str | None = "auto", keep_last: int = 2, **more: Any) -> Act:
            sections = {"evaluation": {"every_steps": 0}}
            sections["checkpoint"] = {"every_steps": EVERY, "keep_last": keep_last}
            sections |= {"deepspeed": "zero2_fp32", "divergence": {"max_skipped": 0, "margin": 0}}
            values = configuration(folder / name, corpus, steps=STEPS, **sections)
            return Act(values, resume, output=folder / f"{name}.txt", error=folder / f"{name}.err", **more)

        # One rollback, so that there is a rollbacks.json.
        base = act("base", None, 3, nan_step=BAD, nan_once=True)
        assert run_ranks(play, 2, [base], free_ports(1)) == [["done"], ["done"]]
        shutil.copytree(folder / "base", folder / "finished")
        # As if killed after step 11.
        shutil.rmtree(folder / "base" / "checkpoints" / f"step-{STEPS:08d}")
        acts = {"intact": act("intact"), "finished": act("finished")}
        for name in ("intact", *DAMAGES):
            shutil.copytree(folder / "base", folder / name)
            if name in DAMAGES:
                DAMAGES[name][0](folder / name)
                acts[name] = act(name)
        for where in (folder / "intact", folder / "intact" / "checkpoints"):
            (where / ".latest.0123abcd.partial").touch()
            os.utime(where / ".latest.0123abcd.partial", (1e9, 1e9))
            (where / ".stop_requested.0123abcd.partial").touch()
        ranks = run_ranks(play, 2, list(acts.values()), free_ports(len(acts)), timeout=900)
        self.said = {name: [rank[i] for rank in ranks] for i, name in enumerate(acts)}

    def printed(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text() + (self.folder / f"{name}.err").read_text()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    return Resumed(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_passed_by(resumed: Resumed, name: str) -> None:
    assert resumed.said[name] == ["done", "done"]
    assert DAMAGES[name][1] in resumed.printed(name)
    run, intact = resumed.folder / name, resumed.folder / "intact"
    assert column(run, *FIGURES) == column(intact, *FIGURES)
    (ours, theirs) = (read_weights(r / "checkpoints" / f"step-{STEPS:08d}") for r in (run, intact))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not faults(run / "checkpoints" / f"step-{STEPS:08d}")
    assert not (run / "origin.json").exists(), "its own checkpoint is no origin"


def test_nothing_of_the_users_is_lost(resumed: Resumed) -> None:
    """What a link leads to, a copy under another name, a file in the way, a damaged file that was replaced."""
    folder = resumed.folder
    assert not faults(folder / "archive" / "step-00000004")
    assert not (folder / "archived" / "checkpoints" / "step-00000004").is_symlink(), "pruned"
    assert (folder / "copy" / "checkpoints" / "step-00000099" / "checkpoint.json").is_file()
    (kept,) = (folder / "in the way" / "checkpoints").glob("not-of-this-run-*")
    assert kept.read_text() == "notes"
    assert (folder / "in the way" / "config.yaml").is_file(), "behind a link called .universal"
    (kept,) = (folder / "bad line").glob("metrics.jsonl.damaged-*")
    assert b"\xff\x00\n" in kept.read_bytes()
    (kept,) = (folder / "bad rollbacks").glob("damaged-rollbacks.json.*")
    assert kept.read_text().startswith("[\n {")


def test_rollbacks_are_recovered_from_the_events(resumed: Resumed) -> None:
    for name in ("intact", "bad rollbacks"):
        (rollback,) = json.loads((resumed.folder / name / ROLLBACKS).read_text())
        (event,) = [e for e in read_events(resumed.folder / name / METRICS) if e["event"] == "rollback"]
        assert event == rollback
        assert rollback["to_step"] == EVERY


def test_a_finished_run_says_so(resumed: Resumed) -> None:
    assert resumed.said["finished"] == ["done", "done"]
    assert "trained to step 12 already, the configuration has 12 steps; nothing to do" in resumed.printed("finished")
    assert "nothing to do" not in resumed.printed("intact")
    assert "\nmodel  " in resumed.printed("intact")
    assert "\nmodel  " not in resumed.printed("finished"), "what it would train"
    assert [p.name[-2:] for p in complete_checkpoints(resumed.folder / "finished")] == ["04", "08", "12"]


def test_old_temporary_files_are_removed_and_young_ones_are_not(resumed: Resumed) -> None:
    for where in (resumed.folder / "intact", resumed.folder / "intact" / "checkpoints"):
        assert [p.name for p in where.glob(".*.partial")] == [".stop_requested.0123abcd.partial"]
