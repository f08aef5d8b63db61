"""Downstream scores in the card of an export: those of the exported weights, or an error."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from maskvr_ds.checkpoint.scores import read_scores
from maskvr_ds.cli import main

OLD = Path(__file__).parents[2] / "data" / "acf4fb5" / "run_zero0"
TASK = ("--tasks", "classification", "--text-columns", "text", "--learning-rates", "1e-3", "--seeds", "2")
EVALUATE = (*TASK, "--epochs", "1", "--max-length", "12", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and scores of it beside those of another model."""
    folder = tmp_path_factory.mktemp("scores")
    run = Path(shutil.copytree(OLD, folder / "run"))
    (folder / "data").mkdir()
    for name, number in (("train", 24), ("dev", 10)):
        lines = [{"text": "the file" if i % 2 else "a value", "label": "AB"[i % 2]} for i in range(number)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert main(["export", "--checkpoint", str(run), "--output", str(folder / "other")]) == 0
    config = folder / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"hidden_act": "relu"}), encoding="utf-8")
    models = (str(run), str(folder / "other"))
    assert main(["evaluate", *models, *EVALUATE, "--data", str(folder / "data"), "--output", str(folder / "both")]) == 0
    return folder


def scores_of(folder: Path, model: Path) -> dict[str, float]:
    report = json.loads((folder / "both" / "results.json").read_bytes())["tasks"]["classification"]
    return {metric: score["mean"] for metric, score in report["rows"][str(model)]["scores"].items()}


def test_the_card_has_the_scores_of_these_weights(folder: Path) -> None:
    output = folder / "model"
    words = ("export", "--checkpoint", str(folder / "run"), "--output", str(output))
    assert main([*words, "--scores", str(folder / "both")]) == 0
    card = ModelCard.load(output / "README.md")
    found = {r.metric_type: r.metric_value for r in card.data.eval_results or () if r.dataset_type == "classification"}
    expected = scores_of(folder, folder / "run")
    assert found == pytest.approx(expected, abs=1e-6)
    (accuracy,) = [line for line in card.text.splitlines() if line.startswith("| classification | accuracy |")]
    cells = [cell.strip() for cell in accuracy.strip("|").split("|")]
    assert cells[2] == "24"
    assert cells[-2].split(" ± ")[0] == f"{100 * expected['accuracy']:.1f}"
    assert cells[-1] == "2"
    assert "| majority | bag of words | this model |" in card.text


def test_a_model_that_was_evaluated_under_two_names_is_listed_once(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "both" / "results.json").read_bytes())
    rows = content["tasks"]["classification"]["rows"]
    rows["its export"] = rows[str(folder / "run")]
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    found = read_scores(tmp_path, rows["its export"]["model"])
    assert [score.metric for score in found] == ["accuracy", "macro_f1"]


def test_the_card_names_the_intermediate_task(folder: Path, tmp_path: Path) -> None:
    """Scores of a two-stage fine-tuning are not those of the task alone."""
    content = json.loads((folder / "both" / "results.json").read_bytes())
    content["tasks"]["classification"]["rows"][str(folder / "run")]["settings"]["intermediate"] = {"task": "mnli"}
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    words = ("export", "--checkpoint", str(folder / "run"), "--output", str(tmp_path / "model"))
    assert main([*words, "--scores", str(tmp_path)]) == 0
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "| classification, first on mnli | accuracy |" in card.text
    names = [r.metric_name for r in card.data.eval_results or () if r.dataset_type == "classification"]
    assert all(str(name).endswith("fine-tuned, first on mnli") for name in names)


def test_an_export_is_the_model_that_was_evaluated_as_a_run(folder: Path, tmp_path: Path) -> None:
    words = ("export", "--checkpoint", str(folder / "run"), "--output", str(tmp_path / "model"))
    assert main(list(words)) == 0
    again = ("evaluate", str(tmp_path / "model"), *EVALUATE, "--data", str(folder / "data"))
    assert main([*again, "--output", str(tmp_path / "scores")]) == 0
    words = ("export", "--checkpoint", str(folder / "run"), "--output", str(tmp_path / "second"))
    assert main([*words, "--scores", str(tmp_path / "scores" / "results.json")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["rows"].pop(list(report["rows"])[2]), "has no scores of this checkpoint"),
        (lambda report: [row.pop("model") for row in report["rows"].values()], "of an earlier version"),
        (lambda report: report.pop("rows"), "not a results.json of `maskvr evaluate` (no 'rows')"),
        (None, "not a results.json of `maskvr evaluate`"),
    ],
)
def test_scores_of_something_else(
    folder: Path, tmp_path: Path, change: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    content = json.loads((folder / "both" / "results.json").read_bytes())
    if callable(change):
        change(content["tasks"]["classification"])
    path.write_text(json.dumps(content) if change else "[", encoding="utf-8")
    words = ("export", "--checkpoint", str(folder / "run"), "--output", str(tmp_path / "model"))
    assert main([*words, "--scores", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert f"error: {path}: " in errors
    assert message in errors
    assert not (tmp_path / "model").exists()


def test_a_folder_without_scores(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("export", "--checkpoint", str(folder / "run"), "--output", str(tmp_path / "model"))
    assert main([*words, "--scores", str(tmp_path)]) == 1
    assert "results.json: not found; expected the --output folder" in capsys.readouterr().err
