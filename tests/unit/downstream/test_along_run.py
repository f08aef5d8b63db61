"""Scores along a run: which checkpoints, their seconds and tokens, the table and the picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.downstream import along_run
from maskvr_ds.downstream.along_run import Point, curve, select, table
from maskvr_ds.downstream.store import RunStore
from maskvr_ds.downstream.tasks import TaskError
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import CheckpointState

STATE = CheckpointState(
    step=0, samples=0, world_size=1, zero_stage=0, dtype="float32", partitions=[], identity={}, settings={}, phases=[]
)


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Checkpoints of steps 2, 4, 5 and 6 (damaged); a step has taken 0.5 seconds and 100 tokens."""
    folder = tmp_path / "run"
    for step in (2, 4, 5, 6):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "x.txt").write_text("x", encoding="utf-8")
        checkpoints.write_manifest(checkpoint, {**STATE.stored(), "step": step})
    (folder / "checkpoints" / "step-00000006" / "x.txt").write_text("y", encoding="utf-8")
    lines: list[dict[str, Any]] = [{"step": s, "step_seconds": 0.5, "tokens": 100 * s} for s in range(1, 6)]
    lines.insert(2, {"step": 2, "event": "checkpoint", "seconds": 99.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(("which", "steps"), [("all", [2, 4, 5]), ("every:2", [2, 4]), ("every:5", [5]), ("best", [4])])
def test_which_checkpoints(run: str, which: str, steps: list[int], caplog: pytest.LogCaptureFixture) -> None:
    (Path(run) / "checkpoints" / "best").write_text("step-00000004\n", encoding="utf-8")
    points = select([run], which)
    assert [(p.step, p.seconds, p.tokens) for p in points] == [(s, 0.5 * s, 100 * s) for s in steps]
    assert [Path(p.model).name for p in points] == [f"step-{step:08d}" for step in steps]
    assert "x.txt: the SHA-256 differs" in caplog.text


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("best", "has not recorded its best checkpoint, as checkpoint.keep_best was not set"),
        ("every:3", "has no such checkpoint; intact ones are of step 2, 4, 5"),
        ("every:0", "expected all, best or every:N"),
        ("last", "expected all, best or every:N"),
    ],
)
def test_refused(run: str, which: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        select([run], which)
    with pytest.raises(TaskError, match="is no run with checkpoints"):
        select([str(tmp_path)], which)


def entry(*runs: float) -> dict[str, Any]:
    spread = 0.1 if len(runs) > 1 else None
    return {"mean": sum(runs) / len(runs), "std": spread, "runs": list(runs)}


def test_a_checkpoint_whose_fine_tuning_failed(run: str, tmp_path: Path) -> None:
    """It has no score in the table, and no point in the picture; the others have theirs."""
    points = select([run], "all")
    rows = {name: {"scores": {"accuracy": entry(0.5)}} for name in ("majority", "bag of words")}
    rows |= {point.model: {"scores": {"accuracy": entry(0.75)}} for point in points[1:]}
    found = curve(points, {"sst2": {"rows": rows, "failed": {points[0].model: "killed"}}})
    assert [bool(point["scores"]) for point in found["runs"][run]] == [False, *[True] * (len(points) - 1)]
    lines = [line for line in table(found).splitlines() if line.startswith(f"| {run}")]
    assert [line.split("|")[-2].strip() for line in lines] == ["failed", *["75.0"] * (len(points) - 1)]
    along_run.plot(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5_000


def test_the_curve(run: str, tmp_path: Path) -> None:
    """Scores are those of the reports, by checkpoint; a diverged one and unknown seconds have no point."""
    points = [*select([run], "all"), Point("other", "other/step-7", 7, None, None)]
    scores = {p.model: entry(0.1 * i, 0.1 * i + 0.2) for i, p in enumerate(points, 5)}
    scores[points[1].model] = {"mean": None, "std": None, "runs": []}
    rows = {name: {"scores": {"accuracy": value}} for name, value in scores.items()}
    rows |= {"majority": {"scores": {"accuracy": entry(0.5)}}, "bag of words": {"scores": {"accuracy": entry(0.625)}}}
    reports = {"sst2": {"rows": rows}}
    found = curve(points, reports)
    assert [p["scores"]["sst2"]["accuracy"] for p in found["runs"][run]] == [scores[p.model] for p in points[:3]]
    assert found["baselines"]["sst2"]["bag of words"]["accuracy"]["mean"] == 0.625
    lines = table(found).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert cells[0] == ["run", "step", "seconds", "tokens", "sst2 accuracy"]
    assert cells[1:] == [
        [run, "2", "1.0", "200", "60.0 ± 10.0"],
        [run, "4", "2.0", "400", "diverged"],
        [run, "5", "2.5", "500", "80.0 ± 10.0"],
        ["other", "7", "–", "–", "90.0 ± 10.0"],
        ["majority", "–", "–", "–", "50.0"],
        ["bag of words", "–", "–", "–", "62.5"],
    ]
    text = along_run.write(RunStore(tmp_path / "o"), points, reports, "before\n")
    assert text.startswith("before\n")
    assert (tmp_path / "o" / "results.md").read_text(encoding="utf-8") == text
    assert json.loads((tmp_path / "o" / "curve.json").read_text(encoding="utf-8")) == found
    assert (tmp_path / "o" / "curve.png").read_bytes().startswith(b"\x89PNG")
