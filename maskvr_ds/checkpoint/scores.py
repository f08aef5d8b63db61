"""Scores of downstream tasks for the card of an export: the rows of a results.json of `maskvr evaluate` that are of the
very same model, by the digest of its files."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskvr_ds.runtime.files import parse_json, sha256

RESULTS = "results.json"
# Files that decide what a model computes.
_DECISIVE = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
# Rows of the table that need no encoder.
_BASELINES = ("majority", "bag of words")


class ScoresError(ValueError):
    """The file has no scores of this model."""


@dataclass(frozen=True)
class Score:
    """Mean and sample standard deviation (None: one run) of a metric over `runs` seeds, as fractions.

    trained_on: examples. baselines: means by name. first: the intermediate task of a two-stage fine-tuning.
    """

    task: str
    metric: str
    mean: float
    std: float | None
    runs: int
    trained_on: int
    baselines: dict[str, float]
    first: str | None = None


def model_digest(folder: Path) -> str:
    """SHA-256 of the weights, configuration and tokenizer of a model's folder; names and contents of the files."""
    paths = sorted({path for pattern in _DECISIVE for path in folder.glob(pattern)})
    return hashlib.sha256(json.dumps([(path.name, sha256(path)) for path in paths]).encode()).hexdigest()


def read_scores(path: Path, digest: str) -> list[Score]:
    """Scores of the model with this digest. path: results.json, or the folder of an evaluation.

    Raises ScoresError if it is not such a file, or has none of this model.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        tasks = parse_json(file.read_bytes())["tasks"]
        reports = [(task, report, row) for task, report in tasks.items() for row in report["rows"].values()]
        found = [
            score for task, report, row in reports if row["model"] == digest for score in _scores(task, report, row)
        ]
    except FileNotFoundError:
        raise ScoresError(f"{file}: not found; expected the --output folder of `maskvr evaluate`") from None
    except KeyError as error:
        if error.args == ("model",):
            raise ScoresError(
                f"{file}: does not say which weights were evaluated, as it is of an earlier version; run the same "
                "`maskvr evaluate` again, which keeps its finished runs"
            ) from None
        raise ScoresError(f"{file}: not a results.json of `maskvr evaluate` (no {error})") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ScoresError(f"{file}: not a results.json of `maskvr evaluate` ({error})") from None
    if not found:
        raise ScoresError(
            f"{file}: has no scores of this checkpoint: the models in it have other weights, settings or tokenizers. "
            "Evaluate the checkpoint, or its run while this is the newest one"
        )
    # One model may have been evaluated under two names: as a run and as its export.
    return list({(score.task, score.metric, score.first): score for score in found}.values())


def _scores(task: str, report: dict[str, Any], row: dict[str, Any]) -> list[Score]:
    found = []
    first = ((row.get("settings") or {}).get("intermediate") or {}).get("task")
    for metric, score in row["scores"].items():
        if score["mean"] is None or not math.isfinite(score["mean"]):
            continue  # a run diverged
        means = {name: report["rows"][name]["scores"][metric]["mean"] for name in _BASELINES if name in report["rows"]}
        baselines = {name: mean for name, mean in means.items() if mean is not None}
        runs, examples = len(score["runs"]), report["data"]["train"]
        found.append(Score(task, metric, score["mean"], score["std"], runs, examples, baselines, first))
    return found
