"""Fine-tuned scores in a comparison: from a hand-written results.json; faults before the first run."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.benchmarks import compare_downstream
from maskvr_ds.benchmarks.compare import plot, table
from maskvr_ds.config import RunConfig, load_config
from tests.support.tasks import write_sst2

OPTIONS = ("data", "seeds", "learning_rates", "epochs", "batch_size", "max_length", "max_train", "jobs")


def arguments(tmp_path: Path, **given: Any) -> Namespace:
    values = {f"downstream_{name}": None for name in OPTIONS} | {"downstream": None, "output": str(tmp_path / "out")}
    return Namespace(**(values | given))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config("demo_cpu", [f"output_dir={tmp_path}", "model.max_position_embeddings=64"])


def entry(mean: float | None) -> dict[str, Any]:
    return {"scores": {"accuracy": {"mean": mean, "std": 0.01, "runs": [mean]}}}


def test_scores_by_strategy_and_seed(tmp_path: Path, config: RunConfig) -> None:
    data = write_sst2(tmp_path / "glue")
    given = arguments(tmp_path, downstream=["sst2"], downstream_data=str(data), downstream_max_length=64)
    request = compare_downstream.check(given, [config])
    assert request is not None
    assert request.output == tmp_path / "out" / "downstream"
    runs = {(name, seed): tmp_path / name / str(seed) for name in ("uniform", "span") for seed in (0, 1)}
    means = {("uniform", 0): 0.6, ("uniform", 1): 0.7, ("span", 0): 0.65, ("span", 1): None}
    rows = {str(runs[key]): entry(mean) for key, mean in means.items()}
    request.output.mkdir(parents=True)
    content = {"tasks": {"sst2": {"rows": {"majority": entry(0.5), "bag of words": entry(0.8), **rows}}}}
    (request.output / "results.json").write_text(json.dumps(content), encoding="utf-8")
    found = compare_downstream.scores(request, runs, "uniform")
    column = found["sst2 accuracy"]
    assert column["baselines"] == {"majority": 0.5, "bag of words": 0.8}
    uniform, span = column["strategies"]["uniform"], column["strategies"]["span"]
    assert uniform["score"] == {"mean": pytest.approx(0.65), "min": 0.6, "max": 0.7}
    assert uniform["difference"] == {"mean": 0, "min": 0, "max": 0}
    # Its second run diverged.
    assert span["difference"]["mean"] == pytest.approx(0.05)
    assert [run["seed"] for run in span["runs"]] == [0]
    figures = ("final", "difference", "fewer_steps", "less_time")
    run = {"seed": 0, "curve": [(10, 1.0, 4.0), (20, 2.0, 3.0)], **dict.fromkeys(figures, 1.0)}
    losses = {"reached": 1, "seeds": 1, "runs": [run], **dict.fromkeys(figures)}
    result = {"baseline": "uniform", "strategies": {"uniform": losses, "span": losses}, "downstream": found}
    text = table(result).splitlines()
    assert [line.split() for line in text[-4:-2]] == [
        ["uniform", "65.0", "[60.0,", "70.0]", "0.0", "[0.0,", "0.0]"],
        ["span", "65.0", "[65.0,", "65.0]", "5.0", "[5.0,", "5.0]"],
    ]
    assert [line.split() for line in text[-2:]] == [["majority", "50.0", "–"], ["bag", "of", "words", "80.0", "–"]]
    plot(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            (
                {f"downstream_{name}": 1},
                f"--downstream-{name.replace('_', '-')}: no task is evaluated; add --downstream",
            )
            for name in OPTIONS
        ),
        ({"downstream": ["sst2"]}, "--downstream-data is required"),
        ({"downstream": ["sst2"], "downstream_data": "nowhere"}, "nowhere"),
        (
            {"downstream": ["sst2"], "downstream_data": "glue"},
            "sst2: reads 128 tokens, the model has 64 positions",
        ),
    ],
)
def test_faults_before_the_first_run(
    tmp_path: Path, config: RunConfig, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue")
    with pytest.raises(ValueError, match=message):
        compare_downstream.check(arguments(tmp_path, **given), [config])
    assert compare_downstream.check(arguments(tmp_path), [config]) is None
    assert not (tmp_path / "out").exists()
