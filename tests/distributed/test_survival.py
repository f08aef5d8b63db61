"""Signals, kills, full disks, damage and divergence, each compared with an uninterrupted run."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.data.loader import sample_rows
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, faults, read_state
from maskvr_ds.run_folder.layout import METRICS, STOPPED
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, free_ports, metrics
from tests.support.corpora import make_corpus

STEPS, EVERY, BAD = 16, 4, 9
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
NO_EVALUATION: dict[str, Any] = {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": EVERY}}
AT_ONCE = {"divergence": {"max_skipped": 0, "margin": 0}}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A tmpfs of 12 MB; None if this process may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]
    mounted = shutil.which("mount") and not subprocess.run(words, check=False, capture_output=True).returncode
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


class Play:
    def __init__(self, folder: Path, disk: Path | None) -> None:
        self.folder, self.disk = folder, disk
        self.corpus = make_corpus(folder / "corpus", rows=200, words=20)
        acts: dict[str, Act] = {}
        # A row of step BAD + 1 (1-based).
        self.row = int(self.rows_of_step(BAD)[5])

        def values(name: str, where: Path = folder, **sections: Any) -> dict[str, Any]:
            more = {**NO_EVALUATION, "deepspeed": "zero2_fp32", **sections}
            return configuration(where / name, self.corpus, steps=STEPS, **more)

        acts["uninterrupted"] = Act(values("uninterrupted"))
        for number, name in ((signal.SIGUSR1, "usr1"), (signal.SIGTERM, "term")):
            acts[name] = Act(values(name), signal=(1, 5, number))
            acts[f"{name} resumed"] = Act(values(name), "auto")
        acts["kill one"] = Act(values("kill one"), kill=(1, "step", 6))
        acts["kill one resumed"] = Act(values("kill one"), "auto", kill=(None, "save", 2))
        acts["kill one in save resumed"] = Act(values("kill one"), "auto")
        acts["bad row"] = Act(values("bad row", **AT_ONCE), nan_row=self.row)
        acts["bad row killed"] = Act(
            values("bad row killed", **AT_ONCE), nan_row=self.row, kill=(None, "step", BAD + 2)
        )
        acts["bad row resumed"] = Act(values("bad row killed", **AT_ONCE), "auto", nan_row=self.row)
        acts["bad row skipped"] = Act(values("bad row skipped"), nan_row=self.row)
        for stage in (0, 1, 3):
            acts[f"skipped {stage}"] = Act(values(f"skipped {stage}", deepspeed=f"zero{stage}_fp32"), nan_row=self.row)
        # Two phases; a bad row early in the second, before it has saved anything.
        half = STEPS // 2
        start = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}
        phases: list[dict[str, Any]] = [
            {"name": name, "data": {"path": str(self.corpus)}, "training": {"steps": half}} for name in ("one", "two")
        ]
        phases[1] |= {"start": start, "optimizer": {"lr": 0.02}}
        for name in ("phases", "phases, damaged"):
            two = {**values(name, **AT_ONCE), "phases": phases}
            del two["training"], two["data"]
            first, second = (
                np.concatenate([self.rows_of_step(s, two, phase) for s in steps])
                for phase, steps in ((0, range(half)), (1, range(3)))
            )
            row = next(int(r) for r in second[24:] if r not in [*first, *second[:24]])
            last = folder / name / "checkpoints" / f"step-{half:08d}" / "checkpoint.json"
            acts[name] = Act(two, nan_row=row, damage=(half + 1, last) if "damaged" in name else None)
        at_save, at_end = (int(self.rows_of_step(step)[5]) for step in (2 * EVERY - 1, STEPS - 1))
        acts["skipped at a save"] = Act(values("skipped at a save"), nan_row=at_save)
        acts["skipped at the end"] = Act(values("skipped at the end"), nan_row=at_end)
        acts["always"] = Act(values("always", divergence={"max_skipped": 0, "max_rollbacks": 2}), nan_step=BAD)
        asynchronous = {"checkpoint": {"every_steps": EVERY, "asynchronous": True}}
        acts["async"] = Act(values("async", **asynchronous))
        # Ten slow files: their writes take longer than the steps between two checkpoints.
        acts["async, bad row"] = Act(values("async, bad row", **AT_ONCE, **asynchronous), nan_row=self.row, slow=0.1)
        acts["async, term"] = Act(values("async, term", **asynchronous), signal=(1, 5, signal.SIGTERM), slow=0.05)
        acts["async, killed"] = Act(values("async, term", **asynchronous), "auto", kill=(1, "write", 2), slow=0.02)
        acts["async, killed again"] = Act(values("async, term", **asynchronous), "auto", kill=(None, "write", 1))
        acts["async, resumed"] = Act(values("async, term", **asynchronous), "auto")
        if disk is not None:
            acts["async, full"] = Act(values("run async", disk, **asynchronous), fill=disk / "filler")
            acts["async, room"] = Act(values("run async", disk, **asynchronous), "auto", empty=disk / "filler")
            filler = disk / "filler"
            acts["full"] = Act(values("run", disk), fill=filler)
            acts["no room"] = Act(values("run", disk), "auto")
            acts["room"] = Act(values("run", disk), "auto", empty=filler)
        ranks = run_ranks(play, 2, list(acts.values()), free_ports(len(acts)), timeout=900)
        self.said = {name: [rank[i] for rank in ranks] for i, name in enumerate(acts)}

    def rows_of_step(self, step: int, values: dict[str, Any] | None = None, phase: int = 0) -> Any:
        """step: of the phase."""
        from maskvr_ds.config import RunConfig
        from maskvr_ds.data.keys import ORDER
        from maskvr_ds.training.phases import plan

        values = values or configuration(self.folder, self.corpus, steps=STEPS, **NO_EVALUATION)
        key = plan(RunConfig.model_validate(values))[phase].key(ORDER)
        return sample_rows(np.arange(step * 12, (step + 1) * 12), 200, key)[0]

    def __call__(self, name: str) -> Path:
        return self.folder / name

    def same_as_whole(self, run: Path) -> None:
        assert column(run, *FIGURES) == column(self("uninterrupted"), *FIGURES)
        ours, theirs = (read_weights(complete_checkpoints(r)[-1]) for r in (run, self("uninterrupted")))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None) -> Play:
    return Play(tmp_path_factory.mktemp("survival"), small_disk)


@pytest.mark.parametrize("name", ["usr1", "term"])
def test_a_signal_to_one_rank_stops_all_within_two_steps_with_a_checkpoint(played: Play, name: str) -> None:
    first, second = played.said[name]
    assert first == second
    assert first.startswith("stopped: stopped at step ")
    step = int(first.removeprefix("stopped: stopped at step ").split()[0])
    assert 6 <= step <= 8, "the signal came in step 6"
    assert played.said[f"{name} resumed"] == ["done", "done"]
    assert not (played(name) / STOPPED).exists()
    played.same_as_whole(played(name))


def test_ranks_killed_in_a_step_and_while_saving(played: Play) -> None:
    assert played.said["kill one"][1] == "killed"
    # A rank may notice the other's death before its own kill.
    assert "done" not in played.said["kill one resumed"]
    assert played.said["kill one in save resumed"] == ["done", "done"]
    played.same_as_whole(played("kill one"))
    assert not list((played("kill one") / "checkpoints").glob(".*"))


def test_checkpoint_events_record_the_pause(played: Play) -> None:
    events = [event for event in read_events(played("uninterrupted") / METRICS) if event["event"] == "checkpoint"]
    assert [event["step"] for event in events] == [4, 8, 12, 16]
    assert all(event["seconds"] > 0 for event in events)
    assert (played("uninterrupted") / "checkpoints" / "latest").read_text() == "step-00000016\n"


def test_a_bad_row_causes_a_rollback_and_is_skipped(played: Play) -> None:
    assert played.said["bad row"] == ["done", "done"]
    run = played("bad row")
    (event,) = [event for event in read_events(run / METRICS) if event["event"] == "rollback"]
    assert (event["step"], event["to_step"], event["passed_over"]) == (BAD + 1, 8, [[BAD, BAD + 1]])
    assert event["reason"] == "loss is nan"
    digests = column(run, "data_digest")
    assert digests[:BAD] == column(played("uninterrupted"), "data_digest")[:BAD]
    assert digests[BAD : STEPS - 1] == column(played("uninterrupted"), "data_digest")[BAD + 1 :], "one batch later"
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in metrics(run))
    assert read_state(complete_checkpoints(run)[-1]).samples == STEPS * 12


def test_resume_is_exact_after_a_rollback(played: Play) -> None:
    assert "done" not in played.said["bad row killed"]
    assert played.said["bad row resumed"] == ["done", "done"]
    runs = (played("bad row"), played("bad row killed"))
    assert column(runs[0], *FIGURES) == column(runs[1], *FIGURES)
    events = [[e for e in read_events(run / METRICS) if e["event"] == "rollback"] for run in runs]
    assert events[0] == events[1]


def test_a_rollback_skips_a_damaged_checkpoint_into_the_previous_phase(played: Play) -> None:
    """The rest of the previous phase is trained again, then the next one without the bad batch."""
    runs = [played(name) for name in ("phases", "phases, damaged")]
    rolled = [[e for e in read_events(run / METRICS) if e["event"] == "rollback"] for run in runs]
    assert [(e["phase"], e["step"], e["to_step"]) for (e,) in rolled] == [(1, 11, 8), (1, 11, 4)]
    assert rolled[0][0]["passed_over"] == rolled[1][0]["passed_over"] == [[2, 3]]
    assert column(runs[0], *FIGURES) == column(runs[1], *FIGURES)
    one, two = (read_weights(complete_checkpoints(run)[-1]) for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_single_bad_step_skips_its_update(played: Play) -> None:
    for name in ("bad row skipped", "skipped 0", "skipped 1", "skipped 3"):
        assert played.said[name] == ["done", "done"], name
        lines = metrics(played(name))
        assert [line["step"] for line in lines if "update_left_out" in line] == [BAD + 1]
        assert lines[BAD]["update_left_out"] == "loss is nan"
        assert lines[BAD]["loss"] is None
        assert column(played(name), "data_digest") == column(played("uninterrupted"), "data_digest")
        for line, of_stage_2 in zip(lines, metrics(played("bad row skipped")), strict=True):
            if line["step"] != BAD + 1:
                assert line["loss"] == pytest.approx(of_stage_2["loss"], abs=1e-4), (name, line["step"])


def test_no_checkpoint_at_a_skipped_step(played: Play) -> None:
    run = played("skipped at a save")
    assert played.said["skipped at a save"] == ["done", "done"]
    assert [e["step"] for e in read_events(run / METRICS)] == [EVERY, 2 * EVERY + 1, 3 * EVERY, STEPS]
    assert column(run, "data_digest") == column(played("uninterrupted"), "data_digest")


def test_a_run_does_not_end_at_a_skipped_step(played: Play) -> None:
    run = played("skipped at the end")
    assert played.said["skipped at the end"] == ["done", "done"]
    (event,) = [event for event in read_events(run / METRICS) if event["event"] == "rollback"]
    assert (event["step"], event["to_step"], event["passed_over"]) == (STEPS, 12, [[STEPS - 2, STEPS + 1]])
    assert metrics(run)[-1]["loss"] is not None
    assert complete_checkpoints(run)[-1].name == f"step-{STEPS:08d}"


def test_a_fault_that_recurs_after_rollbacks_stops_the_run(played: Play) -> None:
    assert any(
        "after 2 rollbacks to step 8 (divergence.max_rollbacks); skipping data did not help. Resume, from step 8," in s
        for s in played.said["always"]
    )
    events = [e for e in read_events(played("always") / METRICS) if e["event"] != "checkpoint"]
    assert [(e["event"], e["to_step"]) for e in events[:3]] == [("rollback", 8), ("rollback", 8), ("rollback", 4)]
    assert [e["event"] for e in events[3:]] == ["diverged"]
    assert all(e["step"] == BAD + 1 for e in events)
    assert [p.name[-2:] for p in complete_checkpoints(played("always"))] == ["04", "08"]


def test_a_full_disk_stops_the_run_and_keeps_the_previous_checkpoint(played: Play) -> None:
    if played.disk is None:
        pytest.skip("may not mount a tmpfs")
    run = played.disk / "run"
    assert any("could not be written and was discarded" in said for said in played.said["full"]), played.said
    assert any("checkpoint step-00000008 needs about" in said for said in played.said["no room"]), played.said
    assert played.said["room"] == ["done", "done"]
    played.same_as_whole(run)


def test_asynchronous_checkpoints_do_not_change_the_run(played: Play) -> None:
    assert played.said["async"] == ["done", "done"]
    played.same_as_whole(played("async"))
    events = [event for event in read_events(played("async") / METRICS) if event["event"] == "checkpoint"]
    assert [event["step"] for event in events] == [4, 8, 12, 16]
    assert all(event["seconds"] <= event["after_seconds"] for event in events)
    for folder, reference in zip(
        *(complete_checkpoints(played(name)) for name in ("async", "uninterrupted")), strict=True
    ):
        assert not faults(folder)
        assert folder.name == reference.name
        ours, theirs = read_weights(folder), read_weights(reference)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "the weights of its own step"


def test_a_rollback_waits_for_the_checkpoint_in_flight(played: Play) -> None:
    assert played.said["async, bad row"] == ["done", "done"]
    runs = (played("bad row"), played("async, bad row"))
    assert column(runs[0], *FIGURES) == column(runs[1], *FIGURES)
    first, second = ([e for e in read_events(run / METRICS) if e["event"] == "rollback"] for run in runs)
    assert first == second


def test_kills_and_signals_during_asynchronous_writes(played: Play) -> None:
    said = played.said
    assert all(rank.startswith("stopped: stopped at step ") for rank in said["async, term"])
    assert said["async, killed"][1] == "killed"
    assert "done" not in said["async, killed"] + said["async, killed again"]
    assert said["async, resumed"] == ["done", "done"]
    played.same_as_whole(played("async, term"))
    assert not list((played("async, term") / "checkpoints").glob(".*"))


def test_a_disk_that_fills_up_during_an_asynchronous_write_ends_the_run(played: Play) -> None:
    if played.disk is None:
        pytest.skip("may not mount a tmpfs")
    run = played.disk / "run async"
    said = played.said["async, full"]
    assert any("could not be written and was discarded" in rank for rank in said), said
    assert "done" not in said
    assert played.said["async, room"] == ["done", "done"]
    played.same_as_whole(run)


def test_all_damages_are_named_and_the_previous_checkpoint_is_used(
    played: Play, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    damages = [(name, how) for name in _files(played("uninterrupted")) for how in ("truncated", "flipped", "deleted")]
    trained = damages if request.config.getoption("--whole-survival") else [damages[0], damages[-2]]
    acts, expected = [], []
    for number, (name, how) in enumerate(damages):
        run = tmp_path / str(number)
        shutil.copytree(played("uninterrupted"), run)
        path = complete_checkpoints(run)[-1] / name
        content = path.read_bytes()
        if how == "deleted":
            path.unlink()
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes(content[: middle or None] if how == "truncated" else flipped)
        named = faults(run / "checkpoints" / f"step-{STEPS:08d}")
        assert any(path.name in text for text in named), (name, how, named)
        if (name, how) in trained:
            sections = {**NO_EVALUATION, "deepspeed": "zero2_fp32"}
            values = configuration(run, played.corpus, steps=STEPS, **sections)
            acts.append(Act(values, "auto", output=tmp_path / f"{number}.txt"))
            expected.append((f"skipped: {path.parents[name.count('/')]}", path.name))
        else:
            shutil.rmtree(run)
    for said in run_ranks(play, 2, acts, free_ports(len(acts)), timeout=1800):
        assert said == ["done"] * len(acts)
    for act, words in zip(acts, expected, strict=True):
        assert act.output is not None
        said = act.output.read_text()
        assert all(word in said for word in words), said
        assert f"step-{STEPS - EVERY:08d}: step {STEPS - EVERY}," in said, "the checkpoint before"
        played.same_as_whole(Path(act.values["output_dir"]))
        assert not faults(complete_checkpoints(Path(act.values["output_dir"]))[-1])


def _files(run: Path) -> list[str]:
    newest = complete_checkpoints(run)[-1]
    return sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
