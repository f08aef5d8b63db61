"""Task folders of `datasets` and Parquet files: class indices, damaged folders, forms that contradict each other."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.tasks import GLUE, TaskError, resolve

(OWN,) = resolve(["classification"])


@pytest.mark.parametrize("names", [("entailment", "not_entailment"), ("not_entailment", "entailment"), None])
def test_datasets_folders(tmp_path: Path, names: tuple[str, ...] | None) -> None:
    """save_to_disk, and Parquet as on the hub: class indices are read by their stored names, or in the task's order."""
    values = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [0, 1], "idx": [0, 1]}
    features = datasets.Features({key: datasets.Value("string" if key.startswith("s") else "int64") for key in values})
    if names:
        features["label"] = datasets.ClassLabel(names=list(names))
    part = datasets.Dataset.from_dict(values, features=features)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "disk" / "rte")
    for stem in ("train", "validation"):
        (tmp_path / "hub" / "rte").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / "hub" / "rte" / f"{stem}-00000-of-00001.parquet")
    for form in ("disk", "hub"):
        data = read_task(GLUE["rte"], tmp_path / form)
        assert data.train == Split((("a", "b"), ("c", "d")), names or ("entailment", "not_entailment"))


def _listing(name: str) -> str:
    return json.dumps({"_data_files": [{"filename": name}]})


@pytest.mark.parametrize(
    "content", ["{}", "no JSON", '{"_data_files": [1]}', "[]", _listing(".."), _listing("../dev/a.arrow"), _listing("")]
)
def test_damaged_folders_of_datasets(tmp_path: Path, content: str) -> None:
    for name in ("train", "dev"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=r"train/state.json: is not as save_to_disk of datasets writes it"):
        read_task(OWN, tmp_path)


def test_datasets_saved_with_an_indices_mapping(tmp_path: Path) -> None:
    """As earlier versions of `datasets` saved them after select or shuffle: the file has other rows."""
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict({"train": part, "dev": part}).save_to_disk(tmp_path)
    assert len(read_task(OWN, tmp_path).train) == 2
    state = json.loads((tmp_path / "train/state.json").read_text())
    (tmp_path / "train/state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(TaskError, match="flatten_indices"):
        read_task(OWN, tmp_path)


@pytest.mark.parametrize(
    "other", ["train.csv", "train.tsv.gz", "train.parquet", "train-00000-of-00001.parquet", "train"]
)
def test_two_forms_of_a_part(tmp_path: Path, other: str) -> None:
    """They may differ."""
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("text\tlabel\na\tx\nb\ty\n")
    assert len(read_task(OWN, tmp_path).train) == 2
    if other == "train":
        (tmp_path / other).mkdir()
    else:
        (tmp_path / other).touch()
    with pytest.raises(TaskError, match=r"train\.tsv and train.*: remove one; both are train"):
        read_task(OWN, tmp_path)


@pytest.mark.parametrize("features", ["[1", "[]", '{"info": {"features": {"label": "string"}}}', '{"info": []}'])
def test_damaged_features_of_datasets(tmp_path: Path, features: str) -> None:
    """They may name the classes: not to be ignored."""
    table = pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata({"huggingface": features})
    for name in ("train", "dev"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(TaskError, match=r"train.parquet: the features of datasets in it are damaged"):
        read_task(OWN, tmp_path)
