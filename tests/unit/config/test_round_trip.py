"""Any valid configuration, including phases, is equal after a dump and reload."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskvr_ds.config import RunConfig, dump_config, load_config
from maskvr_ds.config.masking import SUBSECTIONS

rates = st.floats(0.01, 0.99)
floors = st.floats(0.01, 1)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


WEIGHTED = {
    "sampler": st.just("conditional_poisson"),
    "estimator": st.just("hajek"),
}
NETWORK = {"hidden": st.sampled_from([32, 64]), "floor": floors, "lr": st.floats(1e-6, 1), "cost": st.floats(0, 1)}
SECTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "span": {"geometric_p": rates, "max_length": st.integers(1, 512)},
    "fully_explored": {"placement": st.sampled_from(["across_epochs", "same_batch"])},
    "frequency": {"power": st.floats(-2, 2), "document_power": st.floats(-2, 2), "floor": floors, **WEIGHTED},
    "mapnet": NETWORK | {"gate": st.sampled_from(["never", "auto"])} | WEIGHTED,
    "auto": {"every_steps": st.integers(1, 9), "proposal": st.booleans(), "confidence": rates},
}


def masking(strategy: str, *, named: bool) -> st.SearchStrategy[dict[str, Any]]:
    sections = {name: some(**SECTIONS[name]) for name in SUBSECTIONS[strategy]}
    if strategy == "auto":
        sections["mapnet"] = some(**NETWORK)
    common = {"rate": rates, "final_rate": rates, "mask_probability": st.floats(0, 0.9)}
    given_always: dict[str, Any] = {}
    if strategy == "auto":
        # The rate may not rise, also not to one that a phase inherits from the run.
        given_always = {"rate": st.floats(0.5, 0.9), "final_rate": st.floats(0.01, 0.1)}
    if named:
        given_always["strategy"] = st.just(strategy)
    both = st.tuples(some(**common, **sections), st.fixed_dictionaries(given_always))
    return both.map(lambda parts: {**parts[0], **parts[1]})


masks = st.sampled_from(list(SUBSECTIONS)).flatmap(lambda strategy: masking(strategy, named=True))
START = st.fixed_dictionaries(
    {
        "moments": st.sampled_from(["keep", "zero"]),
        "step_counter": st.sampled_from(["keep", "zero"]),
        "schedule": st.just("restart"),
    }
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    values: dict[str, Any] = {
        "output_dir": draw(st.sampled_from(["runs/x", "a: #1", "ü"])),
        "seed": draw(st.integers(0, 9)),
        "masking": draw(masks),
        "optimizer": draw(some(lr=st.floats(1e-5, 1), betas=st.just([0.8, 0.9]), variant=st.just("deepspeed"))),
        "model": draw(some(preset=st.just("bert-mini"), hidden_dropout_prob=rates, intermediate_size=st.just(7))),
        "divergence": draw(some(max_skipped=st.integers(0, 3), enabled=st.booleans())),
        "monitor": draw(some(wandb=st.just({"project": "p"}), csv=st.booleans())),
    }
    if not draw(st.booleans()):
        return values | {"data": {"path": "c"}, "training": draw(some(schedule_steps=st.just(9))) | {"steps": 7}}
    phases = []
    for index in range(draw(st.integers(1, 3))):
        own = draw(masks | masking(values["masking"]["strategy"], named=False))
        phase = {"name": f"p{index}", "data": {"path": f"c{index}"}, "training": {"steps": 3}, "masking": own}
        phases.append(phase if not index else {**phase, "start": draw(START), "optimizer": {"lr": 0.5}})
    return values | {"data": draw(some(prefetch=st.integers(1, 9))), "phases": phases}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(configurations())
def test_dump_round_trip(tmp_path: Path, values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert dump_config(again) == dump_config(config)
    for index in range(len(config.phases)):
        phase = config.phase(index)
        path.write_text(dump_config(phase), encoding="utf-8")
        assert load_config(path) == phase == again.phase(index)


@settings(deadline=None, max_examples=200)
@given(configurations())
def test_a_dump_names_no_other_strategy(values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(values)
    dumped = config.masking.dump()
    assert dumped.keys() & SECTIONS.keys() == set(SUBSECTIONS[config.masking.strategy])
