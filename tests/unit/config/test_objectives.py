"""Section `objectives`, alone and against the corpora of a run."""

from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.config import ConfigError, Objectives, RunConfig, dump_config, load_config
from maskvr_ds.training.references import file_faults, settings_faults
from tests.support.corpora import make_corpus
from tests.support.pairs import make_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for packing in ("nsp", "sop"):
        make_pairs(folder / packing, packing, rows=20)
        make_pairs(folder / packing / "held_out", packing, rows=20, seed=1)
    make_corpus(folder / "plain", rows=20, length=24, words=20)
    make_corpus(folder / "plain" / "held_out", rows=20, length=24, words=20)
    return folder


def run(folder: Path, corpus: str, **sections: Any) -> RunConfig:
    values = {"output_dir": "run", "data": {"path": str(folder / corpus)}, "training": {"steps": 2}}
    return RunConfig.model_validate({**values, **sections})


@pytest.mark.parametrize("given", [["mlm", "nsp"], {"nsp": 1.0}, {"mlm": 1, "nsp": 1, "sop": None}])
def test_names_and_weights_are_the_same_setting(given: Any) -> None:
    found = Objectives.model_validate(given)
    assert found == Objectives(mlm=1.0, nsp=1.0)
    assert (found.pair, found.pair_weight) == ("nsp", 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nsp"], "masked tokens are always trained; add mlm"),
        (["mlm", "rtd"], "rtd: unknown objective; there are mlm, nsp, sop"),
        ({"mlm": 1, "nps": 1}, "unknown key; known keys are mlm, nsp, sop"),
        ({"nsp": 1, "sop": 1}, "nsp and sop are both set"),
        ({"nsp": 0}, "greater than 0"),
        ({"nsp": True}, "expected a number, found true"),
        ("mlm", "a list of objectives or a mapping"),
    ],
)
def test_bad_sections(folder: Path, tmp_path: Path, given: Any, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: run\ndata: {{path: {folder / 'nsp'}}}\ntraining: {{steps: 2}}\nobjectives: {given!r}\n".replace(
            "True", "true"
        ),
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="objectives") as caught:
        load_config(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"architecture": "roberta"}}, "objectives.nsp: transformers has no roberta with a binary head"),
        ({"model": {"architecture": "modernbert"}}, "albert, bert, ernie"),
        ({"model": {"type_vocab_size": 1}}, "model.type_vocab_size is 1"),
        (
            {"model": {"architecture": "albert", "settings": {"type_vocab_size": 1}}},
            "model.settings.type_vocab_size is 1",
        ),
        ({"masking": {"strategy": "auto"}}, "masking.strategy auto compares"),
    ],
)
def test_models_and_masks_that_cannot_train_pairs(folder: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="objectives") as caught:
        run(folder, "nsp", objectives=["mlm", "nsp"], **sections)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("corpus", "objectives", "message"),
    [
        ("nsp", None, "has labels of sentence pairs (packing nsp), and no objective is set for them"),
        ("sop", ["mlm", "nsp"], "the corpus has the pairs of sop"),
        ("plain", ["mlm", "sop"], "the corpus has no pair labels (packing full_sequences)"),
        ("nsp", ["mlm"], None),
        ("nsp", ["mlm", "nsp"], None),
        ("plain", None, None),
        ("plain", ["mlm"], None),
    ],
)
def test_objectives_fit_the_corpus(folder: Path, corpus: str, objectives: Any, message: str | None) -> None:
    config = run(folder, corpus, objectives=objectives)
    assert settings_faults(config, 1) == []
    faults, _ = file_faults(config)
    assert (faults == []) if message is None else (len(faults) == 1 and message in faults[0])


def test_every_corpus_of_a_mixture_is_checked(folder: Path) -> None:
    mixture = [{"path": str(folder / name)} for name in ("plain", "nsp")]
    for objectives, named in ((None, "nsp"), (["mlm", "nsp"], "plain")):
        faults, _ = file_faults(run(folder, "nsp", data={"mixture": mixture}, objectives=objectives))
        assert [str(folder / named) in fault for fault in faults] == [True]


def test_held_out_rows_need_labels_too(folder: Path) -> None:
    data = {"path": str(folder / "nsp"), "held_out_path": str(folder / "plain")}
    faults, _ = file_faults(run(folder, "nsp", data=data, objectives=["mlm", "nsp"]))
    assert ["has no pair labels" in fault for fault in faults] == [True]


def test_the_stored_configuration_reads_back(folder: Path, tmp_path: Path) -> None:
    for objectives in (None, ["mlm"], {"mlm": 0.5, "sop": 2.0}):
        config = run(folder, "sop", objectives=objectives)
        (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config
