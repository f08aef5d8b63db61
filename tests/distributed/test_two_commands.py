"""Two commands at once on one folder: one has it and ends as if alone, the other one says so and changes nothing."""

import itertools
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.commands import Command, Ended, run
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration, metrics, train_all
from tests.support.corpora import make_corpus, make_tokenizer

STEPS = 12
COMMANDS = ("train", "build", "pack", "export", "resume")
PAIRS = list(itertools.combinations_with_replacement(COMMANDS, 2))
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
# Longest difference of two starts in seconds; a training takes longer.
APART = 0.4


def files(folder: Path) -> dict[str, bytes]:
    """Contents by path; of the model card only that there is one, since it names the folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: b"" if name == "README.md" else content for name, content in found.items()}


def hesitate() -> None:
    """Before a command marks a folder as its own, it waits: two that look at the same time both find it unmarked."""
    from data_pipeline import outputs
    from maskvr_ds.run_folder import fence

    def slowly(write: Any) -> Any:
        def written(*arguments: Any, **options: Any) -> None:
            time.sleep(0.2)
            write(*arguments, **options)

        return written

    outputs.write_json, fence.atomic_write = slowly(outputs.write_json), slowly(fence.atomic_write)


class Stage:
    """A folder with inputs of all commands, and with what each of them makes when it is alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Inputs; the run to resume has a checkpoint of two ranks."""
        folder = self.folder
        corpus = make_corpus(folder / "corpus", rows=200, words=20)
        make_tokenizer(folder / "tokenizer", 20)
        chance = random.Random(0)
        texts = (" ".join(f"w{chance.randrange(20)}" for _ in range(60)) for _ in range(300))
        (folder / "text.txt").write_text("\n\n".join(texts))
        values = self.values(folder / "begun", corpus, seed=0, deepspeed="zero2_fp32")
        first = {**values, "training": {"steps": 6}}
        assert run_ranks(train_all, 2, [(first, None)]) == [[None], [None]]

    def values(self, output: Path, corpus: Path, **more: Any) -> dict[str, Any]:
        sections = {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 4}}
        return configuration(output, corpus, steps=STEPS, **sections, **more)

    def words(self, name: str, output: Path, number: int) -> list[str]:
        """The command on `output`; number: 0 or 1, with different arguments if the same command is started twice."""
        folder = self.folder
        if name in ("train", "resume"):
            seed = number if name == "train" else 0
            deepspeed = "zero2_fp32"
            config = output.with_suffix(f".{name}{number}.yaml")
            config.write_text(yaml.safe_dump(self.values(output, folder / "corpus", seed=seed, deepspeed=deepspeed)))
            words = ["train", "--config", str(config), "--num-gpus", "1"]
            return [*words, "--resume", "auto"] if name == "resume" else words
        if name == "export":
            step = (8, 12)[number]
            run_folder = folder / "alone.train0"
            return ["export", "--checkpoint", str(run_folder / f"checkpoints/step-{step:08d}"), "--output", str(output)]
        common = ["--sequence-length", str((16, 24)[number]), "--output", str(output), "--no-progress"]
        if name == "pack":
            return ["data_pipeline", "pack", str(folder / "tokens"), *common]
        inputs = ["--input", str(folder / "text.txt"), "--tokenizer", str(folder / "tokenizer")]
        return ["data_pipeline", "build", *inputs, *common]

    def alone(self) -> list[Ended]:
        """On a rank: every command alone, on folder/alone.NAME."""
        folder = self.folder
        inputs = ["--input", str(folder / "text.txt"), "--tokenizer", str(folder / "tokenizer")]
        tokenize = ["data_pipeline", "tokenize", *inputs, "--output", str(folder / "tokens"), "--no-progress"]
        ended = [run(tokenize, folder / "log")]
        for name in COMMANDS:
            for number in (0, 1):
                output = folder / f"alone.{name}{number}"
                if name == "resume":
                    shutil.copytree(folder / "begun", output)
                ended.append(run(self.words(name, output, number), folder / "log"))
        return ended

    def race(self, pairs: list[tuple[str, str, float]]) -> list[tuple[Ended, Ended]]:
        """On a rank: start both commands of each pair on a folder of their own, the second one so many seconds later,
        or the first one if that is negative."""
        ended = []
        for number, (one, two, later) in enumerate(pairs):
            output = self.folder / f"{number}" / "output"
            output.parent.mkdir()
            if "resume" in (one, two):
                shutil.copytree(self.folder / "begun", output)
            words = [self.words(one, output, 0), self.words(two, output, int(one == two))]
            logs = [output.with_suffix(f".{place}.log") for place in (0, 1)]
            order = (0, 1) if later >= 0 else (1, 0)
            started = {}
            for place in order:
                started[place] = Command(words[place], logs[place], hesitate)
                if place == order[0]:
                    time.sleep(abs(later))
            ended.append((started[0].wait(), started[1].wait()))
        return ended


def play(folder: Path, pairs: list[tuple[str, str, float]] | None) -> list[Any]:
    import maskvr_ds.train  # noqa: F401

    stage = Stage(folder)
    return list(stage.alone() if pairs is None else stage.race(pairs))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("two"))
    stage.prepare()
    (ended,) = run_ranks(play, 1, stage.folder, None)
    for one in ended:
        assert one.status == 0, one.said
    return stage


def check(stage: Stage, output: Path, names: tuple[str, str], ended: tuple[Ended, Ended]) -> str | None:
    """What is wrong with how a pair ended; None if nothing is."""
    statuses = [one.status for one in ended]
    if sorted(map(bool, statuses)) != [False, True]:
        return f"statuses {statuses}"
    winner, loser = statuses.index(0), 1 - statuses.index(0)
    if "error: " not in ended[loser].said or "Traceback" in ended[loser].said or statuses[loser] < 0:
        return f"{names[loser]} has not said why"
    name = names[winner]
    alone = stage.folder / f"alone.{name}{winner if names[0] == names[1] else 0}"
    beside = [path.name for path in output.parent.iterdir() if path.suffix not in (".log", ".yaml")]
    if beside != ["output"]:
        return f"{beside} are there"
    if name in ("train", "resume"):
        ours, theirs = ([[line[key] for key in FIGURES] for line in metrics(run)] for run in (output, alone))
        if ours != theirs:
            return "other losses or digests"
        if sorted(path.name for path in output.iterdir()) != sorted(path.name for path in alone.iterdir()):
            return f"other files: {sorted(path.name for path in output.iterdir())}"
        ours, theirs = (files(run / "checkpoints") for run in (output, alone))
        weights = f"step-{STEPS:08d}/weights.safetensors"
        return None if ours[weights] == theirs[weights] and ours.keys() == theirs.keys() else "other checkpoints"
    ours, theirs = files(output), files(alone)
    return None if ours == theirs else f"other files: {sorted(ours)}"


def test_one_of_two_commands_has_the_folder(stage: Stage, request: pytest.FixtureRequest) -> None:
    starts = 20 if request.config.getoption("--whole-survival") else 2
    chance = random.Random(5)
    # The first start of each pair is at the same time, in the next ones they take turns to be first.
    apart = [0.0, *((-1) ** n * chance.uniform(0, APART) for n in range(1, starts))]
    pairs = [(one, two, later) for one, two in PAIRS for later in apart]
    (ended,) = run_ranks(play, 1, stage.folder, pairs, timeout=3600)
    wrong = []
    winners: dict[str, list[str]] = {}
    for number, ((one, two, later), both) in enumerate(zip(pairs, ended, strict=True)):
        if (fault := check(stage, stage.folder / f"{number}" / "output", (one, two), both)) is not None:
            named = zip((one, two), both, strict=True)
            said = "\n".join(f"{name}: {end.status}: {end.said[-1500:]}" for name, end in named)
            wrong.append(f"{one} and {two}, {later:.2f} s apart: {fault}\n{said}")
        winners.setdefault(f"{one} and {two}", []).append("first" if both[0].status == 0 else "second")
    print(json.dumps(winners))
    assert not wrong, "\n\n".join(wrong)
