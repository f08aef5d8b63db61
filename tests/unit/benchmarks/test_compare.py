"""Curves and comparisons from hand-written metrics.jsonl files."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from maskvr_ds.benchmarks.compare import check_same, compare, curve, plan, plot, reached, table
from maskvr_ds.config import ConfigError, load_config
from maskvr_ds.config.loading import recipe_text
from tests.support.corpora import make_corpus

POINTS = [(10, 5.0, 4.0), (20, 9.0, 3.0), (30, 15.0, 3.5), (40, 21.0, 2.0)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(4.5, (10, 5)), (4.0, (10, 5)), (3.25, (17.5, 8)), (3.0, (20, 9)), (2.75, (35, 18)), (2.0, (40, 21)), (1.9, None)],
)
def test_first_time_at_the_target(target: float, expected: tuple[float, float] | None) -> None:
    found = reached(POINTS, target)
    assert found == (expected if expected is None else pytest.approx(expected))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", length=16)
    make_corpus(folder / "held_out", rows=20, length=16)
    return folder


def arguments(tmp_path: Path, corpus: Path, **others: object) -> Namespace:
    values = {
        "config": "demo_cpu",
        "assignments": [f"data.path={corpus}", "training.steps=60"],
        "strategies": ["uniform", "span:max_length=3"],
        "seeds": [0, 1],
        "output": str(tmp_path / "out"),
        "target": None,
        "num_gpus": None,
    }
    return Namespace(**(values | others))


def write_run(folder: Path, losses: list[float], seconds: float, *, done: bool = True) -> None:
    """Write a run with an evaluation every 20 steps."""
    checkpoint = folder / "checkpoints" / f"step-{20 * len(losses):08d}"
    checkpoint.mkdir(parents=True)
    if done:
        (checkpoint / "checkpoint.json").touch()
    lines = []
    for step in range(1, 20 * len(losses) + 1):
        line = {"step": step, "step_seconds": seconds}
        if step % 20 == 0:
            line["held_out_loss"] = losses[step // 20 - 1]
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_comparison_seed_by_seed(tmp_path: Path, corpus: Path) -> None:
    jobs = plan(arguments(tmp_path, corpus))
    assert [(job.spec.text, job.seed) for job in jobs] == [
        ("uniform", 0),
        ("span:max_length=3", 0),
        ("uniform", 1),
        ("span:max_length=3", 1),
    ]
    assert jobs[3].config.seed == 1
    assert jobs[3].config.masking.span.max_length == 3
    assert jobs[3].folder == tmp_path / "out" / "runs" / "span_max_length=3" / "seed-1"
    write_run(jobs[0].folder, [5.0, 4.0, 3.0], 1.0)
    write_run(jobs[1].folder, [4.0, 2.0, 2.5], 2.0)
    write_run(jobs[2].folder, [5.0, 3.0, 2.0], 1.0)
    write_run(jobs[3].folder, [5.0, 4.0, 2.4], 1.0)
    assert curve(jobs[1].folder) == [(20, 40.0, 4.0), (40, 80.0, 2.0), (60, 120.0, 2.5)]
    result = compare(jobs, None)
    uniform, span = result["strategies"].values()
    assert uniform["fewer_steps"] == {"mean": 1, "min": 1, "max": 1}
    assert uniform["final"] == {"mean": 2.5, "min": 2, "max": 3}
    assert (span["reached"], span["seeds"]) == (1, 2)
    assert span["difference"]["mean"] == pytest.approx(-0.05)
    first, second = span["runs"]
    assert (first["target"], second["target"]) == (3.0, 2.0)
    assert first["steps_to_target"] == pytest.approx(30)
    assert (first["fewer_steps"], first["less_time"]) == (pytest.approx(2), pytest.approx(1))
    # It ended at 2.4, which the baseline had after 52 of the 60 steps.
    assert second["steps_to_target"] is None
    assert (second["fewer_steps"], second["less_time"]) == (pytest.approx(52 / 60), pytest.approx(52 / 60))
    text = table(result)
    assert "span:max_length=3  2.450 [2.400, 2.500]  -0.050 [-0.500, 0.400]  1/2" in text
    assert "[minimum, maximum] over seeds. fewer steps ×, less time ×: what uniform needs to reach" in text
    absolute = compare(jobs, 4.0)["strategies"]["span:max_length=3"]
    assert [run["steps_to_target"] for run in absolute["runs"]] == [20, 40]
    plot(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_measurements_of_auto_count_as_time(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [4.0, 3.0], 1.0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    lines.insert(20, json.dumps({"event": "auto", "step": 20, "seconds": 5.0}) + "\n")
    lines.insert(30, json.dumps({"event": "checkpoint", "step": 29, "seconds": 7.0}) + "\n")
    metrics.write_text("".join(lines))
    assert curve(tmp_path / "run") == [(20, 20.0, 4.0), (40, 45.0, 3.0)]


def test_incomplete_runs_do_not_count(tmp_path: Path, corpus: Path) -> None:
    jobs = plan(arguments(tmp_path, corpus))
    write_run(jobs[0].folder, [5.0, 4.0, 3.0], 1.0)
    write_run(jobs[1].folder, [5.0, 4.0, 3.0], 1.0, done=False)
    write_run(jobs[3].folder, [5.0, 4.0, 3.0], 1.0)  # its baseline is missing
    result = compare(jobs, None)
    assert [found["seeds"] for found in result["strategies"].values()] == [1, 0]
    assert "span:max_length=3  –" in table(result)
    plot(result, tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"seeds": [0, 1, 0]}, "--seeds 0 1 0: a seed is listed twice"),
        ({"strategies": ["uniform", "oracle_head"]}, "oracle_head: oracles cannot be used in training"),
        ({"strategies": ["uniform", "span:max_length=0"]}, "span.max_length"),
        ({"strategies": ["span:rate=0.2", "span::rate=0.2"]}, "two names differ only in punctuation"),
    ],
)
def test_faults_before_the_first_run(tmp_path: Path, corpus: Path, others: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(arguments(tmp_path, corpus, **others))
    assert not (tmp_path / "out").exists()


def test_output_folder_may_have_any_name(tmp_path: Path, corpus: Path) -> None:
    options = arguments(tmp_path, corpus)
    options.output = str(tmp_path / "a: #1")
    jobs = plan(options)
    assert all(job.config.output_dir == job.folder for job in jobs)
    assert all(job.folder.is_relative_to(options.output) for job in jobs)


def test_no_held_out_losses(tmp_path: Path, corpus: Path) -> None:
    options = arguments(tmp_path, corpus)
    options.assignments.append("evaluation.every_steps=0")
    with pytest.raises(ConfigError, match="comparison needs held-out losses"):
        plan(options)


def test_a_run_with_different_settings_is_refused(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(recipe_text("demo_cpu"))
    check_same(path, load_config("demo_cpu", ["output_dir=elsewhere"]))
    with pytest.raises(ConfigError, match=r"optimizer.lr 0.01 -> 0.5, training.steps 800 -> 70\); use another"):
        check_same(path, load_config("demo_cpu", ["optimizer.lr=0.5", "training.steps=70"]))
