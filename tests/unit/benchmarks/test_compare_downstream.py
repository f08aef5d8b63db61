"""Fine-tuned scores in a comparison: from a hand-written results.json; faults before the first run."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from maskvr_ds.benchmarks import compare_downstream
from maskvr_ds.benchmarks.compare import plot, table
from maskvr_ds.config import RunConfig, load_config
from tests.support.tasks import results, save_model, write_sst2

OPTIONS = (
    "data",
    "seeds",
    "learning_rates",
    "epochs",
    "batch_size",
    "max_length",
    "precision",
    "max_train",
    "text_columns",
    "label_column",
    "jobs",
)


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
    evaluation = compare_downstream.check(given, [config])
    assert evaluation is not None
    request = evaluation.request
    assert request.output == tmp_path / "out" / "downstream"
    runs = {(name, seed): tmp_path / name / str(seed) for name in ("uniform", "span") for seed in (0, 1)}
    means = {("uniform", 0): 0.6, ("uniform", 1): 0.7, ("span", 0): 0.65, ("span", 1): None}
    rows = {str(runs[key]): entry(mean) for key, mean in means.items()}
    request.output.mkdir(parents=True)
    content = {"tasks": {"sst2": {"rows": {"majority": entry(0.5), "bag of words": entry(0.8), **rows}}}}
    (request.output / "results.json").write_text(json.dumps(content), encoding="utf-8")
    found = compare_downstream.scores(evaluation, runs, "uniform")
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


def continued(model: Path, output: Path) -> RunConfig:
    return load_config("demo_cpu", [f"output_dir={output}", "model={}", f"model.initialize_from={model}"])


def test_models_that_runs_start_from(tmp_path: Path) -> None:
    one, two = (save_model(tmp_path / name, seed=i) for i, name in enumerate(("one", "two")))
    given = arguments(
        tmp_path,
        downstream=["sst2"],
        downstream_data=str(write_sst2(tmp_path / "glue")),
        downstream_max_length=16,
        downstream_seeds=1,
        downstream_learning_rates=[1e-3],
    )
    configs = [continued(one, tmp_path), continued(one, tmp_path)]
    evaluation = compare_downstream.check(given, configs)
    assert evaluation is not None
    assert compare_downstream.evaluate(evaluation, [two]) is None
    [column] = compare_downstream.scores(evaluation, {("uniform", 0): two}, "uniform").values()
    stored = results(tmp_path / "out" / "downstream", "sst2")["rows"]
    assert column["baselines"]["initial weights"] == stored[str(one)]["scores"]["accuracy"]["mean"]
    assert column["strategies"]["uniform"]["score"]["mean"] == stored[str(two)]["scores"]["accuracy"]["mean"]
    several = compare_downstream.check(given, [*configs, continued(two, tmp_path)])
    assert several is not None
    assert list(several.baselines.items())[2:] == [(f"initial weights {m}", str(m)) for m in (one, two)]

    (two / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="two: has no tokenizer"):
        compare_downstream.check(given, [continued(two, tmp_path)])


def test_a_score_is_missing(tmp_path: Path) -> None:
    """Fine-tuning of the initial weights failed: a dash, and no line in the picture."""
    means = {"majority": 0.5, "bag of words": 0.8, "initial weights": None}
    entry = {"score": None, "difference": None, "runs": []}
    lines = compare_downstream.lines({"accuracy": {"baselines": means, "strategies": {"uniform": entry}}})
    assert lines[-2:] == [("bag of words", "80.0", "–"), ("initial weights", "–", "–")]
    figure, panel = plt.subplots()
    found = {"accuracy": {"baselines": means, "strategies": {"uniform": entry}}}
    compare_downstream.draw([panel], found, ["uniform"], ["uniform"])
    labels = [line.get_label() for line in panel.lines if len(set(line.get_xdata())) == 1]
    assert labels == ["majority: 50.0", "bag of words: 80.0"]
    plt.close(figure)


def test_a_far_majority_does_not_squash_the_picture() -> None:
    entry = {"score": {"mean": 0.56}, "runs": [{"score": 0.55}, {"score": 0.57}]}
    baselines = {"majority": 0.02, "bag of words": 0.51, "initial weights": 0.54}
    found = {"accuracy": {"baselines": baselines, "strategies": {"uniform": entry}}}
    figure, panel = plt.subplots()
    compare_downstream.draw([panel], found, ["uniform"], ["uniform"])
    low, high = panel.get_xlim()
    assert 45 < low < 51
    assert 57 < high < 60
    assert "majority: 2.0" in panel.get_legend_handles_labels()[1]
    plt.close(figure)


def test_own_files(tmp_path: Path, config: RunConfig) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("title\ttopic\na\tx\nb\ty\n" * 20, encoding="utf-8")
    given = {
        "downstream": ["classification"],
        "downstream_data": str(tmp_path),
        "downstream_max_length": 64,
        "downstream_text_columns": ["title"],
        "downstream_label_column": "topic",
        "downstream_precision": "bf16",
    }
    evaluation = compare_downstream.check(arguments(tmp_path, **given), [config])
    assert evaluation is not None
    request = evaluation.request
    assert [(task.texts, task.label) for task in request.tasks] == [((("title",),), ("topic",))]
    assert request.protocol.precision == "bf16"


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
