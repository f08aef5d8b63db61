"""training.epochs and training.tokens as steps, against the loader's own count; what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, RunConfig, dump_config, load_config
from maskvr_ds.data.loader import Loader
from maskvr_ds.data.mixture import open_mixture
from maskvr_ds.training.length import remarks, with_steps
from maskvr_ds.training.phases import plan
from maskvr_ds.training.references import file_faults
from tests.support.corpora import make_corpus

MODEL = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 32}
START = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of 90 and 41 rows of 16 tokens."""
    folder = tmp_path_factory.mktemp("data")
    make_corpus(folder / "a", rows=90, length=16)
    make_corpus(folder / "b", rows=41, length=16, seed=1)
    return folder


def config(folder: Path, **sections: Any) -> RunConfig:
    values = {
        "output_dir": str(folder / "run"),
        "model": MODEL,
        "data": {"path": str(folder / "a")},
        "batch": {"global_size": 12, "micro_size": 2},
        "evaluation": {"every_steps": 0},
    }
    return RunConfig.model_validate({**values, **sections})


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"epochs": 1}, 8),  # 90 / 12 = 7.5
        ({"epochs": 2}, 15),
        ({"epochs": 0.1}, 1),  # 0.75
        ({"epochs": 0.4}, 3),  # exactly 3: no step more by rounding errors
        ({"tokens": 1}, 1),
        ({"tokens": 12 * 16}, 1),
        ({"tokens": 12 * 16 + 1}, 2),
        ({"tokens": "1e6"}, 5209),
        ({"tokens": 1e6}, 5209),
    ],
)
def test_steps(folder: Path, training: dict[str, Any], steps: int) -> None:
    unresolved = config(folder, training=training)
    resolved = with_steps(unresolved)
    assert resolved.training.model_dump(exclude_defaults=True) == {"steps": steps}
    assert resolved == config(folder, training={"steps": steps}), "nothing else changes"
    assert with_steps(resolved) is resolved
    assert plan(resolved)[0].last_step == steps


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    epochs=st.decimals("0.01", "20", places=2),
    size=st.sampled_from([1, 6, 12, 30, 200]),
    weights=st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.25, 1.0, 2.0])),
    segments=st.sampled_from([1, 2, 3]),
)
def test_the_loader_has_passed_so_many_epochs(
    folder: Path, epochs: Any, size: int, weights: tuple[float, float], segments: int
) -> None:
    """At the last step the loader's count reaches `epochs`, one step earlier it does not."""
    mixture = [{"path": str(folder / name), "weight": w} for name, w in zip("ab", weights, strict=True)]
    masking: dict[str, Any] = {"strategy": "fully_explored"}
    if segments > 1:
        masking["fully_explored"] = {"placement": "same_batch", "segments_per_sequence": segments}
    values = {"data": {"mixture": mixture}, "masking": masking, "batch": {"global_size": size * segments}}
    steps = with_steps(config(folder, training={"epochs": float(epochs)}, **values)).training.known_steps
    corpus = open_mixture([(folder / name, w) for name, w in zip("ab", weights, strict=True)])
    loader = Loader(corpus, seed=0, global_size=size * segments, copies=segments)
    assert loader.epochs(steps * size * segments) >= float(epochs) - 1e-9
    assert loader.epochs((steps - 1) * size * segments) < float(epochs)


def test_phases(folder: Path) -> None:
    """Each by its own corpus and batch; a continued schedule has the joint length."""
    phases: list[dict[str, Any]] = [
        {"name": "one", "data": {"path": str(folder / "a")}, "training": {"epochs": 2}},
        {"name": "two", "data": {"path": str(folder / "b")}, "start": START, "training": {"tokens": 16 * 6 * 10}},
        {"name": "three", "data": {"path": str(folder / "b")}, "training": {"steps": 4}},
    ]
    phases[1]["batch"] = {"global_size": 6}
    phases[2]["start"] = {**START, "schedule": "continue"}
    values = config(folder, training={"steps": 1}).model_dump(mode="json", exclude={"training", "phases"})
    values["data"] = {}
    unresolved = RunConfig.model_validate({**values, "phases": phases})
    resolved = with_steps(unresolved)
    assert [phase.config.training.steps for phase in plan(resolved)] == [15, 10, 4]
    assert [phase.config.schedule_steps for phase in plan(resolved)] == [15, 14, 14]
    assert resolved.training.steps == 29
    path = folder / "dumped.yaml"
    for one in (unresolved, resolved):
        path.write_text(dump_config(one), encoding="utf-8")
        assert load_config(path) == one

    # A finished phase has the steps that were trained; its corpus may be gone.
    phases[0]["data"] = {"path": str(folder / "gone")}
    history = [{"steps": 15}, {"steps": 3}]
    later = with_steps(RunConfig.model_validate({**values, "phases": phases}), history)
    assert [phase.config.training.steps for phase in plan(later)] == [15, 10, 4]
    with pytest.raises(ValueError, match=r"phase 'one': .*gone"):
        with_steps(RunConfig.model_validate({**values, "phases": phases}), history[:1])
    # At the last checkpoint of a phase, too; the phase may be made longer while its corpus is there.
    last = with_steps(RunConfig.model_validate({**values, "phases": phases}), history[:1], finished=True)
    assert [phase.config.training.steps for phase in plan(last)] == [15, 10, 4]
    phases[0] |= {"data": {"path": str(folder / "a")}, "training": {"epochs": 3}}
    longer = with_steps(RunConfig.model_validate({**values, "phases": phases}), history[:1], finished=True)
    assert plan(longer)[0].config.training.steps == 23
    # The last phase of a run has to be there.
    alone = {**values, "phases": [{**phases[0], "data": {"path": str(folder / "gone")}}]}
    with pytest.raises(ValueError, match=r"phase 'one': .*gone"):
        with_steps(RunConfig.model_validate(alone), history[:1], finished=True)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"steps": 3, "epochs": 2},
            "training.steps 3 and training.epochs 2 both set the length of the training; keep one",
        ),
        ({"tokens": 5, "epochs": 2}, "training.epochs 2 and training.tokens 5 both set"),
        ({}, "training.steps: required, but not given; set it, or training.epochs or training.tokens"),
        ({"epochs": 0}, "greater than 0"),
        ({"epochs": "inf"}, "finite"),
        ({"tokens": 1.5}, "integer"),
        ({"tokens": True}, "expected a number, found true"),
    ],
)
def test_refused_by_themselves(folder: Path, training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(folder, training=training)


def test_refused_with_a_corpus(folder: Path) -> None:
    auto = {"strategy": "auto", "auto": {"rows": 6}}
    with pytest.raises(ConfigError, match=r"training.epochs 2: masking.strategy auto changes .* set training.tokens"):
        with_steps(config(folder, training={"epochs": 2}, masking=auto))
    assert with_steps(config(folder, training={"tokens": 16 * 24}, masking=auto)).training.steps == 2
    with pytest.raises(ConfigError, match=r"training.tokens 1,000,000,000,000,000,000: .* steps with .*; at most"):
        with_steps(config(folder, training={"tokens": 10**18}))
    # Rules that need the number of steps hold for them too, and are reported with the other faults of the files.
    late = config(folder, training={"epochs": 1}, schedule={"warmup_steps": 9})
    faults, _ = file_faults(late)
    assert faults == ["schedule.warmup_steps 9 exceeds the schedule's 8 steps"]
    assert len(file_faults(config(folder, data={"path": str(folder / "gone")}, training={"epochs": 1}))[0]) == 1


def test_remarks(folder: Path) -> None:
    corpus = Corpus(folder / "a")
    assert remarks(with_steps(config(folder, training={"epochs": 99})), corpus) == []
    (many,) = remarks(with_steps(config(folder, training={"epochs": 300})), corpus)
    assert many.startswith("training.steps 2,250: 300 epochs of ")
    large = config(folder, training={"steps": 2}, batch={"global_size": 92, "micro_size": 2})
    (text,) = remarks(large, corpus)
    assert text.startswith("batch.global_size 92: larger than an epoch of ")
    assert remarks(large, corpus) == file_faults(large)[1]


@pytest.mark.parametrize(
    ("masking", "unread"),
    [
        (
            {"strategy": "auto", "auto": {"max_share": None, "max_rows": 99}},
            ["auto.max_rows: not read (auto.max_share"],
        ),
        (
            {"strategy": "auto", "auto": {"final_share": 0.2}},
            ["auto.final_share: not read (neither final_rate nor auto"],
        ),
        ({"strategy": "auto", "auto": {"final_share": 0.2}, "rate": 0.3, "final_rate": 0.15}, []),
        ({"strategy": "auto", "auto": {"max_rows": 99}, "mapnet": {"lr": 0.1, "cost": 0.1}}, []),
        (
            {"strategy": "auto", "auto": {"proposal": False, "proposal_saves": 0.1}, "mapnet": {"lr": 0.1}},
            ["auto.proposal_saves: not read (auto.proposal is false)", "mapnet.lr: not read (auto.proposal is false)"],
        ),
        ({"strategy": "mapnet", "mapnet": {"cost": 0.1}}, ["mapnet.cost: not read (mapnet.gate is always)"]),
        ({"strategy": "mapnet", "mapnet": {"cost": 0.1, "mask_share": 0.5, "gate": "auto"}}, []),
        ({}, []),
    ],
)
def test_settings_that_nothing_reads_are_remarked(folder: Path, masking: dict[str, Any], unread: list[str]) -> None:
    found = config(folder, training={"steps": 5}, masking=masking)
    assert len(found.masking.unread) == len(unread)
    for line, expected in zip(found.masking.unread, unread, strict=True):
        assert line.startswith(f"masking.{expected}")
    assert set(found.masking.unread) <= set(file_faults(found)[1])
