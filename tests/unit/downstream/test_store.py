"""Output folders: whose they are, and one command at a time."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.downstream import command, evaluation
from maskvr_ds.downstream.examples import TaskData
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.store import RunStore, opened
from maskvr_ds.downstream.tasks import GLUE, TaskError
from tests.support.tasks import results, write_sst2
from tests.unit.downstream.test_evaluation import StandIn, encoder, request


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    return read_task(GLUE["sst2"], write_sst2(tmp_path / "data", train=300))


def test_a_foreign_folder_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(TaskError, match="is no folder of an evaluation"):
            RunStore(path)


def test_a_folder_of_training_runs_is_not_written_to(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--output .` where training runs are in ./runs: neither they nor a results.json of one's own are touched."""
    home = tmp_path / "home"
    for name in ("runs/base/checkpoints", "other/runs"):
        (home / name).mkdir(parents=True)
    (home / "other" / "results.json").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(command, "read", lambda _: ([data], None))
    for folder in (home, home / "other"):
        with pytest.raises(TaskError, match="is no folder of an evaluation"):
            command.evaluate(["model"], request(data, folder))
    assert [path.name for path in (home / "runs").iterdir()] == ["base"]
    assert (home / "other" / "results.json").read_text(encoding="utf-8") == "mine"


def test_one_command_at_a_time(data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one says so and computes nothing; the lock ends with the first."""
    output = tmp_path / "o"
    stand_in = StandIn(data)
    monkeypatch.setattr(evaluation, "fine_tune", stand_in)
    monkeypatch.setattr(command, "read", lambda _: ([data], None))

    @contextmanager
    def encoders(*_: Any) -> Iterator[list[Encoder]]:
        yield [encoder()]

    monkeypatch.setattr(command, "_encoders", encoders)
    with opened(output):
        for call in (
            lambda: command.evaluate(["model"], request(data, output)),
            lambda: command.finetune("model", request(data, output), 0),
        ):
            with pytest.raises(TaskError, match="another command is writing to it"):
                call()
    assert stand_in.calls == []
    assert not (output / "results.json").exists()
    command.evaluate(["model"], request(data, output))
    assert results(output, "sst2")["rows"].keys() == {"majority", "bag of words", "model"}


@pytest.mark.parametrize("letter", ["a", "é", "数", "𠀀"])
def test_long_names_of_models(letter: str, tmp_path: Path) -> None:
    """A name of a folder has at most 255 bytes, of which a run's label must leave some: known when it is stored."""
    store = RunStore(tmp_path / "o")
    label = f"{letter * (255 // len(letter.encode()))}-final-1e-05-seed0"
    identity = {"task": "sst2", "seed": 0}
    assert store.get(label, identity, dict) == ({"identity": {"format": 1, **identity}}, False)
    (path,) = (tmp_path / "o" / "runs" / "sst2").iterdir()
    assert "-final-1e-05-seed0-" in path.name
    assert store.get(label, identity, dict)[1]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("models/bert", "bert-final-1e-05-seed0"),
        ("out/runs/uniform/seed-1", "uniform/seed-1-final-1e-05-seed0"),
        ("runs/a/checkpoints/step-00000100", "a/step-00000100-final-1e-05-seed0"),
        ("seed-1", "seed-1-final-1e-05-seed0"),
    ],
)
def test_labels_tell_runs_of_several_strategies_apart(name: str, label: str) -> None:
    found = evaluation.Run("final", 1e-5, 0).label(dataclasses.replace(encoder(), name=name))
    assert found == label
