"""SIGKILL at random moments of saving, pruning, converting, packing and exporting: nothing is lost, and what is resumed
equals what was never disturbed."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, faults, step_of
from tests.distributed import commands
from tests.distributed.commands import Ended, die_during, run, timed
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, train_all
from tests.support.corpora import make_corpus, make_tokenizer

FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
# Steps between two kills: a checkpoint of every step is saved, and the one before the last is pruned.
BETWEEN = 3
SIGKILL = -9


@dataclass
class Report:
    """What happened on the stage, one line per kill; `faults`: what should not have."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Stage:
    def __init__(self, folder: Path, kills: int) -> None:
        self.folder, self.kills, self.report = folder, kills, Report()
        self.chance = random.Random(11)
        self.log = folder / "log"

    def train(self, run_folder: Path, steps: int, deepspeed: str = "zero1_fp32") -> list[str]:
        values = configuration(
            run_folder,
            self.folder / "corpus",
            steps=steps,
            deepspeed=deepspeed,
            evaluation={"every_steps": 0},
            checkpoint={"every_steps": 1, "keep_last": 2},
        )
        config = run_folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(values))
        return ["train", "--config", str(config), "--num-gpus", "1", "--resume", "auto"]

    def expect(self, what: str, ended: Ended, status: int) -> None:
        if ended.status != status or "Traceback" in ended.said:
            self.report.faults.append(f"{what}: status {ended.status}: {ended.said[-2000:]}")

    def durations(self, words: list[str], owner: Any, name: str) -> float:
        """Seconds that the longest call of a function takes in an undisturbed command."""
        note = self.folder / "note"
        note.unlink(missing_ok=True)
        self.expect(f"undisturbed {name}", run(words, self.log, timed(owner, name, note)), 0)
        return max(map(float, note.read_text().split()))

    def kill_in(self, words: list[str], owner: Any, name: str, call: int, longest: float, at: str) -> None:
        """Run a command that dies at a random moment of a call, or of as much time after its start."""
        seconds = self.chance.uniform(0, longest)
        ended = run(words, self.log, die_during(owner, name, call, seconds))
        self.expect(at, ended, SIGKILL)
        self.report.lines.append(f"{at}: killed {1000 * seconds:.1f} ms after the start of {name}")

    def checkpoints(self) -> None:
        """One run that is killed again and again in a save and while it deletes old checkpoints."""
        from maskvr_ds.checkpoint import save
        from maskvr_ds.run_folder import retention

        # A kill after the end of the call is one in a later step: there may be some more lives than kills.
        steps = 2 * self.kills * BETWEEN + 2 * BETWEEN
        whole, killed = self.folder / "undisturbed", self.folder / "killed"
        saving = self.durations(self.train(whole, steps), save, "save")
        pruning = self.durations(self.train(self.folder / "measured", 8), retention, "remove_old")
        words, reached = self.train(killed, steps), 0
        for at, owner, name, longest in (
            ("saving", save, "save", saving),
            ("pruning", retention, "remove_old", pruning),
        ):
            for _ in range(self.kills):
                self.kill_in(words, owner, name, BETWEEN, longest, at)
                complete = complete_checkpoints(killed)
                newest = step_of(complete[-1]) if complete else 0
                # The step of the save that was killed may be lost, no earlier one.
                if newest < reached + BETWEEN - 1 or any(faults(folder) for folder in complete) or len(complete) < 2:
                    self.report.faults.append(f"{at}: {reached} was reached, then {[f.name for f in complete]}")
                reached = newest
        self.expect("the rest", run(words, self.log), 0)
        self.same(killed, whole)

    def same(self, ours: Path, theirs: Path) -> None:
        weights = [read_weights(complete_checkpoints(folder)[-1]) for folder in (ours, theirs)]
        if column(ours, *FIGURES) != column(theirs, *FIGURES):
            self.report.faults.append(f"{ours}: other losses or digests than {theirs}")
        if not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1]):
            self.report.faults.append(f"{ours}: other weights than {theirs}")
        hidden = [path.name for path in (ours / "checkpoints").iterdir() if path.name.startswith(".")]
        if hidden:
            self.report.faults.append(f"{ours}: {hidden} are left")

    def conversions(self) -> None:
        """A run of two ranks that one rank resumes, killed while it converts the checkpoint."""
        from maskvr_ds.checkpoint import reshard

        def resumed(name: str) -> Path:
            output = self.folder / name
            shutil.copytree(self.folder / "begun", output)
            return output

        whole = resumed("converted")
        longest = self.durations(self.train(whole, 8, "zero2_fp32"), reshard, "convert")
        for number in range(self.kills):
            output = resumed(f"converted.{number}")
            words = self.train(output, 8, "zero2_fp32")
            before = files(output / "checkpoints")
            self.kill_in(words, reshard, "convert", 1, longest, "converting")
            after = files(output / "checkpoints")
            # If the moment came after the conversion, a checkpoint was saved.
            if any(after.get(name) != content for name, content in before.items() if "step-00000006/" in name):
                self.report.faults.append(f"{output}: a conversion has changed checkpoints")
            self.expect("resumed", run(words, self.log), 0)
            self.same(output, whole)

    def outputs(self, name: str, words: Callable[[Path], list[str]]) -> None:
        """A command with one output, killed at a random moment and started again."""
        whole = self.folder / name / "undisturbed"
        whole.parent.mkdir()
        first = run(words(whole), self.log)
        self.expect(name, first, 0)
        killed = 0
        # It may have ended before the moment has come.
        for number in range(3 * self.kills):
            output = self.folder / name / f"{number}"
            ended = commands.kill_at_random(words(output), self.log, 0.9 * first.seconds, self.chance)
            if ended.status == SIGKILL:
                killed += 1
                there = sorted(path.name for path in output.iterdir()) if output.exists() else []
                self.report.lines.append(f"{name}: killed after {ended.seconds:.2f} s, output has {there}")
            again = run(words(output), self.log)
            # An export that was finished when it was killed refuses to replace it.
            if not (name == "exporting" and "exists and is not an empty folder" in again.said):
                self.expect(f"{name} again", again, 0)
            if files(output) != files(whole):
                self.report.faults.append(f"{output}: other files than {whole}")
            if killed == self.kills:
                break
        if left := [path.name for path in whole.parent.iterdir() if path.name.endswith(".partial")]:
            self.report.faults.append(f"{name}: {left} are left")


def files(folder: Path) -> dict[str, bytes]:
    """Contents by path; of the model card only that there is one, since it names the folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: b"" if name == "README.md" else content for name, content in found.items()}


def play(folder: Path, kills: int) -> tuple[list[str], list[str]]:
    """On a rank, which has imported everything."""
    import maskvr_ds.train  # noqa: F401

    stage = Stage(folder, kills)
    inputs = ["--input", str(folder / "text.txt"), "--tokenizer", str(folder / "tokenizer")]
    tokenize = ["data_pipeline", "tokenize", *inputs, "--output", str(folder / "tokens"), "--no-progress"]
    stage.expect("tokenize", run(tokenize, stage.log), 0)
    stage.checkpoints()
    stage.conversions()
    pack = ["data_pipeline", "pack", str(folder / "tokens"), "--sequence-length", "16", "--no-progress"]
    stage.outputs("packing", lambda output: [*pack, "--shard-size", "0.01", "--output", str(output)])
    export = ["export", "--checkpoint", str(folder / "undisturbed")]
    stage.outputs("exporting", lambda output: [*export, "--output", str(output)])
    return stage.report.lines, stage.report.faults


def test_kills_at_random_moments(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kills = 20 if request.config.getoption("--whole-survival") else 2
    corpus = make_corpus(tmp_path / "corpus", rows=200, words=20)
    make_tokenizer(tmp_path / "tokenizer", 20)
    chance = random.Random(0)
    texts = (" ".join(f"w{chance.randrange(20)}" for _ in range(60)) for _ in range(2000))
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    sections = {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 1, "keep_last": 2}}
    begun = configuration(tmp_path / "begun", corpus, steps=6, deepspeed="zero2_fp32", **sections)
    assert run_ranks(train_all, 2, [(begun, None)]) == [[None], [None]]
    ((lines, wrong),) = run_ranks(play, 1, tmp_path, kills, timeout=3600)
    print("\n".join(lines), flush=True)
    assert not wrong, os.linesep.join(wrong)
    for what in ("saving", "pruning", "converting", "packing", "exporting"):
        assert sum(line.startswith(what) for line in lines) == kills, (what, lines)
