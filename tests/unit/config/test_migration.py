"""Schema 1 of stored configurations and checkpoints against a second implementation of its rules; round trips."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from maskvr_ds.config import ConfigError, RunConfig, dump_config, load_config
from maskvr_ds.config.masking import SUBSECTIONS, MaskingConfig
from maskvr_ds.run_folder.migration import migrate_checkpoint, migrate_config, renamed

STRATEGIES = list(SUBSECTIONS)
# Schema 1: setting -> strategies it belonged to, default, other values, location in schema 2.
FLAT: dict[str, tuple[tuple[str, ...], Any, list[Any], tuple[str, ...]]] = {
    "placement": (("fully_explored",), "across_epochs", ["same_batch"], ("fully_explored", "placement")),
    "segments_per_sequence": (("fully_explored",), None, [2, 4], ("fully_explored", "segments_per_sequence")),
    "frequency_power": (("frequency",), 0.5, [-0.3, 0.7], ("frequency", "power")),
    "document_frequency_power": (("frequency",), 0.0, [0.2], ("frequency", "document_power")),
    "floor": (("frequency",), 0.3, [0.1, 1.0], ("frequency", "floor")),
    "span_probability": (("span",), 0.2, [0.4], ("span", "geometric_p")),
    "span_maximum": (("span",), 10, [3], ("span", "max_length")),
    "sampler": (("frequency", "mapnet"), "pareto", ["conditional_poisson"], ("sampler",)),
    "estimator": (("frequency", "mapnet"), "horvitz_thompson", ["hajek", "whole_mask"], ("estimator",)),
}
COMMON = {"rate": 0.15, "final_rate": None, "mask_probability": 0.8, "random_probability": 0.1}
MAPNET = {
    "layers": 1,
    "reach": 4,
    "hidden": 96,
    "lr": 0.001,
    "floor": 0.3,
    "objective": "variance",
    "gate": "always",
    "cost": None,
    "check_every": 100,
}
AUTO = {"every_steps": 1000, "rows": 32, "draws": 4, "sketch_size": 4096, "confidence": 0.95, "proposal": True}
REST = {
    "output_dir": "runs/old",
    "divergence": {"enabled": True, "skip_updates": 4},
}
START = {"moments": "keep", "step_counter": "zero", "schedule": "restart"}


def flat_settings(strategy: str) -> st.SearchStrategy[dict[str, Any]]:
    """Some settings of schema 1 valid for a strategy."""
    own = {
        name: st.sampled_from([default, *others]) for name, (of, default, others, _) in FLAT.items() if strategy in of
    }
    common = {"rate": st.sampled_from([0.2, 0.3]), "final_rate": st.sampled_from([None, 0.1])}
    return st.fixed_dictionaries({}, optional={**own, **common})


def valid(flat: dict[str, Any]) -> bool:
    explored = flat["segments_per_sequence"] is None or flat["placement"] == "same_batch"
    return explored and (flat["estimator"] != "whole_mask" or flat["sampler"] == "conditional_poisson")


def inherited(run: dict[str, Any], phase: dict[str, Any]) -> dict[str, Any]:
    """Mask settings of each phase by the rules of schema 1."""
    strategy, values = phase.get("strategy"), dict(run)
    for name, (of, default, _, _) in FLAT.items():
        if strategy is not None and strategy not in of:
            values[name] = default
    if "rate" in phase:
        values["final_rate"] = None
    if "placement" in phase:
        values["segments_per_sequence"] = None
    return {**values, **phase}


@st.composite
def old_runs(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A config.yaml of schema 1, all defaults written out, and the masks of its phases by its own rules."""
    strategy = draw(st.sampled_from(STRATEGIES))
    run = {"strategy": strategy, **COMMON, **{name: default for name, (_, default, _, _) in FLAT.items()}}
    run |= draw(flat_settings(strategy))
    mapnet = {**MAPNET, **draw(st.fixed_dictionaries({}, optional={"hidden": st.just(32), "lr": st.just(0.01)}))}
    auto = {**AUTO, **draw(st.fixed_dictionaries({}, optional={"rows": st.just(8), "proposal": st.just(False)}))}
    values = {**REST, "masking": {**run, "change_at_resume": False}, "mapnet": mapnet, "auto": auto}
    resolved = [run]
    if number := draw(st.integers(0, 2)):
        phases = []
        resolved = []
        for index in range(number):
            other = draw(st.none() | st.sampled_from(STRATEGIES))
            masking = {} if other is None else {"strategy": other}
            masking |= draw(flat_settings(other or strategy))
            resolved.append(inherited(run, masking))
            phase = {"name": f"p{index}", "data": {"path": "c"}, "training": {"steps": 5}, "masking": masking}
            phases.append(phase if not index else {**phase, "start": START})
        values |= {"phases": phases, "data": {"prefetch": 2}}
    else:
        values |= {"phases": [], "data": {"path": "c"}, "training": {"steps": 9}}
    assume(all(map(valid, [run, *resolved])))
    if "auto" not in {masks["strategy"] for masks in [run, *resolved]} and draw(st.booleans()):
        mapnet["gate"] = "never"
    return values, resolved


def check(masking: MaskingConfig, flat: dict[str, Any], mapnet: dict[str, Any], auto: dict[str, Any]) -> None:
    strategy = flat["strategy"]
    expected: dict[str, Any] = {"strategy": strategy, **{name: flat[name] for name in COMMON}}
    for name, (of, _, _, place) in FLAT.items():
        if strategy in of:
            section, field = place if len(place) == 2 else (strategy, place[0])
            expected.setdefault(section, {})[field] = flat[name]
    if strategy in ("mapnet", "auto"):
        expected["mapnet"] = {**mapnet, **expected.get("mapnet", {})}
    if strategy == "auto":
        expected["auto"] = auto
    assert masking == MaskingConfig.model_validate(expected)


def check_stored(folder: Path, values: dict[str, Any], resolved: list[dict[str, Any]]) -> None:
    """Read config.yaml of a run's folder with these values; compare its masks."""
    (folder / "metrics.jsonl").touch()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    config = load_config(path)
    assert config.divergence.max_skipped == 4
    for index, flat in enumerate(resolved):
        check(config.phase(index).masking, flat, values["mapnet"], values["auto"])
    path.write_text(dump_config(config))
    assert path.read_text().startswith("schema: 2\n")
    assert load_config(path) == config, "the current format is read back"
    assert migrate_config(yaml.safe_load(path.read_text())) == yaml.safe_load(path.read_text()), "idempotent"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(old_runs())
def test_a_stored_configuration_keeps_its_values(
    tmp_path: Path, old: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    check_stored(tmp_path, *old)


@pytest.mark.parametrize("before", STRATEGIES)
def test_inheritance_between_phases_is_unchanged(tmp_path: Path, before: str) -> None:
    """All pairs of strategies, with no setting of the run at its default."""
    run = {"strategy": before, **COMMON}
    for name, (of, default, others, _) in FLAT.items():
        run[name] = others[0] if before in of else default
    phases = [{"strategy": after} for after in STRATEGIES] + [{"rate": 0.2}]
    data = {"data": {"path": "c"}, "training": {"steps": 5}}
    listed = [{"name": f"p{i}", **data, "start": START, "masking": masking} for i, masking in enumerate(phases)]
    del listed[0]["start"]
    values = {
        **REST,
        "masking": {**run, "change_at_resume": False},
        "mapnet": {**MAPNET, "hidden": 32, "floor": 0.5},
        "auto": {**AUTO, "rows": 8},
        "phases": listed,
        "data": {"prefetch": 2},
    }
    check_stored(tmp_path, values, [inherited(run, phase) for phase in phases])


@settings(deadline=None, max_examples=150)
@given(old_runs())
def test_a_checkpoint_keeps_its_identity(old: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    values, resolved = old
    config = RunConfig.model_validate(migrate_config(values))
    for index, flat in enumerate(resolved):
        strategy, mapnet, auto = flat["strategy"], values["mapnet"], values["auto"]
        learns = strategy == "mapnet" or (strategy == "auto" and auto["proposal"])
        identity: dict[str, Any] = {"seed": 0, "masking": flat}
        written: dict[str, float] = {"optimizer.lr": 1.0}
        if strategy == "auto":
            identity["auto"] = auto
        if learns:
            identity["mapnet"] = {k: v for k, v in mapnet.items() if k not in ("lr", "check_every")}
            written |= {"mapnet.lr": mapnet["lr"], "mapnet.check_every": mapnet["check_every"]}
        migrated = migrate_checkpoint({"identity": identity, "settings": written})
        now = json.loads(json.dumps(config.phase(index).masking.identity()))
        assert migrated["identity"] == {"seed": 0, "masking": now}
        assert migrated["settings"] == {k.replace("mapnet.", "masking.mapnet."): v for k, v in written.items()}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"masking": {"span_probability": 0.3}}, ["masking.span_probability is now masking.span.geometric_p"]),
        (
            {"masking": {"strategy": "mapnet", "sampler": "pareto"}},
            ["masking.sampler is now masking.mapnet.sampler"],
        ),
        (
            {"masking": {"estimator": "hajek"}},
            ["masking.estimator is now masking.frequency.estimator or masking.mapnet.estimator"],
        ),
        (
            {"mapnet": {"floor": 0.1, "lr": 1}, "auto": {"rows": 3}, "divergence": {"skip_updates": 1}},
            [
                "mapnet.floor is now masking.mapnet.floor",
                "mapnet.lr is now masking.mapnet.lr",
                "auto.rows is now masking.auto.rows",
                "divergence.skip_updates is now divergence.max_skipped",
            ],
        ),
        ({"mapnet": None}, ["mapnet is now masking.mapnet"]),
        (
            {
                "masking": {"strategy": "frequency"},
                "phases": [{"name": "long", "masking": {"floor": 0.1, "sampler": 1}}],
            },
            [
                "phases.long.masking.floor is now phases.long.masking.frequency.floor",
                "phases.long.masking.sampler is now phases.long.masking.frequency.sampler",
            ],
        ),
        ({"masking": {"strategy": "span", "span": {"max_length": 3}, "frequency": {"floor": 1}}}, []),
        ({"masking": "span", "phases": 3, "divergence": None}, []),
    ],
)
def test_old_keys_are_named_with_their_new_names(values: dict[str, Any], expected: list[str]) -> None:
    assert renamed(values) == expected


def test_a_users_file_is_not_migrated(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base: demo_cpu\nmasking: {strategy: span, span_maximum: 3}\n")
    with pytest.raises(ConfigError, match=r"masking.span_maximum is now masking.span.max_length$"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"auto.rows is now masking.auto.rows"):
        load_config("demo_cpu", ["auto.rows=9"])
    for marker in ("metrics.jsonl", "owner.json", "checkpoints"):
        (tmp_path / marker).touch()
        assert load_config(path).masking.span.max_length == 3
        (tmp_path / "run.yaml").write_text(path.read_text())
        with pytest.raises(ConfigError, match=r"masking.span_maximum is now"):
            load_config(tmp_path / "run.yaml")
        with pytest.raises(ConfigError, match=r"masking.span_probability is now"):
            load_config(path, ["masking.span_probability=0.3"])
        (tmp_path / marker).unlink()


@pytest.mark.parametrize("schema", ["3", "0", "two", "true", "1.0"])
def test_another_schema_is_refused(tmp_path: Path, schema: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"schema: {schema}\nbase: demo_cpu\n")
    with pytest.raises(ConfigError, match=r"run.yaml: schema .*; this version reads 1 to 2"):
        load_config(path)
    path.write_text("schema: 2\nbase: demo_cpu\n")
    assert load_config(path) == load_config("demo_cpu")


def test_a_stored_keep_last_of_1_is_2_now_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In what a run has stored; in a file of one's own it is an error."""
    values: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "checkpoint": {"keep_last": 1, "every_steps": 7},
        "phases": [
            {"name": "one", "data": {"path": "corpus"}, "training": {"steps": 5}, "checkpoint": {"keep_last": 1}}
        ],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"schema": 2, **values}))
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last: Input should be greater than or equal to 2"):
        load_config(tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    config = load_config(tmp_path / "config.yaml")
    assert (config.checkpoint.keep_last, config.checkpoint.every_steps) == (2, 7)
    assert config.phase(0).checkpoint.keep_last == 2
    assert len(caplog.records) == 1
