"""Only a folder that a run has marked is a run's; everything else is left as it is."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.__main__ import main as cluster
from maskvr_ds.cli.main import main
from maskvr_ds.config import dump_config, load_config
from maskvr_ds.run_folder import fence
from maskvr_ds.run_folder.layout import CHECKPOINTS, CONFIG, HEARTBEATS, LOSS_PLOT, METRICS, ORIGIN, OWNER, ROLLBACKS
from maskvr_ds.run_folder.marks import is_run, output_fault, place_fault
from tests.support.corpora import make_corpus

# Names that a run uses too.
NAMES = (CONFIG, METRICS, ORIGIN, ROLLBACKS, LOSS_PLOT, "stopped.json", "completed.json", "README.md", ".git")
FOLDERS = (HEARTBEATS, "tensorboard", "csv", "src")
CONTENTS = ("", "mine\n", "{}", '{"name": "me"}', "[1, 2]", "seed: 1\n", "# schema: 2\nseed: 1\n", "\x00")


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


@given(
    st.dictionaries(st.sampled_from((*NAMES, OWNER)), st.sampled_from(CONTENTS)),
    st.sets(st.sampled_from(FOLDERS), min_size=1),
)
def test_a_folder_of_ones_own_is_no_run(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str], folders: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("mine")
    for name, text in files.items():
        (folder / name).write_text(text)
    for name in folders:
        (folder / name).mkdir()
        (folder / name / "data").write_text("precious")
    assert not is_run(folder)
    for resume in (None, "auto", "elsewhere"):
        assert "not a run's folder" in (output_fault(folder, resume) or "")


def marked(folder: Path, mark: str) -> None:
    if mark == "owner":
        fence.take(folder, ranks=1)
    elif mark == "config":
        (folder / CONFIG).write_text(dump_config(load_config("demo_cpu")))
    else:
        checkpoint = folder / CHECKPOINTS / "step-00000004"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text("{}")
    (folder / METRICS).write_text('{"step": 1}\n')


@pytest.mark.parametrize("mark", ["owner", "config", "checkpoint"])
def test_what_marks_a_run(mark: str, tmp_path: Path) -> None:
    marked(tmp_path, mark)
    assert is_run(tmp_path)
    assert output_fault(tmp_path, "auto") is None
    assert "add --resume auto" in (output_fault(tmp_path, None) or "")


def test_what_is_there_before_a_run(tmp_path: Path) -> None:
    assert output_fault(tmp_path / "new", None) is None
    assert output_fault(tmp_path, None) is None
    for name in ("slurm", "logs", CHECKPOINTS):
        (tmp_path / name).mkdir()
    assert output_fault(tmp_path, None) is None
    (tmp_path / "file").touch()
    assert "is a file, a folder expected" in (output_fault(tmp_path / "file", "auto") or "")


def test_every_command_leaves_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """shared/cases/04: a config.yaml, a metrics.jsonl and a folder heartbeats/ of one's own, output_dir: ."""
    corpus = make_corpus(tmp_path / "corpus", rows=10, words=10)
    mine = tmp_path / "mine"
    (mine / "heartbeats").mkdir(parents=True)
    (mine / "heartbeats" / "data").write_text("precious")
    (mine / "metrics.jsonl").write_text('{"mine": 1}\n')
    # What a launcher removes before it starts ranks.
    (mine / "stop_requested").write_text("mine")
    (mine / "hosts").write_text("localhost slots=1\n")
    values = {"base": "demo_cpu", "output_dir": ".", "data": {"path": str(corpus)}, "evaluation": {"every_steps": 0}}
    (mine / "config.yaml").write_text(f"# mine\n{yaml.safe_dump(values)}")
    before = snapshot(mine)
    monkeypatch.chdir(mine)

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("subprocess.Popen", started)
    config = ["--config", "config.yaml"]
    for resume in ([], ["--resume", "auto"]):
        for run, command in (
            (main, ["train", "--num-gpus", "2"]),
            (main, ["train", "--hostfile", "hosts"]),
            (cluster, ["launch", "--hostfile", "hosts"]),
        ):
            assert run([*command, *config, *resume]) == 1
            assert "not a run's folder" in capsys.readouterr().err
    assert cluster(["slurm", *config, "--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1"]) == 1
    assert "not a run's folder" in capsys.readouterr().err
    assert snapshot(mine) == before


def test_owner_json_of_another_program(tmp_path: Path) -> None:
    """It is not overwritten: the fence names it."""
    (tmp_path / OWNER).write_text(json.dumps({"name": "me"}))
    with pytest.raises(fence.FencedError, match=r"owner\.json: damaged"):
        fence.take(tmp_path, ranks=1)
    assert json.loads((tmp_path / OWNER).read_text()) == {"name": "me"}


@pytest.mark.parametrize(
    ("make", "name", "fault"),
    [
        (lambda folder: None, "new/run", None),
        (lambda folder: (folder / "file").touch(), "file", "is a file, a folder expected"),
        (lambda folder: (folder / "file").touch(), "file/run", "file is a file, a folder expected"),
        (lambda folder: (folder / "link").symlink_to("nowhere"), "link", "is a link that leads nowhere"),
        (lambda folder: None, "x" * 300, "File name too long"),
    ],
)
def test_places_where_no_folder_can_be(
    tmp_path: Path, make: Callable[[Path], object], name: str, fault: str | None
) -> None:
    make(tmp_path)
    found = place_fault(tmp_path / name)
    assert found == fault or (fault is not None and found is not None and fault in found)
    assert found == output_fault(tmp_path / name, "auto")
